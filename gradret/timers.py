"""Timers of a forward and backward, for the host and for CUDA, and rows timed in turns so that noise hits all alike."""

import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gradret.console import PATIENCE_S, show_bar
from gradret.workloads import Row

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
