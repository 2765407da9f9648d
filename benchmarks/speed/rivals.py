"""Other ways to the same losses: sorting once, sums by grade, torch.compile, POT, SyCL's Gaussian as published.

`list_rivals` makes rows of them for gradret.bench.loss.
"""

import importlib.util
import os
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.bench.loss import (
    MIXTURES,
    TEMPERATURE,
    Embeddings,
    Lists,
    Row,
    gain_targets,
    refuse_gaussian,
    true_gaussian,
)


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


def textbook_wasserstein(scores: Tensor, grades: Tensor, *, order: int, temperature: float) -> Tensor:
    """W_p^p as textbooks give it: prefix sums in the order of grades; order 2 over the merged steps of both."""
    return sorted_wasserstein(scores, sort_grades(grades, order), order=order, temperature=temperature)


def integrate_quantiles(F: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """The integral over (0, 1) of (F^-1 - G^-1)^2 for each list: prefix sums F and G (B, K) at the places v (B, K)."""
    steps = torch.cat([F, G], -1).sort(-1).values  # (B, 2K)
    widths = steps.diff(prepend=torch.zeros_like(steps[:, :1]))
    top = v.shape[-1] - 1  # rounding can leave the last step above a prefix sum's end
    places = steps.detach()
    f, g = (v.gather(-1, torch.searchsorted(cdf.detach(), places).clamp(max=top)) for cdf in (F, G))
    return (widths * (f - g).square()).sum(-1)


def sort_grades(grades: Tensor, order: int) -> SortedGrades:
    """Prepare grades (B, N) for sorted_wasserstein."""
    v, by_grade = grades.sort(-1)
    target = gain_targets(v)
    return SortedGrades(by_grade, v, target if order == 1 else target.cumsum(-1))


def sorted_wasserstein(scores: Tensor, prepared: SortedGrades, *, order: int, temperature: float) -> Tensor:
    """textbook_wasserstein with the sorting of grades left out."""
    p = torch.softmax(scores.float() / temperature, -1).gather(-1, prepared.by_grade)
    if order == 1:
        return (prepared.v.diff() * (p - prepared.target).cumsum(-1).abs()[:, :-1]).sum(-1).mean()
    return integrate_quantiles(p.cumsum(-1), prepared.target, prepared.v).mean()


def find_levels(grades: Tensor, dtype: torch.dtype) -> GradeLevels:
    """Prepare grades (B, N) of few distinct values for level_wasserstein, levels in dtype: int64 or uint8."""
    values, levels = grades.unique(return_inverse=True)  # (L,), (B, N)
    mass = torch.stack([gain_targets(grades).where(levels == i, 0).sum(-1) for i in range(len(values))], -1)
    return GradeLevels(levels.to(dtype), values.expand(len(grades), -1).contiguous(), mass.cumsum(-1))


def level_wasserstein(scores: Tensor, prepared: GradeLevels, *, order: int, temperature: float) -> Tensor:
    """W_p^p from one mass for each distinct grade: no sort, and prefix sums over L numbers per list.

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
    return integrate_quantiles(F, G, prepared.v).mean()


def pot_wasserstein(scores: Tensor, grades: Tensor, *, order: int, temperature: float) -> Tensor:
    """W_p^p by POT's ot.wasserstein_1d on all lists at once. Raises: ImportError without POT."""
    for other in ("JAX", "CUPY", "TENSORFLOW"):  # which POT loads where it finds them, and JAX takes a GPU's memory
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{other}", "1")
    import ot

    p = torch.softmax(scores.float() / temperature, -1)
    columns = (x.mT.contiguous() for x in (grades, grades, p, gain_targets(grades)))  # POT's lists are columns
    return ot.wasserstein_1d(*columns, p=order).mean()


def published_gaussian(scores: Tensor, grades: Tensor, *, temperature: float) -> Tensor:
    """SyCL's loss as published: float64 covariances (N, N), the trace of the root by eigenvalues of their product.

    Of p = softmax(scores / temperature) and q = softmax(grades), as Gaussians fitted over the batch.

    Source: arXiv 2503.23239.
    """
    p, q = torch.softmax(scores.double() / temperature, -1), torch.softmax(grades.double(), -1)
    cov_p, cov_q = torch.cov(p.T), torch.cov(q.T)
    root = torch.linalg.eigvals(cov_p @ cov_q).real.clamp_min(0).sqrt().sum()
    return (p.mean(0) - q.mean(0)).square().sum() + cov_p.trace() + cov_q.trace() - 2 * root


def list_rivals(workload: Lists | Embeddings, *, compiled: bool = False) -> list[Row]:
    """Rows of lists; from embeddings, cross_entropy alone, of the scores as they are."""
    if isinstance(workload, Embeddings):
        queries, documents = workload.inputs
        return [
            Row(
                "cross_entropy",
                (queries, documents),
                lambda: nnf.cross_entropy(queries @ documents.T, workload.positive),
            )
        ]
    scores, grades, found = workload.scores, workload.grades, []
    bytes_of = find_levels(grades, torch.uint8)
    # Eager on a CPU, scattering is fastest; elsewhere and compiled, a sum for each level is.
    levels = find_levels(grades, torch.int64) if workload.device.type == "cpu" else bytes_of
    if compiled:
        torch.compiler.reset()  # a function is compiled for eight shapes at most

    def add(name: str, loss, prepared, order: int, **options) -> None:
        bound = partial(loss, scores, prepared, order=order, temperature=TEMPERATURE)
        found.append(Row(name, (scores,), bound, MIXTURES[f"W{order}"], **options))

    for order in (1, 2):
        add(f"PyTorch W{order}", textbook_wasserstein, grades, order)
        add(f"PyTorch W{order}, presorted", sorted_wasserstein, sort_grades(grades, order), order)
        add(f"PyTorch W{order}, by level", level_wasserstein, levels, order)
        if compiled:
            textbook, by_level = (
                torch.compile(loss, dynamic=False) for loss in (textbook_wasserstein, level_wasserstein)
            )
            add(f"torch.compile W{order}", textbook, grades, order, external=True)
            add(f"torch.compile W{order}, by level", by_level, bytes_of, order, external=True)
        if importlib.util.find_spec("ot"):
            add(f"POT W{order}", pot_wasserstein, grades, order, external=True)
        else:
            found.append(Row(f"POT W{order}", skipped="POT is not installed; install it: pip install POT"))
    gaussian = partial(published_gaussian, scores, grades, temperature=TEMPERATURE)
    truth = None if refuse_gaussian("", workload.shape[0], workload) else true_gaussian
    skipped = refuse_gaussian("eigenvalues", workload.shape[1], workload)
    plain = Row("cross_entropy", workload.inputs, partial(nnf.cross_entropy, scores, workload.positive))
    return [*found, Row("SyCL Gaussian", workload.inputs, gaussian, truth, skipped, external=True), plain]


def list_compiled_rivals(workload: Lists | Embeddings) -> list[Row]:
    """list_rivals, with what torch.compile makes of them."""
    return list_rivals(workload, compiled=True)
