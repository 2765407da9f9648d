"""Peak memory of a call above what exists before it, measured apart from time.

On CUDA by the allocator's own count. On a CPU by the peak of resident memory, call by call in a fresh process.
"""

import json
import mmap
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from gradret.train.memory import can_restart_peak, peak_bytes, resident_bytes, restart_peak

MIB = 1 << 20
LONGEST_S = 300  # a call that takes longer is given up
NO_WAY = "peak memory off CUDA is read from Linux's /proc/self, which this system does not offer"


def fresh_environment(**variables: str) -> dict[str, str]:
    """The environment for a process that must find this very package."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, **variables}


def peak_resolution(device: torch.device) -> float:
    """MiB below which a peak says nothing: Linux counts a process's pages in batches on each processor it runs on."""
    if device.type != "cpu":
        return 0.0
    batch = max(32, 2 * (os.cpu_count() or 1))  # pages, as in the kernel's lib/percpu_counter.c
    return batch * torch.get_num_threads() * mmap.PAGESIZE / MIB


def measure_cuda_peak(call: Callable[[], object]) -> float:
    """Peak MiB of a call on the current device, after an earlier one."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure_cpu_peaks(make: str, names: Sequence[str], arguments: dict) -> Iterator[tuple[float | None, str | None]]:
    """For each name the peak MiB of a call, or None and the reason.

    A process that has loaded gradret and run nothing is copied for every name. The copy makes the call and does it
    once, so that code, threads and compiled loops are there, and measures the second time.

    Args:
        make: "module:function" that makes the call from a name and the arguments, in the copy.
        arguments: JSON-serialisable.
    """
    if not can_restart_peak():
        yield from ((None, NO_WAY) for _ in names)
        return
    job = {"make": make, "names": list(names), "arguments": arguments, "threads": torch.get_num_threads()}
    # glibc then returns every freed block of a page at once: none is left over for the measured call to reuse unseen.
    environment = fresh_environment(MALLOC_MMAP_THRESHOLD_="4096", TORCHINDUCTOR_COMPILE_THREADS="1")
    with subprocess.Popen(
        [sys.executable, "-m", "gradret.bench.memory"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for _ in names:
                line = process.stdout.readline()
                yield tuple(json.loads(line)) if line else (None, "the measuring process ended before this row")
        finally:
            process.kill()


def main() -> None:
    """The measuring process: a job as JSON on stdin, one line of JSON per name on stdout."""
    job = json.load(sys.stdin)
    make = pkgutil.resolve_name(job["make"])
    for name in job["names"]:
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST_S)
            answers = os.dup(1)
            os.dup2(2, 1)  # whatever a call prints is no result
            torch.set_num_threads(job["threads"])
            call = make(name, **job["arguments"])
            call()
            restart_peak()
            before = resident_bytes()
            call()
            os.write(answers, f"{json.dumps([(peak_bytes() - before) / MIB, None])}\n".encode())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            late = status == -signal.SIGALRM
            reason = f"took more than {LONGEST_S} s" if late else f"the measuring process ended with {status}"
            print(json.dumps([None, reason]), flush=True)


if __name__ == "__main__":
    main()
