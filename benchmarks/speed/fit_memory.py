"""Peak memory of one training step of `gradret fit`, whole processes, each fresh.

On a CPU the peak of resident memory, Python, PyTorch and the weights included; on CUDA what the allocator held at most.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gradret.bench.memory import MIB, fresh_environment
from gradret.console import GradretError, count_of, say
from gradret.settings import FitSettings
from gradret.train.loop import fit
from gradret.train.memory import STATUS, peak_bytes

LONGEST_S = 3600  # a run that takes longer is given up


def check_memory(device: torch.device) -> None:
    """Refuse early what could not be measured. Raises: GradretError."""
    if device.type == "mps" or (device.type == "cpu" and not STATUS.exists()):
        raise GradretError(
            f"--memory: peak memory on {device.type} is not measured on this system: on a CPU it is read from Linux's "
            "/proc, on CUDA from PyTorch's allocator; leave --memory out"
        )


def measure_memory(
    settings: FitSettings, sizes: Sequence[int], chunk: int, device: str, folder: Path
) -> list[dict[str, float | None]]:
    """Peak memory of a run of one step with so many lists per batch, each in a process of its own.

    Args:
        settings: whose data holds max(sizes) lists at least; batch_lists, chunk and max_steps are replaced.
        sizes: lists per batch; the first is measured without gradient caching, too, and first.
        chunk: passages that gradient caching encodes at once.
        folder: an empty one, for the runs.
    Returns: lists, chunk, peak_mib, and the ratio of that to the first's.
    Raises: GradretError with the last line of a run that failed.
    """
    rows = []
    for number, (lists, cached) in enumerate([(sizes[0], None), *((size, chunk) for size in sizes)]):
        say(f"memory: {count_of(lists, 'list')}" + (f", chunks of {cached}" if cached else ""))
        run = replace(settings, batch_lists=lists, chunk=cached, max_steps=1)
        peak = _measure_run(run, device, folder / f"memory-{number}")
        rows.append({"lists": lists, "chunk": cached, "peak_mib": round(peak, 1)})
    return [row | {"ratio": row["peak_mib"] / rows[0]["peak_mib"]} for row in rows]


def _measure_run(settings: FitSettings, device: str, out: Path) -> float:
    request = {"settings": asdict(settings), "device": device, "out": str(out), "threads": torch.get_num_threads()}
    step = f"--memory: a step of {count_of(settings.batch_lists, 'list')}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.fit_memory"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            env=fresh_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GradretError(f"{step} took more than {LONGEST_S} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise GradretError(f"{step} failed ({reason}); take smaller sizes")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The measured process: a request as JSON on stdin, its peak in MiB on stdout. Raises: SystemExit without one."""
    try:
        request = json.load(sys.stdin)
    except ValueError:
        sys.exit("expected a request as JSON on stdin; start instead: python -m benchmarks.speed.fit --memory SIZES")
    torch.set_num_threads(request["threads"])
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in request["settings"].items()}
    fit(FitSettings(**settings), request["out"], device=request["device"], progress=False)
    if torch.device(request["device"]).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_bytes()
    print(json.dumps(peak / MIB))


if __name__ == "__main__":
    main()
