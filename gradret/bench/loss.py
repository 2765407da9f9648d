"""Speed and peak memory of losses side by side: each is checked against float64, then all are timed in turns.

B is the number of lists or queries, N of documents, D of dimensions. From top to bottom: the measurement
(measure_speed), the tensors of a shape (Lists, Embeddings), its rows (make_rows), their truth in float64, the table and
the chart. benchmarks/speed/loss.py adds other ways to the same losses.
"""

import math
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.benchmark import Timer

from gradret.bench import format_table, memory
from gradret.console import BAR_DELAY_S, GradretError, show_bar
from gradret.encoder.load import choose_device
from gradret.files import versions
from gradret.loss.functions import gaussian_loss, mix_losses
from gradret.loss.grades import prepare_grades
from gradret.loss.kernels import backend, describe_backend
from gradret.loss.retrieval import prepare_pairs, wasserstein_retrieval_loss
from gradret.settings import FitSettings
from gradret.train.memory import is_out_of_memory

TEMPERATURE = 0.05
BASELINE = "InfoNCE"
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


# What the kernels compute. Of the settings count the loss, order, targets and ground.
MIXTURES = {
    "default loss": FitSettings(),
    "transport of it": FitSettings(loss="wasserstein"),
    "W1": FitSettings(loss="wasserstein", order=1, targets="gain", ground="grade"),
    "W2": FitSettings(loss="wasserstein", order=2, targets="gain", ground="grade"),
}


@dataclass(frozen=True)
class Row:
    """A line of the benchmark.

    Attributes:
        name: unique on its shape.
        inputs: what the loss is differentiated in.
        loss: computes the scalar loss, None when the row is skipped.
        truth: what the loss must equal: one of MIXTURES, or a function as true_infonce; None where there is none.
        skipped: why it is not measured.
        external: whether another library computes it: where that fails or is wrong, the row is skipped alone.
    """

    name: str
    inputs: tuple[Tensor, ...] = ()
    loss: Callable[[], Tensor] | None = None
    truth: FitSettings | Callable | None = None
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
    shapes: Sequence[Sequence[int]],
    *,
    device: str | None = None,
    dtype: str = "float32",
    repeats: int = 30,
    every: bool = False,
    rivals: str | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Time every row on every shape, forward and backward, and measure its peak memory.

    Args:
        shapes: (B, N) each, lists and documents per list, or (B, N, D), queries, documents and dimensions.
        device: where the tensors are; None for the best there is.
        dtype: of scores and embeddings: "float32", "bfloat16" or "float16".
        repeats: samples of a row at most; slow rows take fewer, but three.
        every: whether rows beside the default loss and InfoNCE are measured.
        rivals: "module:function" that gives further rows, see make_rows.
        keep: called with what there is after each shape.

    Returns: a JSON-serialisable document. A row of "rows" holds its shape and name, the times of forward alone and of
        both in ms as medians with 20 and 80 percentiles, both_ms relative to InfoNCE's on that shape, peak memory in
        MiB above the inputs, its errors against float64, and, where it was not measured, the reason as "skipped".
    Raises: GradretError when a loss or gradient is not what float64 says; nothing on its shape is timed then.
    """
    began = time.monotonic()
    torch.set_num_threads(torch.get_num_threads())  # from here on fixed, whatever runs beside
    where = choose_device(device)
    if where.type == "cuda":
        where = torch.empty(0, device=where).device  # with its number
        torch.cuda.set_device(where)  # the timer's waiting and memory counts are the current device's
    result = {
        "versions": versions(),
        "path": backend(where),
        "kernels": describe_backend(where),
        "device": str(where),
        "dtype": dtype,
        "temperature": TEMPERATURE,
        "threads": torch.get_num_threads(),
        "peak_resolution_mib": memory.peak_resolution(where),
        "rows": [],
    }
    for shape in shapes:
        result["rows"] += measure_shape(shape, where, dtype, repeats, every, rivals)
        result["seconds"] = round(time.monotonic() - began, 1)
        keep(result)
    return result


def measure_shape(
    shape: Sequence[int],
    device: torch.device,
    dtype: str,
    repeats: int,
    every: bool,
    rivals: str | None,
) -> list[dict]:
    """The rows of one shape; see measure_speed."""
    where = name_shape(shape)
    try:
        workload = make_workload(shape, dtype, str(device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise GradretError(f"--shapes {where}: does not fit into memory; give a smaller one") from None
        raise
    truths: dict = {None: None}
    entries, measured = [], []
    rows = make_rows(workload, every, rivals)
    for row in show_bar(rows, desc=f"{where}: checking", unit="row", delay=BAR_DELAY_S, leave=False):
        entry = {"shape": list(shape), "dtype": dtype, "row": row.name, "skipped": row.skipped}
        later = ("forward_ms", "both_ms", "repeats", "times_infonce", "peak_mib", "peak_reason")
        entry |= dict.fromkeys((*later, "gradient_finite", "loss_error", "gradient_errors"))
        entries.append(entry)
        if row.skipped is None:
            if row.truth not in truths:
                truths[row.truth] = find_truth(workload, row.truth)
            step_s = _prepare(row, where, truths[row.truth], entry)
            if entry["skipped"] is None:
                measured.append((row, entry, step_s))
    truths.clear()  # on the largest shapes they are gigabytes, which rows may need
    rows = [row for row, _, _ in measured]
    times = time_in_turns(rows, [step_s for _, _, step_s in measured], repeats, where)
    if device.type == "cuda":
        peaks = ((memory.measure_cuda_peak(partial(run_once, row)), None) for row in rows)
    elif device.type == "cpu":
        arguments = {"shape": shape, "dtype": dtype, "rivals": rivals}
        peaks = memory.measure_cpu_peaks("gradret.bench.loss:make_call", [row.name for row in rows], arguments)
    else:
        peaks = ((None, f"PyTorch counts no peak on {device.type}") for _ in rows)
    bar = show_bar(peaks, total=len(rows), desc=f"{where}: memory", unit="row", delay=BAR_DELAY_S, leave=False)
    for (_, entry, _), taken, (peak, reason) in zip(measured, times, bar, strict=True):
        entry |= taken | {"peak_mib": peak, "peak_reason": reason}
    baseline = next((entry["both_ms"] for entry in entries if entry["row"] == BASELINE), None)
    for _, entry, _ in measured if baseline else ():
        entry["times_infonce"] = entry["both_ms"]["median"] / baseline["median"]
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
    if not loss_error <= (loss_limit if isinstance(row.truth, FitSettings) else OTHER_TOLERANCE):
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


def time_in_turns(rows: Sequence[Row], steps_s: Sequence[float], repeats: int, where: str = "") -> list[dict]:
    """Times of each row, whose step takes about steps_s: "forward_ms", "both_ms", and the number of "repeats".

    Rounds visit the rows one after the other, so that what slows the machine for a while slows all of them. Slow rows
    sit out some rounds.
    """
    timers = [(_make_timer(row.loss), _make_timer(partial(run_once, row))) for row in rows]
    fewest = min(FEWEST_REPEATS, repeats)
    every = [max(1, min(repeats // fewest, round(repeats * step_s / ROW_S))) for step_s in steps_s]
    samples: list[list[tuple[float, ...]]] = [[] for _ in rows]
    turns = range(repeats if rows else 0)
    for turn in show_bar(turns, desc=f"{where}: timing", unit="round", delay=BAR_DELAY_S, leave=False):
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

    def score(self) -> Tensor:
        """(B, N), as they are."""
        return self.scores

    def infonce(self) -> Tensor:
        """With one positive per list, as PyTorch computes it."""
        return nnf.cross_entropy(self.scores / TEMPERATURE, self.positive)


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

    def score(self) -> Tensor:
        """(B, N), of every query and document."""
        queries, documents = self.inputs
        return queries @ documents.T

    def infonce(self) -> Tensor:
        """With one positive per query, on a matrix of all scores; the division is that of the queries."""
        queries, documents = self.inputs
        return nnf.cross_entropy((queries / TEMPERATURE) @ documents.T, self.positive)


def make_workload(shape: Sequence[int], dtype: str, device: str) -> Lists | Embeddings:
    """Lists for a shape (B, N), embeddings for (B, N, D)."""
    return (Lists if len(shape) == 2 else Embeddings)(shape, dtype, device)


def make_rows(workload: Lists | Embeddings, every: bool = False, rivals: str | None = None) -> list[Row]:
    """The default loss with grades prepared once and raw, and InfoNCE; with `every` gradret's other losses.

    And those of `rivals`: "module:function" of the workload. It is given by name so that another process can make the
    same rows.
    """
    inputs, lists = workload.inputs, isinstance(workload, Lists)
    found = [Row(BASELINE, inputs, workload.infonce, true_infonce)]
    ways = {"": not lists} | ({", score matrix": False} if every and not lists else {})  # way -> whether it is fused
    for name in MIXTURES if every else ("default loss",):
        for (way, fused), raw in product(ways.items(), (False, True)):
            bound = bind_loss(workload, MIXTURES[name], raw=raw, fused=fused)
            found.append(Row(f"gradret {name}{way}{', raw grades' * raw}", inputs, bound, MIXTURES[name]))
    if every and lists:
        gaussian = partial(gaussian_loss, workload.scores, workload.grades, temperature=TEMPERATURE, targets="softmax")
        skipped = refuse_gaussian("singular values", workload.shape[0], workload)
        found.append(Row("gradret Gaussian", inputs, gaussian, true_gaussian, skipped))
    return [*found, *(pkgutil.resolve_name(rivals)(workload) if rivals else [])]


def bind_loss(workload: Lists | Embeddings, mixture: FitSettings, *, raw: bool, fused: bool) -> Callable[[], Tensor]:
    """The loss with scoring fused, or of a matrix of all scores; with grades as they are or prepared once."""
    axis = {"targets": mixture.targets, "ground": mixture.ground}
    options = {"order": mixture.order, "temperature": TEMPERATURE} | (axis if raw else {})
    if fused:
        graded = workload.graded if raw else prepare_pairs(*workload.graded, workload.shape[:2], **axis)
        return partial(wasserstein_retrieval_loss, *workload.inputs, graded, loss=mixture.loss, **options)
    prepared = None if raw else prepare_grades(workload.grades, **axis)
    return lambda: mix_losses(mixture.loss, workload.score(), prepared or workload.grades, **options)


def make_call(name: str, shape: Sequence[int], dtype: str, rivals: str | None) -> Callable:
    """One forward and backward of the row of this name, on the CPU, for memory.measure_cpu_peaks."""
    rows = make_rows(make_workload(shape, dtype, "cpu"), True, rivals)
    return partial(run_once, next(row for row in rows if row.name == name))


def gain_targets(grades: Tensor) -> Tensor:
    """(B, N): 2^grade - 1, over its sum along each row."""
    weights = torch.exp2(grades) - 1
    return weights / weights.sum(-1, keepdim=True)


# --- truth in float64. Each true_ function takes a block's scores (b, N), grades (b, N) and positives' columns (b,). It
# gives each list's loss (b,) and where its gradient is defined, None not to compare gradients.


def find_truth(workload: Lists | Embeddings, truth: FitSettings | Callable) -> Truth:
    """The mean of a truth over all lists, block by block; of a mixture also its gradients in the inputs."""
    device = "cpu" if workload.device.type == "mps" else workload.device  # which has no float64
    inputs = [x.detach().to(device, torch.float64).requires_grad_() for x in workload.inputs]
    grades, positive = workload.grades.to(device), workload.positive.to(device)
    mixed = isinstance(truth, FitSettings)
    compute = partial(true_mixture, truth) if mixed else truth
    B, N = workload.shape[:2]
    size = B if truth is true_gaussian else max(1, TRUTH_ELEMENTS // N)  # the Gaussians are fitted over the batch
    total, found = 0.0, []
    for block in (slice(begin, begin + size) for begin in range(0, B, size)):
        with torch.set_grad_enabled(mixed):
            scores = inputs[0][block] if len(inputs) == 1 else inputs[0][block] @ inputs[1].T
            values, defined = compute(scores, grades[block], positive[block])
        total += values.sum().item()
        if mixed:
            (values.sum() / B).backward()
            found.append(defined)
    return Truth(total / B, tuple(x.grad for x in inputs), torch.cat(found)) if found else Truth(total / B)


def true_mixture(mixture: FitSettings, scores: Tensor, grades: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Transport, by true_transport, and contrast, each times its weight; targets and ground are gain, grade or sqrt."""
    weights, logits, y = mixture.loss_weights, scores / TEMPERATURE, grades.double()
    places = {"grade": y, "sqrt": y.sqrt()}[mixture.ground]
    q = gain_targets(y) if mixture.targets == "gain" else y.sqrt() / y.sqrt().sum(-1, keepdim=True)
    value, defined = true_transport(torch.softmax(logits, -1), q, places, mixture.order)
    value = weights["wasserstein"] * value
    if "contrast" in weights:
        for grade in y.unique():
            lower = logits.masked_fill(y >= grade, -torch.inf).logsumexp(-1, keepdim=True)
            terms = (q * (torch.logaddexp(logits, lower) - logits)).masked_fill(y != grade, 0)
            value = value + weights["contrast"] * terms.sum(-1)
    return value, defined


def true_infonce(scores: Tensor, _: Tensor, positive: Tensor) -> tuple[Tensor, None]:
    """The positive's cross-entropy at the temperature."""
    return nnf.cross_entropy(scores / TEMPERATURE, positive, reduction="none"), None


def true_gaussian(scores: Tensor, grades: Tensor, _: Tensor) -> tuple[Tensor, None]:
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
    """One table per shape: forward and backward together, relative to InfoNCE, peak memory, and the larger error.

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
            both, ratio = row["both_ms"], row["times_infonce"]
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
        header = ["", "forward + backward ms [20-80 %]", "x InfoNCE", "peak MiB", "error"]
        title = f"{shape} {result['dtype']}, {result['threads']} threads"
        blocks.append("\n".join([title, format_table(header, cells), *notes]))
    return "\n\n".join(blocks)


def draw_speed(result: dict, path: Path) -> None:
    """A PNG of forward and backward together: a group of bars per shape, a log axis, whiskers from 20 to 80 %."""
    from matplotlib.figure import Figure

    groups = {shape: [row for row in rows if not row["skipped"]] for shape, rows in _group_by_shape(result).items()}
    heights = [max(1, len(rows)) for rows in groups.values()]
    figure = Figure(figsize=(8, 1 + 0.25 * sum(heights) + 0.7 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), height_ratios=heights, squeeze=False)
    for axes, (shape, rows) in zip(panels[:, 0], groups.items(), strict=True):
        places = range(len(rows))
        medians = [row["both_ms"]["median"] for row in rows]
        spread = [[abs(row["both_ms"][p] - row["both_ms"]["median"]) for row in rows] for p in ("p20", "p80")]
        colors = ["C0" if row["row"].startswith("gradret") else "C7" for row in rows]
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
