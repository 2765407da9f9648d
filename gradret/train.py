"""Training a run from its settings to the saved encoder, alone or with the processes that torchrun started."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradret.board import Board, check_board, has_board
from gradret.checkpoint import Run
from gradret.errors import GradretError
from gradret.job import Job
from gradret.processes import join_processes
from gradret.settings import FitSettings
from gradret.trainer import FitResult, Trainer


def fit(
    settings: FitSettings,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    tensorboard: bool = False,
) -> FitResult:
    """Train an encoder on ranking lists and save it in `out` as a sentence-transformers directory.

    Started by torchrun, the processes share every batch and do what one would do, to rounding.

    Args:
        settings: see FitSettings.
        out: the run's directory, see checkpoint.Run.
        resume: continue the unfinished run in `out`, if there is one; the number of processes may be another.
        device: None picks cuda (with several processes, that of the local rank), mps or cpu.
        progress: show a bar on a terminal.
        tensorboard: write the run's curves for TensorBoard, too, to `out`/tensorboard; a resumed run that has such a
            folder goes on with it.
    Raises: GradretError on bad data, a loss that is not finite, too little memory, a full disk, SIGINT or SIGTERM, or
        when another of the processes has ended.
    """
    began = time.monotonic()
    tensorboard = tensorboard or (resume and has_board(Path(out)))
    if tensorboard:
        check_board()
    with join_processes(device) as (processes, device):
        with processes.agree():
            job = Job(settings, processes, device, resume=resume)
        found = processes.gather_objects((job.content, job.precision))
        run = None
        with processes.agree():
            check_alike(found)
            if processes.is_first:
                run = Run(out, job.settings_json(), job.content, resume=resume, precision=job.precision)
        try:
            done = processes.broadcast(run.read_lines("metrics.jsonl") if run is not None and run.finished else None)
            trainer = None if done is not None else Trainer(job, run, Path(out), progress and processes.is_first)
            if run is not None and tensorboard:
                run.board = Board(run.directory)  # of the steps that are kept
            if trainer is None:
                last: dict[str, Any] = done[-1] if done else {"step": 0, "loss": None}
                return FitResult(Path(out), last["step"], last["loss"], None, None, 0.0, was_finished=True)
            trainer.loop()
            return trainer.finish(time.monotonic() - began)
        finally:
            if run is not None:
                run.close()


def check_alike(found: Sequence[tuple[dict[str, str], str]]) -> None:
    """Whether all processes train the same: each one's fingerprints and precision. Raises: GradretError."""
    contents, precisions = zip(*found, strict=True)
    if any(content != contents[0] for content in contents):
        raise GradretError("the processes found different data or encoders; give all of them the same files")
    if len(set(precisions)) > 1:
        raise GradretError(
            f"--precision auto is {' and '.join(sorted(set(precisions)))} in different processes; "
            "give --precision float32, or one that all their devices compute in"
        )
