"""The losses that gradret's are measured beside, in plain PyTorch and POT, and what all must equal in float64.

B is the number of lists, N the documents a list, L the distinct grades. Targets are gain, 2^grade - 1, over their
sum; a list needs at least one grade above 0. All are means over lists, differentiable in scores by autograd.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.imports import without


class SortedGrades(NamedTuple):
    """What a sorting loss can compute once for all steps: each list's order by grade, its grades and targets.

    Attributes:
        by_grade: (B, N) int64, documents from the lowest grade to the highest.
        v: (B, N), their grades.
        target: (B, N), their target mass for order 1, its prefix sums for order 2.
    """

    by_grade: Tensor
    v: Tensor
    target: Tensor


class GradeLevels(NamedTuple):
    """What a loss over few distinct grades can compute once for all steps.

    Attributes:
        levels: (B, N), each document's place among the distinct grades: int64 to scatter by, uint8 to compare.
        v: (B, L), the distinct grades, rising.
        target_cdf: (B, L), prefix sums of the target mass by grade.
    """

    levels: Tensor
    v: Tensor
    target_cdf: Tensor


def sort_grades(grades: Tensor, order: int) -> SortedGrades:
    """Prepare grades (B, N) for sorted_wasserstein."""
    v, by_grade = grades.sort(-1)
    target = _gain_targets(v)
    return SortedGrades(by_grade, v, target if order == 1 else target.cumsum(-1))


def sorted_wasserstein(scores: Tensor, prepared: SortedGrades, order: int, temperature: float) -> Tensor:
    """W_p^p as textbooks give it: prefix sums in the order of grades; order 2 over the merged steps of both."""
    p = torch.softmax(scores.float() / temperature, -1).gather(-1, prepared.by_grade)
    if order == 1:
        return (prepared.v.diff() * (p - prepared.target).cumsum(-1).abs()[:, :-1]).sum(-1).mean()
    return _integrate_quantiles(p.cumsum(-1), prepared.target, prepared.v).mean()


def textbook_wasserstein(scores: Tensor, grades: Tensor, order: int, temperature: float) -> Tensor:
    """sorted_wasserstein, with the sorting of grades (B, N) in every call."""
    return sorted_wasserstein(scores, sort_grades(grades, order), order, temperature)


def find_levels(grades: Tensor, dtype: torch.dtype) -> GradeLevels:
    """Prepare grades (B, N) of few distinct values for level_wasserstein, levels in dtype: int64 or uint8."""
    values, levels = grades.unique(return_inverse=True)  # (L,), (B, N)
    mass = torch.stack([_gain_targets(grades).where(levels == i, 0).sum(-1) for i in range(len(values))], -1)
    return GradeLevels(levels.to(dtype), values.expand(len(grades), -1).contiguous(), mass.cumsum(-1))


def level_wasserstein(scores: Tensor, prepared: GradeLevels, order: int, temperature: float) -> Tensor:
    """W_p^p from one mass for each distinct grade: no sort, and prefix sums over L numbers a list.

    Masses are scattered for int64 levels, which is fast on a CPU, and summed level by level for uint8 ones, which
    avoids colliding additions on a GPU and which torch.compile fuses.
    """
    p = torch.softmax(scores.float() / temperature, -1)
    if prepared.levels.dtype == torch.int64:
        mass = torch.zeros_like(prepared.v).scatter_add(-1, prepared.levels, p)
    else:
        mass = torch.stack([p.where(prepared.levels == i, 0).sum(-1) for i in range(prepared.v.shape[-1])], -1)
    F, G = mass.cumsum(-1), prepared.target_cdf
    if order == 1:
        return (prepared.v.diff() * (F - G).abs()[:, :-1]).sum(-1).mean()
    return _integrate_quantiles(F, G, prepared.v).mean()


def pot_wasserstein(scores: Tensor, grades: Tensor, order: int, temperature: float) -> Tensor:
    """W_p^p by POT's ot.wasserstein_1d on all lists at once. Raises: ImportError without POT."""
    with without("jax", "cupy", "tensorflow"):
        import ot

    p = torch.softmax(scores.float() / temperature, -1)
    columns = (x.mT.contiguous() for x in (grades, grades, p, _gain_targets(grades)))  # POT's lists are columns
    return ot.wasserstein_1d(*columns, p=order).mean()


def published_gaussian(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    """SyCL's loss as published: float64 covariances (N, N), the trace of the root by eigenvalues of their product.

    Of p = softmax(scores / temperature) and q = softmax(grades), as Gaussians fitted over the batch.

    Source: arXiv 2503.23239.
    """
    p, q = torch.softmax(scores.double() / temperature, -1), torch.softmax(grades.double(), -1)
    cov_p, cov_q = torch.cov(p.T), torch.cov(q.T)
    root = torch.linalg.eigvals(cov_p @ cov_q).real.clamp_min(0).sqrt().sum()
    return (p.mean(0) - q.mean(0)).square().sum() + cov_p.trace() + cov_q.trace() - 2 * root


def infonce(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE with one positive a row: F.cross_entropy of scores (B, N) and the positives' columns (B,)."""
    return nnf.cross_entropy(scores / temperature, positive)


def true_wasserstein(scores: Tensor, grades: Tensor, order: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Each list's W_p^p in float64 by closed forms that no loss here uses, and whether its gradient is defined.

    With gaps g_i between the distinct grades, and F and G the prefix sums of both masses by grade:

        order 1: sum g_i |F_i - G_i|
        order 2: sum g_i^2 |F_i - G_i| + 2 sum_{i<j} g_i g_j ([F_i - G_j]+ + [G_i - F_j]+)

    Args:
        scores: (B, N) float64. grades: (B, N), of few distinct values.

    Returns: (B,) float64, and (B,) bool: False where F and G are within 1e-4 of a tie, at which the gradient jumps.
    """
    values = grades.unique()
    member = (grades[..., None] == values).double()  # (B, N, L)
    p, q = torch.softmax(scores / temperature, -1), _gain_targets(grades.double())
    F, G = ((mass[:, None] @ member)[:, 0].cumsum(-1)[:, :-1] for mass in (p, q))  # (B, L - 1)
    gaps = values.double().diff()
    distances = F[:, :, None] - G[:, None, :]
    defined = (distances.abs() > 1e-4).flatten(1).all(-1)
    between = (F - G).abs()
    if order == 1:
        return between @ gaps, defined
    pairs = (gaps[:, None] * gaps).triu(1) * (distances.relu() + (-distances.mT).relu())
    return between @ gaps.square() + 2 * pairs.sum((1, 2)), defined


def true_gaussian(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    """published_gaussian's value in float64 without its N x N matrices: the root's trace is a nuclear norm.

    Source: Mathiasen and Hvilshøj, arXiv 2009.14075.
    """
    p, q = torch.softmax(scores.double() / temperature, -1), torch.softmax(grades.double(), -1)
    e_p, e_q = p - p.mean(0), q - q.mean(0)
    traces = e_p.square().sum() + e_q.square().sum() - 2 * torch.linalg.matrix_norm(e_p @ e_q.T, "nuc")
    return (p.mean(0) - q.mean(0)).square().sum() + traces / (len(p) - 1)


def _gain_targets(grades: Tensor) -> Tensor:
    weights = torch.exp2(grades) - 1
    return weights / weights.sum(-1, keepdim=True)


def _integrate_quantiles(F: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """The integral over (0, 1) of (F^-1 - G^-1)^2 for each list: prefix sums F and G (B, K) at the places v (B, K)."""
    steps = torch.cat([F, G], -1).sort(-1).values  # (B, 2K)
    widths = steps.diff(prepend=torch.zeros_like(steps[:, :1]))
    top = v.shape[-1] - 1  # rounding can leave the last step above a prefix sum's end
    places = steps.detach()
    f, g = (v.gather(-1, torch.searchsorted(cdf.detach(), places).clamp(max=top)) for cdf in (F, G))
    return (widths * (f - g).square()).sum(-1)
