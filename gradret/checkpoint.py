"""A training run's directory: its metrics, and checkpoints that are whole or not there.

DIR/gradret.json                whose it is, see claim.Claim
DIR/metrics.jsonl               a line a step; dev.jsonl a line a dev evaluation
DIR/tensorboard/                the same for TensorBoard, see board.Board
DIR/mined-0.npy                 mined passages as positions, until the run has finished
DIR/checkpoints/step-000000050  the last one alone: model, optimizer and best weights, state.json
DIR/config.json ...             once finished, the encoder as a sentence-transformers directory with its card
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradret.board import Board
from gradret.claim import Claim
from gradret.encoder import Encoder
from gradret.errors import GradretError
from gradret.files import drop_after, link_file, read_object, read_steps, replace_json, sync_file
from gradret.snapshot import get_optimizer, get_tensors, put_optimizer, put_tensors


@dataclass
class RunState:
    """Where a run stands: steps done, the best dev value and its step, the step last evaluated on dev.

    waited: dev measurements since the best one. chunk: of gradient caching, as found for "auto".
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    dev_step: int | None = None
    waited: int = 0
    chunk: int | None = None


class Run(Claim):
    """A run's directory, claimed, with what the run has done so far. See Claim for the arguments.

    Attributes:
        board: gets every line that is appended, too; None for none.
    """

    board: Board | None = None

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        super().close()

    def read_lines(self, name: str) -> list[dict]:
        """The lines of metrics.jsonl or dev.jsonl; [] before there are any."""
        return read_steps(self.directory / name)

    def restore(self, encoder: Encoder, optimizer: torch.optim.Optimizer) -> RunState:
        """Put the last checkpoint into encoder and optimizer; metrics written after it are dropped."""
        checkpoint = self.last_checkpoint
        state = RunState()
        if checkpoint is not None:
            found = read_object(checkpoint / "state.json")
            self._check_owner(checkpoint / "state.json", found.pop("run", None))
            try:
                state = RunState(**found)
                put_tensors(encoder, self._read_tensors(checkpoint / "model.safetensors"))
                put_optimizer(encoder, optimizer, self._read_tensors(checkpoint / "optimizer.safetensors"))
                if state.best_step is not None:  # needed at the end
                    with self._open_tensors(checkpoint / "best.safetensors"):
                        pass
            except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
                raise GradretError(
                    f"{checkpoint}: is damaged ({type(error).__name__}: {error}); put it back from a copy, or remove "
                    "it to start from the beginning"
                ) from error
        drop_after(self.directory / "metrics.jsonl", state.step)
        drop_after(self.directory / "dev.jsonl", -1 if state.dev_step is None else state.dev_step)
        return state

    def _read_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        with self._open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    @contextmanager
    def _open_tensors(self, path: Path) -> Iterator[Any]:
        with safe_open(path, "pt") as file:  # fails where the file is shorter than it says
            self._check_owner(path, (file.metadata() or {}).get("run"))
            yield file

    def _check_owner(self, path: Path, run: str | None) -> None:
        if run != self.name:
            raise GradretError(
                f"{path}: is missing, or belongs to a run with another model, loss, data or other settings; put this "
                "run's own checkpoint back, or remove its directory to start from the beginning"
            )

    def append(self, name: str, record: dict) -> None:
        """Append one JSON line to a file of the run."""
        try:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.board is not None:
                self.board.add(name, record)
        except OSError as error:
            raise self._write_error(error) from error

    def read_array(self, name: str) -> np.ndarray | None:
        """An array of the run, None if it is not there whole."""
        try:
            return np.load(self.directory / name)
        except (OSError, EOFError, ValueError):
            return None

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Keep an array until the run has finished."""
        part = self.directory / f"{name}.part"
        try:
            with open(part, "wb") as file:
                np.save(file, array)
            sync_file(part)
            os.replace(part, self.directory / name)
        except OSError as error:
            raise self._write_error(error) from error

    def save_checkpoint(self, encoder: Encoder, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        """Write a checkpoint beside the last one, then put it in its place in one rename.

        Raises: GradretError when it can not be written; the last one is then untouched.
        """
        previous = self.last_checkpoint
        target = self._checkpoints / step_name(state.step)
        part = target.with_suffix(".part")
        try:
            if previous == target:  # this step's weights are there; what changed is what dev made of them
                self._record_best(state, target, target)
                return
            part.mkdir(parents=True)
            owner = {"run": self.name}
            save_file(get_tensors(encoder), part / "model.safetensors", owner)
            save_file(get_optimizer(encoder, optimizer), part / "optimizer.safetensors", owner)
            self._record_best(state, part, previous)
            for file in part.iterdir():
                sync_file(file)
            os.rename(part, target)
            sync_file(self._checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise self._write_error(error) from error
        for stale in self._find_checkpoints():
            if stale != target:
                shutil.rmtree(stale)

    def _record_best(self, state: RunState, checkpoint: Path, previous: Path | None) -> None:
        if state.best_step is not None:
            source = (
                checkpoint / "model.safetensors" if state.best_step == state.step else previous / "best.safetensors"
            )
            if source != checkpoint / "best.safetensors":
                link_file(source, checkpoint / "best.safetensors")
        replace_json(checkpoint / "state.json", vars(state) | {"run": self.name})

    def _write_error(self, error: Exception) -> GradretError:
        last = self.last_checkpoint
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error)
        return GradretError(
            f"{self.directory}: could not be written ({reason}); {kept}: make room and run again with --resume"
        )

    def restore_best(self, encoder: Encoder, state: RunState) -> None:
        """Put the weights that were best on dev into the encoder, if dev was measured."""
        if state.best_step is not None and state.best_step != state.step:
            put_tensors(encoder, self._read_tensors(self.last_checkpoint / "best.safetensors"))

    def finish(self, encoder: Encoder, write_card: Callable[[Path], None]) -> None:
        """Save the encoder and its card, and drop the checkpoints."""
        try:
            encoder.save(self.directory)
            write_card(self.directory)
            for file in self.directory.rglob("*"):
                if file.is_file():
                    sync_file(file)
            self._record["finished"] = True
            self._write_record()
        except Exception as error:  # the tokenizer's library raises nothing narrower on a full disk
            raise self._write_error(error) from error
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        for stale in self.directory.glob("mined-*.npy*"):
            stale.unlink()


def step_name(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:09d}"
