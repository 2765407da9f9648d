"""Speed and peak memory of losses side by side: each is checked against float64, then all are timed in turns."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from gradret.bench.memory import measure_cpu_peaks, measure_cuda_peak, peak_resolution
from gradret.bench.workloads import (
    BASELINE,
    TEMPERATURE,
    OtherLoad,
    Row,
    Step,
    Truth,
    make_workload,
    measure_copy,
    measure_step,
    summarize,
    time_in_turns,
)
from gradret.console import GradretError, say
from gradret.files import versions
from gradret.loss.kernels import backend, describe_backend

DEFAULT_SHAPES = {
    "cpu": ((16, 64), (128, 1024), (512, 4096)),
    "cuda": ((512, 4096), (8192, 1024), (4096, 65536)),
}
LONGEST_STEP_S = 20.0
MOST_OTHER_LOAD = 0.1
# Highest errors against float64: of a loss, relative, and of the lists' gradient, relative to its norm. Half types
# round the gradient and, where scores are a matrix product, the scores.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-4, 2e-2), "float16": (1e-4, 2e-2)}
PRODUCT_TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (3e-2, 2e-1), "float16": (3e-2, 2e-1)}
# A gradient that is a sum over lists holds those near a tie, too.
SUM_TOLERANCE = 0.1
# InfoNCE divides scores of a half type in that type; eigenvalues near 0 cost the Gaussians half their digits.
OTHER_TOLERANCE = 3e-2
TIMES = ("forward_ms", "backward_ms", "both_ms", "wall_ms")
ERRORS = ("gradient_finite", "loss_error", "gradient_errors", "worst_list_gradient_error")


def measure_speed(
    shapes: Sequence[Sequence[int]] | None = None,
    *,
    device: torch.device,
    dtype: str = "float32",
    orders: Sequence[int] = (1, 2),
    repeats: int = 30,
    compiled: bool = False,
    retrieval: Sequence[int] | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Time every row on every shape, forward and backward, and measure its peak memory.

    Args:
        shapes: (B, N) each, lists and documents a list; None for the device's DEFAULT_SHAPES.
        device: where the tensors are.
        dtype: of scores and embeddings: "float32", "bfloat16" or "float16".
        orders: of W_p^p, from 1 and 2.
        repeats: samples of a row at most; slow rows take fewer, three at least.
        compiled: whether rows of torch.compile are measured too.
        retrieval: (B, N, D), queries, documents and dimensions of embeddings; None leaves that part out.
        keep: called with what there is after each shape.

    Returns: a JSON-serialisable document. A row of "rows" holds its shape and name, times in ms as medians with 20 and
        80 percentiles, both_ms relative to cross_entropy's on that shape, peak memory in MiB above the inputs, its
        errors against float64, and, where it was not measured, the reason as "skipped". On CUDA the times are the
        device's, with an empty cache; wall_ms is one step on an idle device by the host's clock; floor_fraction is the
        time to move a score, a gradient and one byte of grade for every element at copy_gb_s, over both_ms.
        "other_load" is the share of the processors' time that other processes took while a shape was timed.
    Raises: GradretError when a loss or gradient is not what float64 says; nothing on its shape is timed then. What
        torch.compile or POT has wrong is skipped alone.
    """
    began = time.monotonic()
    torch.set_num_threads(torch.get_num_threads())  # from here on fixed, whatever runs beside
    chosen = shapes or DEFAULT_SHAPES["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its number
        torch.cuda.set_device(device)  # events and memory counts are the current device's
    copy_gb_s = measure_copy(device) if device.type == "cuda" else None
    rows, other_load = [], {}
    result = {
        "versions": versions(),
        "path": backend(device),
        "kernels": describe_backend(device),
        "device": str(device),
        "dtype": dtype,
        "temperature": TEMPERATURE,
        "threads": torch.get_num_threads(),
        "copy_gb_s": copy_gb_s,
        "peak_resolution_mib": peak_resolution(device),
        "other_load": other_load,
        "rows": rows,
    }
    for shape in [*chosen, *([retrieval] if retrieval else [])]:
        found, share = measure_shape(
            shape, device=device, dtype=dtype, orders=orders, repeats=repeats, compiled=compiled
        )
        rows += _compare(found, shape, dtype, copy_gb_s)
        other_load[name_shape(shape)] = share
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
    compiled: bool,
) -> tuple[list[dict], float | None]:
    """The rows of one shape, (B, N) or (B, N, D), and what others took of the processors; see measure_speed."""
    where = name_shape(shape)
    say(f"{where}: checking against float64")
    workload = make_workload(shape, dtype, str(device))
    truths: dict[tuple, Truth | None] = {(None, None): None}
    entries, rows, steps = [], [], []
    for row in workload.rows(orders, compiled=compiled):
        entry = _new_entry(shape, dtype, row)
        entries.append(entry)
        if row.skipped is None:
            key = (row.truth, row.order)
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
    for entry, taken in zip(measured, samples, strict=True):
        entry |= summarize(taken)
    say(f"{where}: measuring peak memory")
    for entry, (peak, reason) in zip(measured, _measure_peaks(rows, shape, device, dtype, orders), strict=True):
        entry |= {"peak_mib": peak, "peak_reason": reason}
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


def _new_entry(shape: Sequence[int], dtype: str, row: Row) -> dict:
    entry = {"shape": list(shape), "dtype": dtype, "row": row.name, "order": row.order}
    later = (*TIMES, "repeats", "times_cross_entropy", "floor_fraction", "peak_mib", "peak_reason")
    return entry | dict.fromkeys((*later, *ERRORS)) | {"skipped": row.skipped}


def _prepare(row: Row, where: str, truth: Truth | None, entry: dict, device: torch.device) -> Step | None:
    """Check a row and time one step, or note in the entry why it is skipped."""
    began = time.perf_counter()
    try:
        entry |= check_row(row, truth)
        step = Step(time.perf_counter() - began, 0.0)
        if row.compiled or step.seconds < LONGEST_STEP_S:  # the first call of a compiled row compiles
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
        if not row.foreign:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        entry["skipped"] = " ".join(["failed:", *lines[:2]])
    return None


def _measure_peaks(rows, shape, device, dtype, orders) -> Iterator[tuple[float | None, str | None]]:
    if device.type == "cuda":
        return ((measure_cuda_peak(row), None) for row in rows)
    if device.type == "cpu":
        return measure_cpu_peaks(shape, dtype, orders, [row.name for row in rows])
    return ((None, f"PyTorch counts no peak on {device.type}") for _ in rows)


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
