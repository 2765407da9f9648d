"""A loss that knows no ranking, for the benchmark's own runs: the negative control `sorted`."""

import torch
from torch import Tensor

from gradret import settings
from gradret.loss import functions
from gradret.loss.grades import check_grades, normalize_mass, weigh_grades
from gradret.loss.reference import masked_softmax


def sorted_loss(
    scores: Tensor,
    grades: Tensor,
    *,
    temperature: float = settings.DEFAULT_TEMPERATURE,
    targets: str = settings.DEFAULT_TARGETS,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean of sum_k (p_(k) - q_(k))^2 over the sorted masses, p = softmax(scores / temperature).

    It asks for the right masses, but not at which documents: it is the same for every permutation of the scores, and
    can teach no ranking. A benchmark in which it helps measures something else than the grades.

    Args, Returns: as gradret.kl_loss. A row without target mass counts as 0.
    Source: N times W_2^2 between the distributions of a row's masses; one-dimensional optimal transport, Peyré and
        Cuturi (2019), section 2.6.
    """
    check_grades(grades, targets, mask)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = masked_softmax(scores / temperature, mask)  # (B, N)
    q = normalize_mass(weigh_grades(grades, mask, targets, p.dtype).masked_fill(~mask, 0))
    difference = (p.sort(-1).values - q.sort(-1).values) * (q.sum(-1, keepdim=True) > 0)
    return difference.square().sum(-1).mean()


def register() -> None:
    """Let `sorted` be the loss of a run, in this process."""
    settings.LOSSES["sorted"] = ("temperature", "targets")
    functions.LOSS_FUNCTIONS["sorted"] = sorted_loss
