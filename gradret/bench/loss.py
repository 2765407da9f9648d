"""Speed and peak memory of losses side by side: each is checked against float64, then all are timed in turns.

B is the number of lists or queries, N of documents, D of dimensions. From top to bottom: the measurement
(measure_speed), the tensors and rows of a shape (Lists, Embeddings), their float64 truth, the clock, the table and the
chart. benchmarks/speed/loss.py adds rows of other libraries.
"""

import gc
import math
import os
import pkgutil
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

from gradret.bench import format_table, memory
from gradret.console import PATIENCE_S, GradretError, say, show_bar
from gradret.encoder.load import choose_device
from gradret.files import versions
from gradret.loss.functions import gaussian_loss, mix_losses, wasserstein_loss
from gradret.loss.grades import prepare_grades
from gradret.loss.kernels import backend, describe_backend
from gradret.loss.pairs import prepare_pairs
from gradret.loss.retrieval import wasserstein_retrieval_loss
from gradret.settings import DEFAULT_LOSS, FitSettings

DEFAULT_SHAPES = {
    "cpu": ((16, 64), (128, 1024), (512, 4096)),
    "cuda": ((512, 4096), (8192, 1024), (4096, 65536)),
}
TEMPERATURE = 0.05
AXIS = {"targets": "gain", "ground": "grade"}  # of the rows W1 and W2
DEFAULT, INFONCE = "gradret default loss", "InfoNCE"
BASELINE = "cross_entropy"  # of the scores as they are: InfoNCE without its division by the temperature
# A list's graded documents, others are 0: a few, as in judged collections; the highest grade is always there.
LIST_GRADES = (3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0)
TRUTH_ELEMENTS = 1 << 20  # float64 truth is computed in blocks of about so many scores
LARGEST_MATRIX = {"cpu": 1024, "cuda": 4096}  # above it a float64 decomposition takes a minute
LONGEST_STEP_S = 20.0
MOST_OTHER_LOAD = 0.1
# Highest errors against float64: of a loss, relative, and of the lists' gradient, relative to its norm. Half types
# round the gradient and, where scores are a matrix product, the scores.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-4, 2e-2), "float16": (1e-4, 2e-2)}
PRODUCT_TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (3e-2, 2e-1), "float16": (3e-2, 2e-1)}
SUM_TOLERANCE = 0.1  # a gradient that is a sum over lists holds those near a tie, too
# InfoNCE divides scores of a half type in that type; singular values near 0 cost the Gaussian half its digits.
OTHER_TOLERANCE = 3e-2
TIMES = ("forward_ms", "backward_ms", "both_ms", "wall_ms")
FEWEST_REPEATS = 3
ROW_S = 1.5  # timing a row takes about this long, if its fewest repeats allow it
BURST_S = 1e-3  # a sample on the host is the mean of as many calls as fill this,
MOST_CALLS = 50  # up to so many
FLUSH_BYTES = 256 << 20  # beyond any GPU's L2 cache
FLUSH_S = 5e-5  # writing them takes longer than this
MOST_FLUSHES = 40
COPY_BYTES = 1 << 30
COPY_REPEATS = 20


@dataclass(frozen=True)
class Row:
    """A line of the benchmark.

    Attributes:
        name: unique in its workload.
        order: the p of W_p^p, None for other losses.
        inputs: what the loss is differentiated in.
        loss: computes the scalar loss, None when the row is skipped.
        truth: the name of what it must equal, see Lists.truth, None when there is none.
        skipped: why it is not measured.
        external: whether another library computes it: where that fails or is wrong, the row is skipped alone.
    """

    name: str
    order: int | None = None
    inputs: tuple[Tensor, ...] = ()
    loss: Callable[[], Tensor] | None = None
    truth: str | None = None
    skipped: str | None = None
    external: bool = False


class TrueGradient(NamedTuple):
    """d loss / d input in float64 for the input's first rows; where `defined` (b,) is False it jumps."""

    values: Tensor
    defined: Tensor | None = None


class Truth(NamedTuple):
    """A loss in float64, and the gradients of a Wasserstein loss in the row's inputs."""

    loss: float
    gradients: tuple[TrueGradient, ...] = ()


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


def measure_speed(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    orders: Sequence[int] = (1, 2),
    repeats: int = 30,
    retrieval: Sequence[int] | None = None,
    more: str | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Time every row on every shape, forward and backward, and measure its peak memory.

    Args:
        shapes: (B, N) each, lists and documents per list; None for the device's DEFAULT_SHAPES.
        device: where the tensors are.
        dtype: of scores and embeddings: "float32", "bfloat16" or "float16".
        orders: of W_p^p, from 1 and 2.
        repeats: samples of a row at most; slow rows take fewer, three at least.
        retrieval: (B, N, D), queries, documents and dimensions of embeddings; None leaves that part out.
        more: "module:function" that gives further rows, see make_rows.
        keep: called with what there is after each shape.

    Returns: a JSON-serialisable document. A row of "rows" holds its shape and name, times in ms as medians with 20 and
        80 percentiles, both_ms relative to cross_entropy's on that shape, peak memory in MiB above the inputs, its
        errors against float64, and, where it was not measured, the reason as "skipped". On CUDA the times are the
        device's, with an empty cache; wall_ms is one step on an idle device by the host's clock; floor_fraction is the
        time to move a score, a gradient and one byte of grade for every element at copy_gb_s, over both_ms.
        "other_load" is the share of the processors' time that other processes took while a shape was timed.
    Raises: GradretError when a loss or gradient is not what float64 says; nothing on its shape is timed then.
    """
    began = time.monotonic()
    torch.set_num_threads(torch.get_num_threads())  # from here on fixed, whatever runs beside
    device = choose_device(None if device is None else str(device))
    chosen = shapes or DEFAULT_SHAPES["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its number
        torch.cuda.set_device(device)  # events and memory counts are the current device's
    result = {
        "versions": versions(),
        "path": backend(device),
        "kernels": describe_backend(device),
        "device": str(device),
        "dtype": dtype,
        "temperature": TEMPERATURE,
        "threads": torch.get_num_threads(),
        "copy_gb_s": measure_copy(device) if device.type == "cuda" else None,
        "peak_resolution_mib": memory.peak_resolution(device),
        "other_load": {},
        "rows": [],
    }
    for shape in [*chosen, *([retrieval] if retrieval else [])]:
        rows, share = measure_shape(shape, device=device, dtype=dtype, orders=orders, repeats=repeats, more=more)
        result["rows"] += _compare(rows, shape, dtype, result["copy_gb_s"])
        result["other_load"][name_shape(shape)] = share
        result["seconds"] = round(time.monotonic() - began, 1)
        keep(result)
    return result


def measure_shape(
    shape: Sequence[int],
    *,
    device: torch.device,
    dtype: str,
    orders: Sequence[int],
    repeats: int,
    more: str | None = None,
) -> tuple[list[dict], float | None]:
    """The rows of one shape, (B, N) or (B, N, D), and what others took of the processors; see measure_speed."""
    where = name_shape(shape)
    say(f"{where}: checking against float64")
    workload = make_workload(shape, dtype, str(device))
    truths: dict[tuple, Truth | None] = {(None, None): None}
    entries, rows, steps = [], [], []
    for row in make_rows(workload, orders, more):
        entry = {"shape": list(shape), "dtype": dtype, "row": row.name, "order": row.order, "skipped": row.skipped}
        later = (*TIMES, "repeats", "times_cross_entropy", "floor_fraction", "peak_mib", "peak_reason")
        entry |= dict.fromkeys(
            (*later, "gradient_finite", "loss_error", "gradient_errors", "worst_list_gradient_error")
        )
        entries.append(entry)
        if row.skipped is None:
            key = (row.truth, row.order if row.truth == "wasserstein" else None)
            if key not in truths:
                truths[key] = workload.truth(*key)
            step = _prepare(row, where, truths[key], entry, device)
            if entry["skipped"] is None:
                rows.append(row)
                steps.append(step)
    say(f"{where}: timing {len(rows)} rows in turns")
    measured = [entry for entry in entries if entry["skipped"] is None]
    with OtherLoad() as others:
        samples = time_in_turns(rows, steps, repeats, device)
    if others.share is not None and others.share > MOST_OTHER_LOAD:
        say(f"{where}: others took {others.share:.0%} of the processors' time meanwhile; better run it again")
    say(f"{where}: measuring peak memory")
    if device.type == "cuda":
        peaks = ((memory.measure_cuda_peak(partial(run_once, row)), None) for row in rows)
    elif device.type == "cpu":
        arguments = {"shape": shape, "dtype": dtype, "orders": orders, "more": more}
        peaks = memory.measure_cpu_peaks("gradret.bench.loss:make_call", [row.name for row in rows], arguments)
    else:
        peaks = ((None, f"PyTorch counts no peak on {device.type}") for _ in rows)
    for entry, taken, (peak, reason) in zip(measured, samples, peaks, strict=True):
        entry |= summarize(taken) | {"peak_mib": peak, "peak_reason": reason}
    return entries, others.share


def name_shape(shape: Sequence[int]) -> str:
    """As it is given on the command line: 16x64."""
    return "x".join(map(str, shape))


def check_row(row: Row, truth: Truth | None) -> dict:
    """A row's errors against float64, after a first call of it. Raises: GradretError when they are too large."""
    loss = row.loss()
    # float16 gradients of a mean underflow; as with loss scaling, those of the sum are compared.
    scale = row.inputs[0].shape[0] if row.inputs[0].dtype == torch.float16 else 1
    gradients = torch.autograd.grad(loss, row.inputs, torch.full_like(loss, scale))
    finite = all(gradient.isfinite().all().item() for gradient in gradients)
    if truth is None:
        return {"gradient_finite": finite}
    limits = TOLERANCES if len(row.inputs) == 1 else PRODUCT_TOLERANCES
    loss_limit, gradient_limit = limits[str(row.inputs[0].dtype).removeprefix("torch.")]
    found = loss.item()
    loss_error = abs(found - truth.loss) / abs(truth.loss)
    if not loss_error <= (OTHER_TOLERANCE if row.order is None else loss_limit):
        raise GradretError(f"the loss is {found:.8g}, float64 says {truth.loss:.8g}")
    errors, worst = [], None
    for gradient, true in zip(gradients, truth.gradients, strict=True) if truth.gradients else ():
        gradient = (gradient[: len(true.values)] / scale).to(true.values)
        error, norm = (gradient - true.values).norm(dim=-1), true.values.norm(dim=-1)
        if true.defined is not None:
            error, norm = error[true.defined], norm[true.defined]
            worst = (error / norm).max().item()
        errors.append((error.norm() / norm.norm()).item())
        if not errors[-1] <= (SUM_TOLERANCE if true.defined is None else gradient_limit):
            raise GradretError(f"the gradient is {errors[-1]:.2g} of its norm off from float64")
    return {
        "gradient_finite": finite,
        "loss_error": loss_error,
        "gradient_errors": errors,
        "worst_list_gradient_error": worst,
    }


def _prepare(row: Row, where: str, truth: Truth | None, entry: dict, device: torch.device) -> Step | None:
    """Check a row and time one step, or note in the entry why it is skipped."""
    try:
        entry |= check_row(row, truth)  # the first call, in which a compiled row compiles
        step = measure_step(row, device)
        if step.seconds > LONGEST_STEP_S:
            entry["skipped"] = f"a step takes {step.seconds:.0f} s, more than {LONGEST_STEP_S:.0f} s"
        return step
    except torch.cuda.OutOfMemoryError:
        entry["skipped"] = "out of device memory"
    except GradretError as error:
        if not row.external:
            raise GradretError(f"{row.name} on {where}: {error}; nothing was timed") from None
        entry["skipped"] = str(error)
    except RuntimeError as error:
        if not row.external:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        entry["skipped"] = " ".join(["failed:", *lines[:2]])
    return None


def _compare(entries: list[dict], shape: Sequence[int], dtype: str, copy_gb_s: float | None) -> list[dict]:
    """Fill in what relates rows to cross_entropy and to the device's copy rate."""
    (baseline,) = (entry for entry in entries if entry["row"].endswith(BASELINE))
    # A score read, its gradient written, a byte of grade level read.
    floor_bytes = shape[0] * shape[1] * (2 * getattr(torch, dtype).itemsize + 1)
    for entry in entries:
        if entry["skipped"] is not None:
            continue
        if baseline["skipped"] is None:
            entry["times_cross_entropy"] = entry["both_ms"]["median"] / baseline["both_ms"]["median"]
        if copy_gb_s and entry["order"] is not None and len(shape) == 2:
            entry["floor_fraction"] = floor_bytes / copy_gb_s / 1e6 / entry["both_ms"]["median"]
    return entries


# --- tensors and rows of a shape


class Lists:
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

    def rows(self, orders: Sequence[int]) -> list[Row]:
        """gradret's exact losses with grades prepared once and raw, a plain one; gradret's others; PyTorch's."""
        scores, grades, found = self.scores, self.grades, []
        for order in orders:
            for name, loss in (
                (f"gradret W{order}", partial(wasserstein_loss, scores, self._prepared, temperature=TEMPERATURE)),
                (
                    f"gradret W{order}, raw grades",
                    partial(wasserstein_loss, scores, grades, temperature=TEMPERATURE, **AXIS),
                ),
                (f"PyTorch W{order}", partial(textbook_wasserstein, scores, grades, temperature=TEMPERATURE)),
            ):
                found.append(Row(name, order, (scores,), partial(loss, order=order), "wasserstein"))
        fit = {name: getattr(FitSettings(), name) for name in ("order", "targets", "ground")}
        mixed = partial(mix_losses, DEFAULT_LOSS, scores, grades, temperature=TEMPERATURE, **fit)
        infonce = partial(infonce_loss, scores, self.positive, TEMPERATURE)
        return [
            *found,
            Row(DEFAULT, None, (scores,), mixed, DEFAULT),
            self._gaussian_row(),
            Row(INFONCE, None, (scores,), infonce, INFONCE),
            Row(BASELINE, None, (scores,), partial(nnf.cross_entropy, scores, self.positive), BASELINE),
        ]

    def _gaussian_row(self) -> Row:
        (B, _), name, limit = self.shape, "gradret Gaussian", LARGEST_MATRIX.get(self.device.type, 0)
        if B < 2:
            return Row(name, skipped="a covariance needs two lists")
        if B > limit:
            reason = f"singular values of a {B} x {B} float64 matrix take too long on {self.device}"
            return Row(name, skipped=f"{reason}; measured up to {limit}")
        loss = partial(gaussian_loss, self.scores, self.grades, temperature=TEMPERATURE, targets="softmax")
        return Row(name, None, (self.scores,), loss, "gaussian")

    @cached_property
    def _prepared(self):
        return prepare_grades(self.grades, **AXIS)

    def truth(self, name: str, order: int | None) -> Truth:
        """In float64: "wasserstein" of an order, with gradients; another row's name or "gaussian", without."""
        B, N = self.shape
        if name == "gaussian":
            return Truth(true_gaussian(*self._block(0, B), TEMPERATURE).item())
        total, gradients = 0.0, []
        for begin in range(0, B, step := max(1, TRUTH_ELEMENTS // N)):
            scores, grades = self._block(begin, begin + step)
            positive = self.positive[begin : begin + step].to(scores.device)
            if name == BASELINE:
                total += nnf.cross_entropy(scores, positive, reduction="sum").item()
            elif name == INFONCE:
                total += nnf.cross_entropy(scores / TEMPERATURE, positive, reduction="sum").item()
            elif name == DEFAULT:
                total += true_default(scores, grades, TEMPERATURE).sum().item()
            else:
                scores.requires_grad_(begin == 0)
                values, defined = true_wasserstein(scores, grades, order, TEMPERATURE)
                total += values.sum().item()
                if begin == 0:
                    gradients.append(TrueGradient(torch.autograd.grad(values.sum() / B, scores)[0], defined))
        return Truth(total / B, tuple(gradients))

    def _block(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Some lists' scores in float64 and their grades, on a device that has float64."""
        device = "cpu" if self.device.type == "mps" else self.device
        return self.scores.detach()[begin:end].to(device, torch.float64), self.grades[begin:end].to(device)


class Embeddings:
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

    def rows(self, orders: Sequence[int]) -> list[Row]:
        """The fused loss, the same loss on the B x N matrix of scores, and cross_entropy on it."""
        inputs = self.queries, self.documents
        found = []
        for order in orders:
            for name, loss in (
                (f"fused scoring W{order}", partial(self._fused, self._pairs)),
                (f"fused scoring W{order}, raw grades", partial(self._fused, self.grades, **AXIS)),
                (f"score matrix W{order}", partial(self._by_matrix, self._prepared)),
                (f"score matrix W{order}, raw grades", partial(self._by_matrix, **AXIS)),
            ):
                found.append(Row(name, order, inputs, partial(loss, order=order), "wasserstein"))
        return [*found, Row(f"score matrix {BASELINE}", None, inputs, self._cross_entropy, BASELINE)]

    def _fused(self, grades, **options) -> Tensor:
        return wasserstein_retrieval_loss(self.queries, self.documents, grades, temperature=TEMPERATURE, **options)

    def _by_matrix(self, grades=None, **options) -> Tensor:
        """Without grades, their matrix is made in the call."""
        grades = self._matrix_grades() if grades is None else grades
        return wasserstein_loss(self.queries @ self.documents.T, grades, temperature=TEMPERATURE, **options)

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
            values, defined = true_wasserstein(scores, matrix, order, TEMPERATURE)
            total += values.sum().item()
            of_queries, of_documents = torch.autograd.grad(values.sum() / B, (queries, documents))
            documents_gradient += of_documents
            queries_gradient = queries_gradient or TrueGradient(of_queries, defined)
        if name == BASELINE:
            return Truth(total / B)
        return Truth(total / B, (queries_gradient, TrueGradient(documents_gradient)))

    def _wide(self, x: Tensor) -> Tensor:
        return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def make_workload(shape: Sequence[int], dtype: str, device: str) -> Lists | Embeddings:
    """Lists for a shape (B, N), embeddings for (B, N, D)."""
    return (Lists if len(shape) == 2 else Embeddings)(shape, dtype, device)


def make_rows(workload: Lists | Embeddings, orders: Sequence[int], more: str | None = None) -> list[Row]:
    """The workload's rows and before its last, the baseline, those of `more`: "module:function" of the first two.

    It is given by name so that another process can make the same rows.
    """
    further = pkgutil.resolve_name(more)(workload, orders) if more else []
    *rows, baseline = workload.rows(orders)
    return [*rows, *further, baseline]


def make_call(name: str, shape: Sequence[int], dtype: str, orders: Sequence[int], more: str | None) -> Callable:
    """One forward and backward of the row of this name, on the CPU, for memory.measure_cpu_peaks."""
    rows = make_rows(make_workload(shape, dtype, "cpu"), orders, more)
    return partial(run_once, next(row for row in rows if row.name == name))


def textbook_wasserstein(scores: Tensor, grades: Tensor, *, order: int, temperature: float) -> Tensor:
    """W_p^p as textbooks give it: prefix sums in the order of grades; order 2 over the merged steps of both."""
    v, by_grade = grades.sort(-1)
    p = torch.softmax(scores.float() / temperature, -1).gather(-1, by_grade)
    q = gain_targets(v)
    if order == 1:
        return (v.diff() * (p - q).cumsum(-1).abs()[:, :-1]).sum(-1).mean()
    return integrate_quantiles(p.cumsum(-1), q.cumsum(-1), v).mean()


def infonce_loss(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE with one positive per row: F.cross_entropy of scores (B, N) and the positives' columns (B,)."""
    return nnf.cross_entropy(scores / temperature, positive)


def gain_targets(grades: Tensor) -> Tensor:
    """(B, N): 2^grade - 1, over its sum along each row."""
    weights = torch.exp2(grades) - 1
    return weights / weights.sum(-1, keepdim=True)


def integrate_quantiles(F: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """The integral over (0, 1) of (F^-1 - G^-1)^2 for each list: prefix sums F and G (B, K) at the places v (B, K)."""
    steps = torch.cat([F, G], -1).sort(-1).values  # (B, 2K)
    widths = steps.diff(prepend=torch.zeros_like(steps[:, :1]))
    top = v.shape[-1] - 1  # rounding can leave the last step above a prefix sum's end
    places = steps.detach()
    f, g = (v.gather(-1, torch.searchsorted(cdf.detach(), places).clamp(max=top)) for cdf in (F, G))
    return (widths * (f - g).square()).sum(-1)


# --- truth in float64


def true_wasserstein(scores: Tensor, grades: Tensor, order: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Each list's W_p^p with gain targets, by true_transport."""
    return true_transport(torch.softmax(scores / temperature, -1), gain_targets(grades.double()), grades, order)


def true_transport(p: Tensor, q: Tensor, places: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Each list's W_p^p in float64 by closed forms that no loss uses, and whether its gradient is defined.

    With gaps g_i between the distinct places, and F and G the prefix sums of both masses by place:

        order 1: sum g_i |F_i - G_i|
        order 2: sum g_i^2 |F_i - G_i| + 2 sum_{i<j} g_i g_j ([F_i - G_j]+ + [G_i - F_j]+)

    Args:
        p, q: (B, N) float64, masses. places: (B, N), of few distinct values.

    Returns: (B,) float64, and (B,) bool: False where F and G are within 1e-4 of a tie, at which the gradient jumps.
    """
    values = places.unique()
    member = (places[..., None] == values).double()  # (B, N, L)
    F, G = ((mass[:, None] @ member)[:, 0].cumsum(-1)[:, :-1] for mass in (p, q))  # (B, L - 1)
    gaps = values.double().diff()
    distances = F[:, :, None] - G[:, None, :]
    defined = (distances.abs() > 1e-4).flatten(1).all(-1)
    between = (F - G).abs()
    if order == 1:
        return between @ gaps, defined
    pairs = (gaps[:, None] * gaps).triu(1) * (distances.relu() + (-distances.mT).relu())
    return between @ gaps.square() + 2 * pairs.sum((1, 2)), defined


def true_default(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    """(B,): each list's default loss, .15 W_2^2 on the roots of grades + .85 contrast, with root targets."""
    logits, roots = scores / temperature, grades.double().sqrt()
    q = roots / roots.sum(-1, keepdim=True)
    others = logits.masked_fill(q > 0, -torch.inf).logsumexp(-1, keepdim=True)
    contrast = (q * (torch.logaddexp(logits, others) - logits)).sum(-1)
    return 0.15 * true_transport(torch.softmax(logits, -1), q, roots, 2)[0] + 0.85 * contrast


def true_gaussian(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    """The squared 2-Wasserstein distance of two Gaussians in float64, the root's trace as a nuclear norm.

    Of p = softmax(scores / temperature) and q = softmax(grades), as Gaussians fitted over the batch.

    Source: Mathiasen and Hvilshøj, arXiv 2009.14075.
    """
    p, q = torch.softmax(scores.double() / temperature, -1), torch.softmax(grades.double(), -1)
    e_p, e_q = p - p.mean(0), q - q.mean(0)
    traces = e_p.square().sum() + e_q.square().sum() - 2 * torch.linalg.matrix_norm(e_p @ e_q.T, "nuc")
    return (p.mean(0) - q.mean(0)).square().sum() + traces / (len(p) - 1)


# --- the clock


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


# --- the table and the chart


def format_speed(result: dict) -> str:
    """One table a shape: times with their 20 and 80 percentiles, relative to cross_entropy, and peak memory.

    Below it, what was skipped and why.
    """
    on_cuda = result["copy_gb_s"] is not None
    blocks = []
    for shape, rows in _group_by_shape(result).items():
        header = ["", "forward ms", "backward ms", "both ms [20-80 %]", "x cross_entropy", "peak MiB"]
        header += ["one call ms", "of copy rate"] if on_cuda else []
        cells, notes = [], []
        for row in rows:
            if row["skipped"]:
                notes.append(f"not measured: {row['row']}: {row['skipped']}")
                continue
            both, ratio = row["both_ms"], row["times_cross_entropy"]
            line = [
                row["row"],
                *(_show_digits(row[time]["median"]) for time in ("forward_ms", "backward_ms")),
                f"{_show_digits(both['median'])} [{_show_digits(both['p20'])}-{_show_digits(both['p80'])}]",
                "" if ratio is None else f"{ratio:.2f}",
                _show_peak(row["peak_mib"], result["peak_resolution_mib"]),
            ]
            if on_cuda:
                share = row["floor_fraction"]
                line += [_show_digits(row["wall_ms"]["median"]), "" if share is None else f"{share:.0%}"]
            cells.append(line)
        notes += [f"peak MiB: {reason}" for reason in dict.fromkeys(row["peak_reason"] for row in rows) if reason]
        load = result["other_load"][shape]
        busy = "" if load is None else f", {load:.0%} of the processors' time went to others"
        title = f"{shape} {result['dtype']}, {result['threads']} threads{busy}"
        blocks.append("\n".join([title, format_table(header, cells), *notes]))
    if on_cuda:
        blocks.append(
            f"copy rate {result['copy_gb_s']:.0f} GB/s: 100 % reads scores and levels and writes gradients once"
        )
    return "\n\n".join(blocks)


def draw_speed(result: dict, path: Path) -> None:
    """A PNG of forward and backward together: a group of bars a shape, a logarithmic axis, whiskers from 20 to 80 %."""
    import matplotlib.pyplot as plt

    groups = {shape: [row for row in rows if not row["skipped"]] for shape, rows in _group_by_shape(result).items()}
    heights = [max(1, len(rows)) for rows in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        figsize=(8, 1 + 0.25 * sum(heights) + 0.7 * len(groups)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (shape, rows) in zip(panels[:, 0], groups.items(), strict=True):
        places = range(len(rows))
        medians = [row["both_ms"]["median"] for row in rows]
        spread = [[abs(row["both_ms"][p] - row["both_ms"]["median"]) for row in rows] for p in ("p20", "p80")]
        colors = ["C0" if row["row"].startswith(("gradret", "fused")) else "C7" for row in rows]
        bars = axes.barh(places, medians, 0.8, xerr=spread, color=colors, ecolor="0.3", capsize=2)
        axes.bar_label(bars, [_show_digits(median) for median in medians], padding=6, fontsize=7)
        axes.set_yticks(places, [row["row"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_title(f"{shape} {result['dtype']}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(f"forward + backward, ms ({result['kernels']})")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _group_by_shape(result: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault("x".join(map(str, row["shape"])), []).append(row)
    return groups


def _show_peak(peak_mib: float | None, resolution_mib: float) -> str:
    if peak_mib is None:
        return "?"
    return f"<{resolution_mib:.2g}" if peak_mib < resolution_mib else f"{peak_mib:.1f}"


def _show_digits(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 123, 1234."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}"
