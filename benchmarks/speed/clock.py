"""What else the machine does while something is timed, and when the device has done what it was given."""

import os
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
