"""How this process was started: alone, or as one of several by torchrun. Loads no torch."""

import os

from gradret.errors import GradretError


def count_processes() -> int:
    """How many processes torchrun, or a launcher that sets the same variables, has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this is the process that shows and writes: the only one, or torchrun's first."""
    return int(os.environ.get("RANK", 0)) == 0


def require_one(what: str, instead: str = "") -> None:
    """Refuse what has no use for several processes. Raises: GradretError."""
    if count_processes() > 1:
        raise GradretError(f"{what} runs in one process; start it without torchrun{instead}")
