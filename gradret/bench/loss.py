"""Speed and peak memory of losses side by side: each is checked against float64, then all are timed in turns.

B is the number of lists or queries, N of documents, D of dimensions. From top to bottom: the measurement
(measure_speed), the tensors and rows of a shape (Lists, Embeddings), their truth in float64, the table and the chart.
benchmarks/speed/loss.py adds rows of other libraries.
"""

import math
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.benchmark import Timer

from gradret.bench import format_table, memory
from gradret.console import PATIENCE_S, GradretError, say, show_bar
from gradret.encoder.load import choose_device
from gradret.files import versions
from gradret.loss.functions import gaussian_loss, mix_losses, wasserstein_loss
from gradret.loss.grades import prepare_grades
from gradret.loss.kernels import backend, describe_backend
from gradret.loss.retrieval import prepare_pairs, wasserstein_retrieval_loss
from gradret.settings import DEFAULT_LOSS, FitSettings

DEFAULT_SHAPES = {
    "cpu": ((16, 64), (128, 1024), (512, 4096)),
    "cuda": ((512, 4096), (8192, 1024), (4096, 65536)),
}
TEMPERATURE = 0.05
AXIS = {"targets": "gain", "ground": "grade"}  # of the rows W1 and W2
BASELINE = "cross_entropy"  # of the scores as they are: InfoNCE without its division by the temperature
# A list's graded documents, others are 0: a few, as in judged collections; the highest grade is always there.
LIST_GRADES = (3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0)
TRUTH_ELEMENTS = 1 << 20  # the truth is computed in blocks of about so many scores
LARGEST_MATRIX = {"cpu": 1024, "cuda": 4096}  # above it a float64 decomposition takes a minute
LONGEST_STEP_S = 20.0
# Highest errors against float64: of a loss, relative, and of the lists' gradient, relative to its norm. Half types
# round the gradient and, where scores are a matrix product, the scores.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-4, 2e-2), "float16": (1e-4, 2e-2)}
PRODUCT_TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (3e-2, 2e-1), "float16": (3e-2, 2e-1)}
SUM_TOLERANCE = 0.1  # a gradient that is a sum over lists holds those near a tie, too
# InfoNCE divides scores of a half type in that type; singular values near 0 cost the Gaussian half its digits.
OTHER_TOLERANCE = 3e-2
FEWEST_REPEATS = 3
ROW_S = 1.5  # timing a row takes about this long, if its fewest repeats allow it
SAMPLE_S = 1e-3  # a sample is the mean of as many calls as fill this


@dataclass(frozen=True)
class Row:
    """A line of the benchmark.

    Attributes:
        name: unique in its workload.
        order: the p of W_p^p, None for other losses.
        inputs: what the loss is differentiated in.
        loss: computes the scalar loss, None when the row is skipped.
        truth: true_wasserstein or another function like it, which the loss must equal; None where there is none.
        skipped: why it is not measured.
        external: whether another library computes it: where that fails or is wrong, the row is skipped alone.
    """

    name: str
    order: int | None = None
    inputs: tuple[Tensor, ...] = ()
    loss: Callable[[], Tensor] | None = None
    truth: Callable | None = None
    skipped: str | None = None
    external: bool = False


class Truth(NamedTuple):
    """A loss and its gradients in float64, one for each input; where `defined` (B,) is False, a list's jumps.

    Without `defined`, gradients are not compared.
    """

    loss: float
    gradients: tuple[Tensor, ...] = ()
    defined: Tensor | None = None


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
        repeats: samples of a row at most; slow rows take fewer, but three.
        retrieval: (B, N, D), queries, documents and dimensions of embeddings; None leaves that part out.
        more: "module:function" that gives further rows, see make_rows.
        keep: called with what there is after each shape.

    Returns: a JSON-serialisable document. A row of "rows" holds its shape and name, the times of forward alone and of
        both in ms as medians with 20 and 80 percentiles, both_ms relative to cross_entropy's on that shape, peak
        memory in MiB above the inputs, its errors against float64, and, where it was not measured, the reason as
        "skipped".
    Raises: GradretError when a loss or gradient is not what float64 says; nothing on its shape is timed then.
    """
    began = time.monotonic()
    torch.set_num_threads(torch.get_num_threads())  # from here on fixed, whatever runs beside
    device = choose_device(None if device is None else str(device))
    chosen = shapes or DEFAULT_SHAPES["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its number
        torch.cuda.set_device(device)  # the timer's waiting and memory counts are the current device's
    result = {
        "versions": versions(),
        "path": backend(device),
        "kernels": describe_backend(device),
        "device": str(device),
        "dtype": dtype,
        "temperature": TEMPERATURE,
        "threads": torch.get_num_threads(),
        "peak_resolution_mib": memory.peak_resolution(device),
        "rows": [],
    }
    for shape in [*chosen, *([retrieval] if retrieval else [])]:
        result["rows"] += measure_shape(shape, device=device, dtype=dtype, orders=orders, repeats=repeats, more=more)
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
) -> list[dict]:
    """The rows of one shape, (B, N) or (B, N, D); see measure_speed."""
    where = name_shape(shape)
    say(f"{where}: checking against float64")
    workload = make_workload(shape, dtype, str(device))
    truths: dict[tuple, Truth] = {}
    entries, measured = [], []
    for row in make_rows(workload, orders, more):
        entry = {"shape": list(shape), "dtype": dtype, "row": row.name, "order": row.order, "skipped": row.skipped}
        later = ("forward_ms", "both_ms", "repeats", "times_cross_entropy", "peak_mib", "peak_reason")
        entry |= dict.fromkeys((*later, "gradient_finite", "loss_error", "gradient_errors"))
        entries.append(entry)
        if row.skipped is None:
            key = row.truth, row.order
            if row.truth is not None and key not in truths:
                truths[key] = find_truth(workload, *key)
            step_s = _prepare(row, where, truths.get(key), entry)
            if entry["skipped"] is None:
                measured.append((row, entry, step_s))
    truths.clear()  # on the largest shapes they are gigabytes, which rows may need
    say(f"{where}: timing {len(measured)} rows in turns")
    rows = [row for row, _, _ in measured]
    times = time_in_turns(rows, [step_s for _, _, step_s in measured], repeats)
    say(f"{where}: measuring peak memory")
    if device.type == "cuda":
        peaks = ((memory.measure_cuda_peak(partial(run_once, row)), None) for row in rows)
    elif device.type == "cpu":
        arguments = {"shape": shape, "dtype": dtype, "orders": orders, "more": more}
        peaks = memory.measure_cpu_peaks("gradret.bench.loss:make_call", [row.name for row in rows], arguments)
    else:
        peaks = ((None, f"PyTorch counts no peak on {device.type}") for _ in rows)
    for (_, entry, _), taken, (peak, reason) in zip(measured, times, peaks, strict=True):
        entry |= taken | {"peak_mib": peak, "peak_reason": reason}
    baseline = entries[-1]["both_ms"]  # make_rows puts it last
    for _, entry, _ in measured if baseline else ():
        entry["times_cross_entropy"] = entry["both_ms"]["median"] / baseline["median"]
    return entries


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
    errors = []
    for gradient, true in zip(gradients, truth.gradients, strict=True) if truth.gradients else ():
        limit, difference = SUM_TOLERANCE, (gradient / scale).to(true) - true
        if not errors:  # the first input has a row for each list, the documents' gradient sums over lists
            limit, difference, true = gradient_limit, difference[truth.defined], true[truth.defined]
        errors.append((difference.norm() / true.norm()).item())
        if not errors[-1] <= limit:
            raise GradretError(f"the gradient is {errors[-1]:.2g} of its norm off from float64")
    return {"gradient_finite": finite, "loss_error": loss_error, "gradient_errors": errors}


def _prepare(row: Row, where: str, truth: Truth | None, entry: dict) -> float | None:
    """Check a row and time one step in seconds, or note in the entry why it is skipped."""
    try:
        entry |= check_row(row, truth)  # the first call, in which a compiled row compiles
        step_s = _make_timer(partial(run_once, row)).blocked_autorange(min_run_time=0).mean  # of one call
        if step_s > LONGEST_STEP_S:
            entry["skipped"] = f"a step takes {step_s:.2f} s, longer than {LONGEST_STEP_S:g} s"
        return step_s
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


def run_once(row: Row) -> None:
    """One forward and backward; what they made is freed."""
    torch.autograd.grad(row.loss(), row.inputs)


def time_in_turns(rows: Sequence[Row], steps_s: Sequence[float], repeats: int) -> list[dict]:
    """Times of each row, whose step takes about steps_s: "forward_ms", "both_ms", and the number of "repeats".

    Rounds visit the rows one after the other, so that what slows the machine for a while slows all of them. Slow rows
    sit out some rounds.
    """
    timers = [(_make_timer(row.loss), _make_timer(partial(run_once, row))) for row in rows]
    fewest = min(FEWEST_REPEATS, repeats)
    every = [max(1, min(repeats // fewest, round(repeats * step_s / ROW_S))) for step_s in steps_s]
    samples: list[list[tuple[float, ...]]] = [[] for _ in rows]
    for turn in show_bar(range(repeats if rows else 0), desc="timing", unit="round", delay=PATIENCE_S):
        for pair, apart, found in zip(timers, every, samples, strict=True):
            if turn % apart == 0:
                # Its warm-up also clears what the row before left in caches and in waiting threads.
                found.append(tuple(1e3 * timer.blocked_autorange(min_run_time=SAMPLE_S).median for timer in pair))
    return [
        {
            "repeats": len(found),
            "forward_ms": find_percentiles([forward for forward, _ in found]),
            "both_ms": find_percentiles([both for _, both in found]),
        }
        for found in samples
    ]


def _make_timer(call: Callable[[], object]) -> Timer:
    """A timer that waits for an accelerator and collects no garbage; by itself it would set one thread."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def find_percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 and 80 percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


# --- tensors and rows of a shape


class Lists:
    """Lists of graded documents with their scores: cosine-like, higher for higher grades, of spread 3 in the softmax.

    Attributes:
        inputs: (scores,), (B, N) in dtype, requires grad. grades: (B, N) float32. positive: (B,) int64, a column of
            grade 3.
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
        self.inputs = (self.scores,)

    def make_rows(self, orders: Sequence[int]) -> list[Row]:
        """gradret's exact losses with grades prepared once and raw, a plain one; gradret's others; PyTorch's."""
        scores, grades, found = self.scores, self.grades, []
        prepared = prepare_grades(grades, **AXIS)
        for order in orders:
            options = {"order": order, "temperature": TEMPERATURE}
            for name, loss in (
                (f"gradret W{order}", partial(wasserstein_loss, scores, prepared, **options)),
                (f"gradret W{order}, raw grades", partial(wasserstein_loss, scores, grades, **options, **AXIS)),
                (f"PyTorch W{order}", partial(textbook_wasserstein, scores, grades, **options)),
            ):
                found.append(Row(name, order, self.inputs, loss, true_wasserstein))
        fit = {name: getattr(FitSettings(), name) for name in ("order", "targets", "ground")}
        mixed = partial(mix_losses, DEFAULT_LOSS, scores, grades, temperature=TEMPERATURE, **fit)
        infonce = partial(infonce_of_positive, scores, self.positive, TEMPERATURE)
        plain = partial(nnf.cross_entropy, scores, self.positive)
        gaussian = partial(gaussian_loss, scores, grades, temperature=TEMPERATURE, targets="softmax")
        skipped = refuse_gaussian("singular values", self.shape[0], self)
        return [
            *found,
            Row("gradret default loss", None, self.inputs, mixed, true_default),
            Row("gradret Gaussian", None, self.inputs, gaussian, true_gaussian, skipped),
            Row("InfoNCE", None, self.inputs, infonce, true_infonce),
            Row(BASELINE, None, self.inputs, plain, true_cross_entropy),
        ]


def refuse_gaussian(what: str, size: int, lists: Lists) -> str | None:
    """Why a Gaussian loss of these lists is not measured that needs `what` of a matrix (size, size); None to do it."""
    limit = LARGEST_MATRIX.get(lists.device.type, 0)
    if lists.shape[0] < 2:
        return "a covariance needs two lists"
    if size > limit:
        matrix = f"a {size} x {size} float64 matrix"
        return f"{what} of {matrix} take too long on {lists.device}; measured up to {limit}"
    return None


class Embeddings:
    """Queries and documents of length 1; each query has up to four documents of its own, grades 3, 2, 1, 0, others 0.

    Attributes:
        inputs: (queries (B, D), documents (N, D)), in dtype, require grad.
        graded: rows, columns and grades, (G,) each. positive: (B,) int64, the column of the document of grade 3.
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
        self.graded, self.positive = (rows, columns, grades), columns[::own].contiguous()
        noise = torch.randn(B, D, generator=random, device=self.device)
        queries = noise.index_add_(0, rows, documents[columns] * grades[:, None] / 4)
        dtype = getattr(torch, dtype)
        self.inputs = tuple(nnf.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (queries, documents))

    @property
    def grades(self) -> Tensor:
        """(B, N), made anew each time."""
        rows, columns, grades = self.graded
        return torch.zeros(self.shape[:2], device=self.device).index_put_((rows, columns), grades)

    def make_rows(self, orders: Sequence[int]) -> list[Row]:
        """The fused loss, the same loss on the B x N matrix of scores, and cross_entropy on it."""
        pairs, prepared = prepare_pairs(*self.graded, self.shape[:2], **AXIS), prepare_grades(self.grades, **AXIS)
        found = []
        for order in orders:
            for name, loss in (
                (f"fused scoring W{order}", partial(self._fused, pairs)),
                (f"fused scoring W{order}, raw grades", partial(self._fused, self.graded, **AXIS)),
                (f"score matrix W{order}", partial(self._by_matrix, prepared)),
                (f"score matrix W{order}, raw grades", partial(self._by_matrix, **AXIS)),
            ):
                found.append(Row(name, order, self.inputs, partial(loss, order=order), true_wasserstein))
        return [*found, Row(f"score matrix {BASELINE}", None, self.inputs, self._cross_entropy, true_cross_entropy)]

    def _fused(self, grades, **options) -> Tensor:
        return wasserstein_retrieval_loss(*self.inputs, grades, temperature=TEMPERATURE, **options)

    def _by_matrix(self, grades=None, **options) -> Tensor:
        """Without grades, their matrix is made in the call."""
        queries, documents = self.inputs
        grades = self.grades if grades is None else grades
        return wasserstein_loss(queries @ documents.T, grades, temperature=TEMPERATURE, **options)

    def _cross_entropy(self) -> Tensor:
        queries, documents = self.inputs
        return nnf.cross_entropy(queries @ documents.T, self.positive)


def make_workload(shape: Sequence[int], dtype: str, device: str) -> Lists | Embeddings:
    """Lists for a shape (B, N), embeddings for (B, N, D)."""
    return (Lists if len(shape) == 2 else Embeddings)(shape, dtype, device)


def make_rows(workload: Lists | Embeddings, orders: Sequence[int], more: str | None = None) -> list[Row]:
    """The workload's rows and before its last, the baseline, those of `more`: "module:function" of the first two.

    It is given by name so that another process can make the same rows.
    """
    further = pkgutil.resolve_name(more)(workload, orders) if more else []
    *rows, baseline = workload.make_rows(orders)
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


def infonce_of_positive(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
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


# --- truth in float64. Each true_ function of a row takes a block's scores (b, N), grades (b, N), positives' columns
# (b,) and the order. It gives each list's loss (b,) and where its gradient is defined, None not to compare gradients.


def find_truth(workload: Lists | Embeddings, truth: Callable, order: int | None) -> Truth:
    """The mean of a truth over all lists, block by block; of a Wasserstein loss also its gradients in the inputs."""
    device = "cpu" if workload.device.type == "mps" else workload.device  # which has no float64
    inputs = [x.detach().to(device, torch.float64).requires_grad_() for x in workload.inputs]
    grades, positive = workload.grades.to(device), workload.positive.to(device)
    B, N = workload.shape[:2]
    size = B if truth is true_gaussian else max(1, TRUTH_ELEMENTS // N)  # the Gaussians are fitted over the batch
    total, found = 0.0, []
    for block in (slice(begin, begin + size) for begin in range(0, B, size)):
        with torch.set_grad_enabled(order is not None):
            scores = inputs[0][block] if len(inputs) == 1 else inputs[0][block] @ inputs[1].T
            values, defined = truth(scores, grades[block], positive[block], order)
        total += values.sum().item()
        if order is not None:
            (values.sum() / B).backward()
            found.append(defined)
    return Truth(total / B, tuple(x.grad for x in inputs), torch.cat(found)) if found else Truth(total / B)


def true_wasserstein(scores: Tensor, grades: Tensor, _: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """W_p^p with gain targets, by true_transport."""
    return true_transport(torch.softmax(scores / TEMPERATURE, -1), gain_targets(grades.double()), grades, order)


def true_cross_entropy(scores: Tensor, _: Tensor, positive: Tensor, __: None) -> tuple[Tensor, None]:
    """The positive's cross-entropy, without a temperature."""
    return nnf.cross_entropy(scores, positive, reduction="none"), None


def true_infonce(scores: Tensor, _: Tensor, positive: Tensor, __: None) -> tuple[Tensor, None]:
    """The positive's cross-entropy at the temperature."""
    return nnf.cross_entropy(scores / TEMPERATURE, positive, reduction="none"), None


def true_default(scores: Tensor, grades: Tensor, _: Tensor, __: None) -> tuple[Tensor, None]:
    """The default loss: .15 W_2^2 on the roots of grades + .85 contrast, with root targets."""
    logits, roots = scores / TEMPERATURE, grades.double().sqrt()
    q = roots / roots.sum(-1, keepdim=True)
    others = logits.masked_fill(q > 0, -torch.inf).logsumexp(-1, keepdim=True)
    contrast = (q * (torch.logaddexp(logits, others) - logits)).sum(-1)
    return 0.15 * true_transport(torch.softmax(logits, -1), q, roots, 2)[0] + 0.85 * contrast, None


def true_gaussian(scores: Tensor, grades: Tensor, _: Tensor, __: None) -> tuple[Tensor, None]:
    """The batch's squared 2-Wasserstein distance of two Gaussians, for every list; the root's trace as nuclear norm.

    Of p = softmax(scores / TEMPERATURE) and q = softmax(grades), as Gaussians fitted over the batch.

    Source: Mathiasen and Hvilshøj, arXiv 2009.14075.
    """
    p, q = torch.softmax(scores / TEMPERATURE, -1), torch.softmax(grades.double(), -1)
    e_p, e_q = p - p.mean(0), q - q.mean(0)
    traces = e_p.square().sum() + e_q.square().sum() - 2 * torch.linalg.matrix_norm(e_p @ e_q.T, "nuc")
    return ((p.mean(0) - q.mean(0)).square().sum() + traces / (len(p) - 1)).expand(len(p)), None


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


# --- the table and the chart


def format_speed(result: dict) -> str:
    """One table per shape: forward and backward together, relative to cross_entropy, peak memory, and the larger error.

    Errors are relative and against float64, of the loss and of its gradients. Below each table stands what was skipped
    and why.
    """
    blocks = []
    for shape, rows in _group_by_shape(result).items():
        cells, notes = [], []
        for row in rows:
            if row["skipped"]:
                notes.append(f"not measured: {row['row']}: {row['skipped']}")
                continue
            both, ratio = row["both_ms"], row["times_cross_entropy"]
            errors = [] if row["loss_error"] is None else [row["loss_error"], *row["gradient_errors"]]
            cells.append(
                [
                    row["row"],
                    f"{_show_digits(both['median'])} [{_show_digits(both['p20'])}-{_show_digits(both['p80'])}]",
                    "" if ratio is None else f"{ratio:.2f}",
                    _show_peak(row["peak_mib"], result["peak_resolution_mib"]),
                    f"{max(errors):.0e}" if errors else "",
                ]
            )
        notes += [f"peak MiB: {reason}" for reason in dict.fromkeys(row["peak_reason"] for row in rows) if reason]
        header = ["", "forward + backward ms [20-80 %]", "x cross_entropy", "peak MiB", "error"]
        title = f"{shape} {result['dtype']}, {result['threads']} threads"
        blocks.append("\n".join([title, format_table(header, cells), *notes]))
    return "\n\n".join(blocks)


def draw_speed(result: dict, path: Path) -> None:
    """A PNG of forward and backward together: a group of bars per shape, a log axis, whiskers from 20 to 80 %."""
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
        groups.setdefault(name_shape(row["shape"]), []).append(row)
    return groups


def _show_peak(peak_mib: float | None, resolution_mib: float) -> str:
    if peak_mib is None:
        return "?"
    return f"<{resolution_mib:.2g}" if peak_mib < resolution_mib else f"{peak_mib:.1f}"


def _show_digits(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 123, 1234."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}"
