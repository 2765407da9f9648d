"""Losses of the benchmark's own: other people's, and the transport on a query's own list.

All take scores (B, N), grades (B, N), a temperature and a mask (B, N), and give a scalar, as gradret.loss.functions.
The other lists' documents have grade 0 or, for the losses on the own list, a negative one (in_batch_grade).
"""

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret import settings
from gradret.loss import functions
from gradret.loss.functions import contrast_loss, infonce_loss, wasserstein_loss
from gradret.loss.grades import normalize_mass, place_grades, weigh_grades
from gradret.loss.reference import masked_softmax

OWN_TEMPERATURE = 0.1  # of the softmax over a query's own list: warm enough that p is no single document
MU = 10.0  # LambdaLoss's weight of the differences by distance


def bixse_loss(scores: Tensor, grades: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pair, its grade over the batch's highest being the probability of relevance.

    The logit is score / temperature plus a bias, which is at its optimum for the batch; there it is learnt.
    Source: BiXSE, Tsirigotis et al., arXiv 2508.06781.
    """
    present = _find_present(scores, mask)
    logits, wanted = scores[present] / temperature, (grades.clamp_min(0) / grades.max().clamp_min(1))[present]
    fixed, low, high = logits.detach(), -logits.detach().max() - 30, 30 - logits.detach().min()
    for _ in range(50):  # the mean probability rises with the bias
        middle = (low + high) / 2
        enough = (fixed + middle).sigmoid().mean() > wanted.mean()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    total = nnf.binary_cross_entropy_with_logits(logits + low, wanted.to(logits), reduction="sum")
    return total / len(scores)


def rince_loss(scores: Tensor, grades: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """InfoNCE summed over grades: each grade above 0 positive against all lower ones, the higher ones left out.

    A lower grade asks for less: the temperature rises by half of itself from one grade of the batch to the next lower.
    Source: RINCE, Hoffmann et al., arXiv 2201.11736.
    """
    present = _find_present(scores, mask)
    total, levels = scores.new_zeros(()), grades[present & (grades > 0)].unique().flip(0).tolist()
    for step, level in enumerate(levels):
        at = temperature * (1 + step / 2)
        total = total + infonce_loss(
            scores, grades, temperature=at, mask=present & (grades <= level), positive_from=level
        )
    return total


def flat_contrast_loss(
    scores: Tensor, grades: Tensor, *, temperature: float, targets: str = "sqrt", mask: Tensor | None = None
) -> Tensor:
    """Each document with target mass against all those without, weighed by its mass.

    What contrast_loss is, but that there a document is set against all of lower grades, those with mass among them.
    """
    present = _find_present(scores, mask)
    weights = weigh_grades(grades, present, targets, torch.promote_types(scores.dtype, torch.float32))
    binary = (grades > 0).to(weights)
    return contrast_loss(scores, binary, temperature=temperature, targets=weights.masked_fill(~present, 0), mask=mask)


def lambda_loss(scores: Tensor, grades: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """RankNet with each pair weighed by what its order changes of NDCG: NDCG-Loss2++, in bits, the mean over lists.

    Source: LambdaLoss, Wang et al. (CIKM 2018).
    """
    present = _find_present(scores, mask)
    logits = (scores / temperature).masked_fill(~present, -torch.inf)
    count = scores.shape[1]
    gains = torch.exp2(grades.clamp_min(0).to(logits)).sub(1).masked_fill(~present, 0)
    discounts = torch.arange(2, count + 2, device=scores.device).to(logits).log2()  # (N,), of ranks 1 to N
    ideal = (gains.sort(-1, descending=True).values / discounts).sum(-1, keepdim=True)
    gains = gains / ideal.clamp_min(1e-12)
    ranks = logits.argsort(-1, descending=True).argsort(-1)  # (B, N), from 0
    inverse = 1 / discounts
    at = inverse[ranks]
    distance = (ranks[:, :, None] - ranks[:, None, :]).abs()
    delta = (inverse[(distance - 1).clamp_min(0)] - inverse[distance]).abs()
    weight = ((at[:, :, None] - at[:, None, :]).abs() + MU * delta) * (gains[:, :, None] - gains[:, None, :]).abs()
    pairs = (grades[:, :, None] > grades[:, None, :]) & present[:, :, None] & present[:, None, :]
    safe = logits.masked_fill(~present, 0)
    terms = nnf.softplus(safe[:, None, :] - safe[:, :, None]) / math.log(2) * weight
    return terms.masked_fill(~pairs, 0).sum((1, 2)).mean()


def brier_loss(
    scores: Tensor, grades: Tensor, *, temperature: float, targets: str = "sqrt", mask: Tensor | None = None
) -> Tensor:
    """Mean of sum_i (p_i - q_i)^2, p = softmax(scores / temperature). Source: Brier (1950)."""
    p, q = _find_masses(scores, grades, temperature, targets, mask)
    return (p - q).square().sum(-1).mean()


def own_wasserstein_loss(
    scores: Tensor, grades: Tensor, *, order: int, targets: str = "sqrt", mask: Tensor | None = None
) -> Tensor:
    """wasserstein_loss over the documents of grade 0 and above, at OWN_TEMPERATURE: those of a query's own list."""
    own = _find_present(scores, mask) & (grades >= 0)
    return wasserstein_loss(scores, grades, order=order, temperature=OWN_TEMPERATURE, targets=targets, mask=own)


def own_crps_loss(scores: Tensor, grades: Tensor, *, targets: str = "sqrt", mask: Tensor | None = None) -> Tensor:
    """The integral along sqrt(grade) of (F - G)^2, the distribution functions of own_wasserstein_loss's p and q.

    Source: the continuous ranked probability score, Matheson and Winkler (1976), of a distribution in place of a point.
    """
    own = _find_present(scores, mask) & (grades >= 0)
    p, q = _find_masses(scores, grades, OWN_TEMPERATURE, targets, own)
    places = place_grades(grades.to(p), "sqrt").masked_fill(~own, 0)
    levels = places[own].unique()  # (L,), ascending
    below = places[:, None] <= levels[:-1, None]  # (B, L - 1, N)
    gap = ((p - q)[:, None] * below).sum(-1)  # F - G
    return (levels.diff() * gap.square()).sum(-1).mean()


def _find_present(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, all True where there is none."""
    return torch.ones_like(scores, dtype=torch.bool) if mask is None else mask


def _find_masses(
    scores: Tensor, grades: Tensor, temperature: float, targets: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p and q (B, N); both 0 in a row without target mass, which so counts as 0."""
    mask = _find_present(scores, mask)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = masked_softmax(scores / temperature, mask)
    q = normalize_mass(weigh_grades(grades, mask, targets, p.dtype).masked_fill(~mask, 0))
    return p * (q.sum(-1, keepdim=True) > 0), q


LOSSES = {
    "bixse": (bixse_loss, ("temperature",)),
    "rince": (rince_loss, ("temperature",)),
    "flat-contrast": (flat_contrast_loss, ("temperature", "targets")),
    "lambda": (lambda_loss, ("temperature",)),
    "brier": (brier_loss, ("temperature", "targets")),
    "own-wasserstein": (own_wasserstein_loss, ("order", "targets")),
    "own-crps": (own_crps_loss, ("targets",)),
}


def register() -> None:
    """Let these be losses of a run, in this process."""
    for name, (function, taken) in LOSSES.items():
        settings.LOSSES[name] = taken
        functions.LOSS_FUNCTIONS[name] = function
