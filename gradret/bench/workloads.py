"""What the loss benchmark runs: the tensors of a shape, the rows that are measured on them, and their float64 truth.

B is the number of lists or queries, N of documents, D of dimensions. A row is built from its workload's fields and its
name alone, so that another process can measure the same row.
"""

import gc
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.bench import workloads as rivals
from gradret.console import PATIENCE_S, show_bar
from gradret.loss.functions import gaussian_loss, wasserstein_loss
from gradret.loss.grades import PreparedGrades, prepare_grades
from gradret.loss.pairs import PreparedPairs, prepare_pairs
from gradret.loss.retrieval import wasserstein_retrieval_loss
from gradret.train.mining import without


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


TEMPERATURE = 0.05
AXIS = {"targets": "gain", "ground": "grade"}  # what the other implementations compute
INFONCE = "InfoNCE"
BASELINE = "cross_entropy"  # of the scores as they are: InfoNCE without its division by the temperature
# A list's graded documents, others are 0: a few, as in judged collections; the highest grade is always there.
LIST_GRADES = (3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0)
TRUTH_ELEMENTS = 1 << 20  # float64 truth is computed in blocks of about so many scores
COMPILED = "torch.compile"  # the names of compiled rows begin with it
LARGEST_MATRIX = {"cpu": 1024, "cuda": 4096}  # above it a float64 decomposition takes a minute


@dataclass(frozen=True)
class Row:
    """A line of the benchmark.

    Attributes:
        name: unique in its workload.
        order: the p of W_p^p, None for other losses.
        inputs: what the loss is differentiated in.
        loss: computes the scalar loss, None when the row is skipped.
        truth: the name of what it must equal, see ListWorkload.truth, None when there is none.
        skipped: why it is not measured.
    """

    name: str
    order: int | None = None
    inputs: tuple[Tensor, ...] = ()
    loss: Callable[[], Tensor] | None = None
    truth: str | None = None
    skipped: str | None = None

    @property
    def compiled(self) -> bool:
        return self.name.startswith(COMPILED)

    @property
    def external(self) -> bool:
        """Whether a compiler or another library computes it: a wrong value is then that one's, not gradret's."""
        return self.name.startswith((COMPILED, "POT"))

    @property
    def foreign(self) -> bool:
        """Whether it depends on a compiler or library that may fail; then it is skipped and the others go on."""
        return self.external or self.name.startswith("SyCL")


class TrueGradient(NamedTuple):
    """d loss / d input in float64 for the input's first rows; where `defined` (b,) is False it jumps."""

    values: Tensor
    defined: Tensor | None = None


class Truth(NamedTuple):
    """A loss in float64, and the gradients of a Wasserstein loss in the row's inputs."""

    loss: float
    gradients: tuple[TrueGradient, ...] = ()


class ListWorkload:
    """Lists of graded documents with their scores: cosine-like, higher for higher grades, of spread 3 in the softmax.

    Attributes:
        scores: (B, N) in dtype, requires grad. grades: (B, N) float32. positive: (B,) int64, a column of grade 3.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str):
        self.shape = B, N = tuple(shape)
        self.device = torch.device(device)
        random = torch.Generator(self.device).manual_seed(0)
        graded = torch.tensor(LIST_GRADES[: N - 1], device=self.device)
        start = torch.randint(N, (B, 1), generator=random, device=self.device)
        columns = (start + torch.arange(len(graded), device=self.device) * (N // len(graded))) % N
        kept = torch.rand(columns.shape, generator=random, device=self.device) < 0.8
        kept[:, 0] = True
        self.grades = torch.zeros(B, N, device=self.device).scatter_(1, columns, graded * kept)
        self.positive = columns[:, 0].contiguous()
        scores = torch.randn(B, N, generator=random, device=self.device).mul_(0.15).add_(self.grades, alpha=0.1)
        self.scores = scores.clamp_(-1, 1).to(getattr(torch, dtype)).requires_grad_()

    def rows(self, orders: Sequence[int], *, compiled: bool = False) -> list[Row]:
        """All rows: gradret's, PyTorch's, compiled ones, POT's, the Gaussians, InfoNCE, and cross_entropy last."""
        if compiled:
            torch.compiler.reset()  # a function is compiled for eight shapes at most
        return [
            *(row for order in orders for row in self._wasserstein_rows(order, compiled)),
            *self._gaussian_rows(),
            self._row(INFONCE, rivals.infonce, self.positive, truth=INFONCE),
            Row(BASELINE, None, (self.scores,), partial(nnf.cross_entropy, self.scores, self.positive), BASELINE),
        ]

    def _row(self, name: str, loss: Callable, *arguments, order: int | None = None, truth: str | None = None) -> Row:
        if order is not None:
            arguments, truth = (*arguments, order), "wasserstein"
        return Row(name, order, (self.scores,), partial(loss, self.scores, *arguments, TEMPERATURE), truth)

    def _wasserstein_rows(self, order: int, compiled: bool) -> Iterator[Row]:
        grades, name = self.grades, f"W{order}"
        sorting = rivals.sort_grades(grades, order)
        # Eager on a CPU, scattering is fastest; elsewhere and compiled, a sum for each level is.
        levels = self._levels if self.device.type == "cpu" else self._byte_levels
        yield self._row(f"gradret {name}", _gradret, self._prepared, order=order)
        yield self._row(f"gradret {name}, raw grades", _gradret, grades, order=order)
        yield self._row(f"PyTorch {name}", rivals.textbook_wasserstein, grades, order=order)
        yield self._row(f"PyTorch {name}, presorted", rivals.sorted_wasserstein, sorting, order=order)
        yield self._row(f"PyTorch {name}, by level", rivals.level_wasserstein, levels, order=order)
        textbook, by_level = f"{COMPILED} {name}", f"{COMPILED} {name}, by level"
        if compiled:
            compile_loss = partial(torch.compile, dynamic=False)
            yield self._row(textbook, compile_loss(rivals.textbook_wasserstein), grades, order=order)
            yield self._row(by_level, compile_loss(rivals.level_wasserstein), self._byte_levels, order=order)
        if compiled and importlib.util.find_spec("ot"):
            yield self._row(f"POT {name}", rivals.pot_wasserstein, grades, order=order)

    def _gaussian_rows(self) -> Iterator[Row]:
        limit = LARGEST_MATRIX.get(self.device.type, 0)
        for name, loss, dimension, wanted in (
            ("SyCL Gaussian", rivals.published_gaussian, 1, "eigenvalues"),
            ("gradret Gaussian", _gradret_gaussian, 0, "singular values"),
        ):
            size = self.shape[dimension]
            if self.shape[0] < 2:
                yield Row(name, skipped="a covariance needs two lists")
            elif size > limit:
                reason = f"{wanted} of a {size} x {size} float64 matrix take too long on {self.device}"
                yield Row(name, skipped=f"{reason}; measured up to {limit}")
            else:
                yield self._row(name, loss, self.grades, truth="gaussian" if self.shape[0] <= limit else None)

    @cached_property
    def _prepared(self):
        return prepare_grades(self.grades, **AXIS)

    @cached_property
    def _levels(self):
        return rivals.find_levels(self.grades, torch.int64)

    @cached_property
    def _byte_levels(self):
        return rivals.find_levels(self.grades, torch.uint8)

    def truth(self, name: str, order: int | None) -> Truth:
        """In float64: "wasserstein" of an order, with gradients; INFONCE, BASELINE or "gaussian", without."""
        B, N = self.shape
        if name == "gaussian":
            return Truth(rivals.true_gaussian(*self._block(0, B), TEMPERATURE).item())
        total, gradients = 0.0, []
        for begin in range(0, B, step := max(1, TRUTH_ELEMENTS // N)):
            scores, grades = self._block(begin, begin + step)
            if name in (INFONCE, BASELINE):
                positive = self.positive[begin : begin + step].to(scores.device)
                temperature = TEMPERATURE if name == INFONCE else 1.0
                total += nnf.cross_entropy(scores / temperature, positive, reduction="sum").item()
                continue
            values, defined = rivals.true_wasserstein(scores.requires_grad_(begin == 0), grades, order, TEMPERATURE)
            total += values.sum().item()
            if begin == 0:
                gradients.append(TrueGradient(torch.autograd.grad(values.sum() / B, scores)[0], defined))
        return Truth(total / B, tuple(gradients))

    def _block(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Some lists' scores in float64 and their grades, on a device that has float64."""
        device = "cpu" if self.device.type == "mps" else self.device
        return self.scores.detach()[begin:end].to(device, torch.float64), self.grades[begin:end].to(device)


class RetrievalWorkload:
    """Queries and documents of length 1; each query has up to four documents of its own, grades 3, 2, 1, 0, others 0.

    Attributes:
        queries: (B, D), documents: (N, D), in dtype, require grad. grades: rows, columns and grades, (G,) each.
        positive: (B,) int64, the column of the document of grade 3.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str):
        self.shape = B, N, D = tuple(shape)
        self.device = torch.device(device)
        random = torch.Generator(self.device).manual_seed(0)
        documents = torch.randn(N, D, generator=random, device=self.device)
        own = max(1, min(4, N // B))
        rows = torch.arange(B, device=self.device).repeat_interleave(own)
        columns = torch.arange(B * own, device=self.device) % N
        grades = torch.tensor([3.0, 2.0, 1.0, 0.0], device=self.device)[:own].repeat(B)
        self.grades, self.positive = (rows, columns, grades), columns[::own].contiguous()
        noise = torch.randn(B, D, generator=random, device=self.device)
        queries = noise.index_add_(0, rows, documents[columns] * grades[:, None] / 4)
        dtype = getattr(torch, dtype)
        self.queries, self.documents = (
            nnf.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (queries, documents)
        )

    def rows(self, orders: Sequence[int], *, compiled: bool = False) -> list[Row]:
        """The fused loss, the same loss on the B x N matrix of scores, and cross_entropy on it. None is compiled."""
        inputs = self.queries, self.documents
        found = []
        for order in orders:
            for name, loss in (
                (f"fused scoring W{order}", partial(self._fused, self._pairs)),
                (f"fused scoring W{order}, raw grades", partial(self._fused, self.grades)),
                (f"score matrix W{order}", partial(self._by_matrix, self._prepared)),
                (f"score matrix W{order}, raw grades", self._by_matrix),
            ):
                found.append(Row(name, order, inputs, partial(loss, order=order), "wasserstein"))
        return [*found, Row(f"score matrix {BASELINE}", None, inputs, self._cross_entropy, BASELINE)]

    def _fused(self, grades, order: int) -> Tensor:
        axis = {} if isinstance(grades, PreparedPairs) else AXIS
        options = {"order": order, "temperature": TEMPERATURE, **axis}
        return wasserstein_retrieval_loss(self.queries, self.documents, grades, **options)

    def _by_matrix(self, grades=None, *, order: int) -> Tensor:
        """Without grades, their matrix is made in the call."""
        grades = self._matrix_grades() if grades is None else grades
        return _gradret(self.queries @ self.documents.T, grades, order, TEMPERATURE)

    def _cross_entropy(self) -> Tensor:
        return nnf.cross_entropy(self.queries @ self.documents.T, self.positive)

    def _matrix_grades(self) -> Tensor:
        rows, columns, grades = self.grades
        return torch.zeros(self.shape[:2], device=self.device).index_put_((rows, columns), grades)

    @cached_property
    def _prepared(self):
        return prepare_grades(self._matrix_grades(), **AXIS)

    @cached_property
    def _pairs(self):
        return prepare_pairs(*self.grades, self.shape[:2], **AXIS)

    def truth(self, name: str, order: int | None) -> Truth:
        """In float64: "wasserstein" of an order, with gradients, or "cross_entropy", without."""
        B, N, _ = self.shape
        documents = self._wide(self.documents).requires_grad_()
        rows, columns, grades = (x.to(documents.device) for x in self.grades)
        total, queries_gradient, documents_gradient = 0.0, None, torch.zeros_like(documents)
        for begin in range(0, B, step := max(1, TRUTH_ELEMENTS // N)):
            queries = self._wide(self.queries[begin : begin + step]).requires_grad_()
            scores = queries @ documents.T
            if name == BASELINE:
                positive = self.positive[begin : begin + step].to(scores.device)
                total += nnf.cross_entropy(scores, positive, reduction="sum").item()
                continue
            inside = (rows >= begin) & (rows < begin + len(queries))
            matrix = torch.zeros_like(scores).index_put_(
                (rows[inside] - begin, columns[inside]), grades[inside].double()
            )
            values, defined = rivals.true_wasserstein(scores, matrix, order, TEMPERATURE)
            total += values.sum().item()
            of_queries, of_documents = torch.autograd.grad(values.sum() / B, (queries, documents))
            documents_gradient += of_documents
            queries_gradient = queries_gradient or TrueGradient(of_queries, defined)
        if name == BASELINE:
            return Truth(total / B)
        return Truth(total / B, (queries_gradient, TrueGradient(documents_gradient)))

    def _wide(self, x: Tensor) -> Tensor:
        return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def make_workload(shape: Sequence[int], dtype: str, device: str) -> ListWorkload | RetrievalWorkload:
    """Lists for a shape (B, N), embeddings for (B, N, D)."""
    return (ListWorkload if len(shape) == 2 else RetrievalWorkload)(shape, dtype, device)


def _gradret(scores: Tensor, grades, order: int, temperature: float) -> Tensor:
    axis = {} if isinstance(grades, PreparedGrades) else AXIS
    return wasserstein_loss(scores, grades, order=order, temperature=temperature, **axis)


def _gradret_gaussian(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    return gaussian_loss(scores, grades, temperature=temperature, targets="softmax")


FEWEST_REPEATS = 3
ROW_S = 1.5  # timing a row takes about this long, if its fewest repeats allow it
BURST_S = 1e-3  # a sample on the host is the mean of as many calls as fill this,
MOST_CALLS = 50  # up to so many
FLUSH_BYTES = 256 << 20  # beyond any GPU's L2 cache
FLUSH_S = 5e-5  # it takes longer than this
MOST_FLUSHES = 40
COPY_BYTES = 1 << 30
COPY_REPEATS = 20


class Step(NamedTuple):
    """One forward and backward: seconds until it is done, and until the host is free again."""

    seconds: float
    host_s: float


class Sample(NamedTuple):
    """Milliseconds of one forward and backward; wall_ms only on CUDA."""

    forward_ms: float
    backward_ms: float
    both_ms: float
    wall_ms: float | None


def run_once(row: Row) -> None:
    """One forward and backward; what they made is freed."""
    torch.autograd.grad(row.loss(), row.inputs)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_step(row: Row, device: torch.device) -> Step:
    """One forward and backward with the device idle before it."""
    synchronize(device)
    began = time.perf_counter()
    run_once(row)
    returned = time.perf_counter()
    synchronize(device)
    return Step(time.perf_counter() - began, returned - began)


class HostTimer:
    """Samples by the host's clock, waiting for the device after forward and after backward."""

    def __init__(self, device: torch.device):
        self.device = device

    def take_sample(self, row: Row, step: Step) -> Sample:
        calls = min(MOST_CALLS, math.ceil(BURST_S / step.seconds))
        forward_s = backward_s = 0.0
        if calls > 1:
            run_once(row)  # what the row before left in caches and in waiting threads is not this row's
        for _ in range(calls):
            began = time.perf_counter()
            loss = row.loss()
            synchronize(self.device)
            middle = time.perf_counter()
            torch.autograd.grad(loss, row.inputs)
            synchronize(self.device)
            forward_s += middle - began
            backward_s += time.perf_counter() - middle
        scale = 1e3 / calls
        return Sample(forward_s * scale, backward_s * scale, (forward_s + backward_s) * scale, None)


class CudaTimer:
    """Samples of the device's own time, from CUDA events, and of the time one call takes on the host's clock.

    Writes to a large buffer come before each: they empty the L2 cache, and they last until the host has launched the
    whole step, so that the events do not count the host's share. Where a loss itself waits for the device they do.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def take_sample(self, row: Row, step: Step) -> Sample:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(self.device)
        for _ in range(min(MOST_FLUSHES, 1 + math.ceil(1.5 * step.host_s / FLUSH_S))):
            self._buffer.zero_()
        events[0].record()
        loss = row.loss()
        events[1].record()
        gradients = torch.autograd.grad(loss, row.inputs)
        events[2].record()
        torch.cuda.synchronize(self.device)
        del loss, gradients
        forward_ms, backward_ms = events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])
        self._buffer.zero_()
        return Sample(forward_ms, backward_ms, forward_ms + backward_ms, 1e3 * measure_step(row, self.device).seconds)


def time_in_turns(rows: Sequence[Row], steps: Sequence[Step], repeats: int, device: torch.device) -> list[list[Sample]]:
    """Samples of each row: `repeats` rounds visit the rows one after the other; slow rows sit out some rounds."""
    timer = CudaTimer(device) if device.type == "cuda" else HostTimer(device)
    counts = [max(FEWEST_REPEATS, min(repeats, int(ROW_S / max(step.seconds, BURST_S)))) for step in steps]
    rounds = max(counts, default=0)
    samples: list[list[Sample]] = [[] for _ in rows]
    with _no_collection():
        for turn in show_bar(range(rounds), desc="timing", unit="round", delay=PATIENCE_S):
            for row, step, count, found in zip(rows, steps, counts, samples, strict=True):
                if (turn + 1) * count // rounds > turn * count // rounds:  # spread evenly over the rounds
                    found.append(timer.take_sample(row, step))
    return samples


def summarize(samples: Sequence[Sample]) -> dict:
    """Median, 20 and 80 percentile of each time, None where there is none, and the number of samples."""
    found: dict = {"repeats": len(samples)}
    for name, values in zip(Sample._fields, zip(*samples, strict=True), strict=True):
        if values[0] is None:
            found[name] = None
        else:
            found[name] = find_percentiles(values)
    return found


def measure_copy(device: torch.device) -> float:
    """Median rate of copying 1 GiB within a CUDA device, bytes read and written, in GB/s (1e9)."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(COPY_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        times_ms.append(begin.elapsed_time(end))
    return 2 * COPY_BYTES / float(np.median(times_ms)) / 1e6


class OtherLoad:
    """Counts, while it is entered, what other processes take of the host's processors; Linux only.

    Two threads wait for each other many times in a loss; with a third one beside them on two cores, each wait can
    take a whole time slice, several milliseconds, and ratios within a run are lost, too.

    Attributes:
        share: of all processors' time, 0 to 1; None where it is not known.
    """

    def __init__(self):
        self.share: float | None = None

    def __enter__(self):
        self._began = _read_processor_s()
        return self

    def __exit__(self, *_):
        ended = _read_processor_s()
        if self._began is not None and ended is not None and ended[1] > self._began[1]:
            others_s, all_s = (after - before for before, after in zip(self._began, ended, strict=True))
            self.share = max(0.0, others_s / all_s)


def _read_processor_s() -> tuple[float, float] | None:
    """Seconds that others, guests of the same machine among them, and all together had on all processors."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal, in ticks; see proc_stat(5)
    ticks = [int(field) for field in first[1:9]]
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) * tick_s - own.user - own.system, sum(ticks) * tick_s


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside, which would hit some row by chance."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 and 80 percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}
