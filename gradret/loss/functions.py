"""Losses over graded lists. All take scores (B, N), grades (B, N) and a mask (B, N), and give a scalar.

That is a mean over lists, or what `reduction` says; gaussian_loss alone is one value of the whole batch. B is the
number of lists, N the number of documents per list, absent ones included. `targets` says where a list's relevance mass
belongs: "gain", w(y) = 2^y - 1 (0 below grade 0); "softmax", w(y) = exp(y); "sqrt", the root of y (0 below grade 0); or
the weights themselves, (B, N), >= 0. Each row is normalised to 1. `ground` says how far mass is moved between two
grades: "grade", |y - y'|; "gain", |2^y - 2^y'|; "sqrt", the same of their roots, so that 0 to 1 is further than 2 to 3.

A document whose score is -inf takes part as absent. Only wasserstein_loss keeps its target mass, as the distance stays
finite. A row without another score counts as 0.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.loss.grades import (
    PreparedGrades,
    accumulation_dtype,
    check_grades,
    check_scores,
    normalize_mass,
    result_dtype,
    weigh_grades,
)
from gradret.loss.one_pass import ONE_PASS, one_pass_loss
from gradret.loss.reference import masked_softmax
from gradret.settings import DEFAULT_GROUND, DEFAULT_ORDER, DEFAULT_TARGETS, DEFAULT_TEMPERATURE, LOSSES, parse_loss


def wasserstein_loss(
    scores: Tensor,
    grades: Tensor | PreparedGrades,
    *,
    order: int = DEFAULT_ORDER,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    ground: str = DEFAULT_GROUND,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean exact W_p^p, along the grade axis, between predicted and target relevance mass.

    p = softmax(scores / temperature) and q = targets, over each row; mass at a document sits at its grade, or where
    `ground` puts that.

    Args:
        scores: (B, N) float; higher ranks earlier. Never written.
        grades: (B, N) real, same device; needs no gradient. Or what prepare_grades made of grades, targets, ground and
            mask.
        order: 1 or 2, the p of W_p^p; the unit of the result is that of the ground distance^order.
        temperature: > 0, in units of score.
        targets: "gain", "softmax", "sqrt", or weights (B, N).
        ground: "grade", "gain" or "sqrt".
        mask: (B, N) bool, True where a document exists; None for all.
        reduction: "mean" or "sum" over lists, or "none".

    Returns: scalar, or (B,) for "none"; float64 for float64 scores, else float32. A row without target mass counts as
        0 and gets no gradient.
    Raises: ValueError when shapes differ, order is not 1 or 2, temperature <= 0, targets, ground or reduction are
        unknown. TypeError for scores, grades or a mask that are no tensors.
        RuntimeError when the gradient is differentiated again, or was changed in place between two backward passes.
    Source: one-dimensional optimal transport, Peyré and Cuturi (2019), section 2.6; targets after SyCL,
        arXiv 2503.23239.
    """
    return one_pass_loss({"wasserstein": 1}, scores, grades, order, temperature, targets, ground, mask, reduction)


def gaussian_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared 2-Wasserstein distance between Gaussians fitted over the batch to p's and q's rows.

    |mean_p - mean_q|^2 + tr C_p + tr C_q - 2 tr (C_p C_q)^1/2, where the last trace is the nuclear norm of
    E_p E_q^T / (B - 1) with E the centred rows: no N x N matrix, no eigenvalues of a product.

    Args, Returns, Raises: as wasserstein_loss, without order. One batch gives one value, not one per list: rows
        without predicted or target mass are no part of it, and for one row the covariances are 0. NaN when a score is.
    Source: SyCL, arXiv 2503.23239, which takes targets="softmax"; the trace after Mathiasen and Hvilshøj,
        arXiv 2009.14075.
    """
    mask = _check_list(scores, grades, temperature, mask, targets)
    wide = accumulation_dtype(scores.device)
    weights = weigh_grades(grades, mask, targets, result_dtype(scores)) if isinstance(targets, str) else targets
    p = masked_softmax(scores.to(wide) / temperature, mask)  # (B, N)
    q = normalize_mass(weights.to(wide).masked_fill(~mask, 0))
    alive = ((p.sum(-1) != 0) & (q.sum(-1) != 0)).to(wide)[:, None]  # (B, 1)
    rows = alive.sum().clamp_min(1)
    mean_p, mean_q = (p * alive).sum(0) / rows, (q * alive).sum(0) / rows  # (N,)
    e_p, e_q = (p - mean_p) * alive, (q - mean_q) * alive
    try:
        sigma = torch.linalg.svdvals(e_p @ e_q.T)  # (B,)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it does not converge on NaN
        return (p.sum() * torch.nan).to(result_dtype(scores))
    # Rows without spread leave null directions, whose singular vectors are arbitrary: keep them out of the gradient.
    sigma = torch.where(sigma > sigma.detach().amax() * 1e-12, sigma, 0)
    traces = e_p.square().sum() + e_q.square().sum() - 2 * sigma.sum()
    value = (mean_p - mean_q).square().sum() + traces / (rows - 1).clamp_min(1)
    return value.to(result_dtype(scores))


def infonce_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    mask: Tensor | None = None,
    positive_from: float | None = None,
) -> Tensor:
    """Mean of -log e_i / (e_i + sum of e over the negatives), e = exp(scores / temperature).

    Positive are the documents of the row's highest grade, or those of grade `positive_from` and above, each against all
    documents of a lower one; several positives are averaged. A row without positives or negatives counts as 0.

    Args, Returns, Raises: as wasserstein_loss, without order and targets.
    Source: van den Oord et al., arXiv 1807.03748; SyCL, arXiv 2503.23239, compares with positive_from=2.
    """
    mask = _check_list(scores, grades, temperature, mask)
    grades = grades.to(result_dtype(scores))
    if positive_from is None:
        top = grades.masked_fill(~mask, -torch.inf)
        positive = grades >= (top.amax(-1, keepdim=True) if top.shape[1] else top)
    else:
        positive = grades >= positive_from
    return one_pass_loss({"contrast": 1}, scores, positive.to(grades), temperature=temperature, mask=mask)


def kl_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean KL(q || p), p = softmax(scores / temperature): the listwise cross-entropy less the entropy of q.

    Args, Returns, Raises: as wasserstein_loss, without order.
    Source: ListNet, Cao et al. (ICML 2007).
    """
    return one_pass_loss(
        {"kl": 1}, scores, grades, temperature=temperature, targets=targets, mask=mask, reduction=reduction
    )


def contrast_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean of sum_i q_i * -log e_i / (e_i + sum of e over the documents of lower grade), e as in infonce_loss.

    Each document with target mass against all of a lower grade, weighed by its mass. Unlike in kl_loss, those of higher
    grade do not compete with it: one that is ranked high already is not pushed down for the others' sake.

    Args, Returns, Raises: as wasserstein_loss, without order. A row without target mass, or with one grade only, counts
        as 0.
    Source: InfoNCE, van den Oord et al., arXiv 1807.03748, of each grade against the lower ones as in RINCE, Hoffmann
        et al., arXiv 2201.11736; here of one temperature, weighed by target mass.
    """
    return one_pass_loss(
        {"contrast": 1}, scores, grades, temperature=temperature, targets=targets, mask=mask, reduction=reduction
    )


def ranknet_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over each row's pairs y_i > y_j of log(1 + exp((s_j - s_i) / temperature)), then over rows.

    Needs B * N * N numbers. A row without a pair counts as 0.

    Args, Returns, Raises: as wasserstein_loss, without order and targets.
    Source: RankNet, Burges et al. (ICML 2005).
    """
    mask = _check_list(scores, grades, temperature, mask)
    logits = (scores.to(result_dtype(scores)) / temperature).masked_fill(~mask, 0)
    pair = (grades[:, :, None] > grades[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # (B, N, N)
    terms = nnf.softplus(logits[:, None, :] - logits[:, :, None]) * pair
    return (terms.sum((1, 2)) / pair.sum((1, 2)).clamp_min(1)).mean()


LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: globals()[f"{name}_loss"] for name in LOSSES}


def mix_losses(loss: str, scores: Tensor, grades: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The weighted sum of the losses that `loss` spells, see gradret.settings.parse_loss; a scalar.

    Args:
        scores, grades, mask: as wasserstein_loss.
        options: settings of losses; each gets those that it takes.
    """
    weights, terms = parse_loss(loss), []
    together = {name: weights.pop(name) for name in ONE_PASS if name in weights}
    if together:
        taken = {key: value for key, value in options.items() if key in LOSSES["wasserstein"]}
        terms.append(one_pass_loss(together, scores, grades, mask=mask, **taken))
    for name, weight in weights.items():
        taken = {key: value for key, value in options.items() if key in LOSSES[name]}
        terms.append(weight * LOSS_FUNCTIONS[name](scores, grades, mask=mask, **taken))
    return torch.stack(terms).sum()


def _check_list(
    scores: Tensor, grades: Tensor, temperature: float, mask: Tensor | None, targets: str | Tensor = "gain"
) -> Tensor:
    """The mask, without documents of score -inf. Raises: ValueError."""
    check_scores(scores, grades, temperature)
    check_grades(grades, targets, mask)
    present = scores != -torch.inf
    return present if mask is None else mask & present
