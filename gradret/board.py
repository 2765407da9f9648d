"""A run's curves for TensorBoard, DIR/tensorboard/: made anew at each start, from all that metrics.jsonl holds."""

import shutil
from pathlib import Path

from gradret.errors import GradretError
from gradret.files import read_steps

FOLDER = "tensorboard"
CURVES = {"metrics.jsonl": "train", "dev.jsonl": "dev"}


def check_board() -> None:
    """Whether TensorBoard's writer is installed. Raises: GradretError that says how to."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "tensorboard":
            raise
        raise GradretError("--tensorboard needs the package tensorboard: pip install 'gradret[tensorboard]'") from None


def has_board(directory: Path) -> bool:
    """Whether a run there has written curves before."""
    return (directory / FOLDER).is_dir()


class Board:
    """The curves of the run in `directory`, those of its earlier steps first."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # steps after the last checkpoint are done again
        self._writer = SummaryWriter(str(folder))
        for name in CURVES:
            for record in read_steps(directory / name):
                self.add(name, record)

    def add(self, name: str, record: dict) -> None:
        """A line of metrics.jsonl or dev.jsonl as points of curves."""
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(f"{CURVES[name]}/{key}", value, record["step"])
        if name == "dev.jsonl":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
