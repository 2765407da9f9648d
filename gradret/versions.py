"""What a run or a result depends on besides its settings: versions, commit, device."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers

from gradret import __version__


def versions() -> dict:
    """JSON-serialisable; `commit` is None where gradret does not run from a git checkout."""
    return {
        "gradret": __version__,
        "commit": _find_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _find_processor(),
        "threads": torch.get_num_threads(),
    }


def _find_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout that it does not trust
        return None


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
