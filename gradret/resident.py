"""Resident memory as Linux shows it to a process, and the environment of a fresh process in which it is measured."""

import os
from pathlib import Path

import gradret

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def is_peak_known() -> bool:
    """Whether a process's peak since it was started can be read."""
    return STATUS.exists()


def can_restart_peak() -> bool:
    """Whether the peak can be made to start again."""
    return os.access(CLEAR_REFS, os.W_OK)


def restart_peak() -> None:
    """The peak starts again from what is resident now."""
    CLEAR_REFS.write_text("5")


def peak_bytes() -> int:
    """The most that was resident. Not ru_maxrss: that starts at what the process which started this one held."""
    return read_field(STATUS, "VmHWM")


def resident_bytes() -> int:
    """What is resident now."""
    return read_field(STATUS, "VmRSS")


def read_field(path: str | os.PathLike, name: str, unit: int = 1024) -> int:
    """A number of bytes from a file of lines `name: number kB` or `name number`."""
    for line in Path(path).read_text().splitlines():
        words = line.replace(":", " ").split()
        if words and words[0] == name:
            return int(words[1]) * unit
    raise ValueError(f"{path}: has no {name}")


def fresh_environment(**variables: str) -> dict[str, str]:
    """The environment for a process that must find this very package."""
    package = str(Path(gradret.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, **variables}
