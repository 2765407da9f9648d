"""Every way in which a run ends before its time, with what is saved and told then."""

import signal
from pathlib import Path

from gradret.checkpoint import Run, RunState, step_name
from gradret.console import StopRequest
from gradret.encoder import Encoder
from gradret.errors import GradretError, Interrupted, ProcessLost, ToldElsewhere
from gradret.job import Job
from gradret.processes import Processes

# A signal to end waits so long for the end of a step: those who send one wait half a minute, torchrun and others.
PATIENCE_S = 8.0


class StepGivenUp(Exception):
    """A signal to end has waited for the end of a step for too long."""


class Endings:
    """What a trainer saves and raises where it can not go on. See trainer.Trainer for the attributes."""

    job: Job
    run: Run | None
    out: Path
    state: RunState
    stop: StopRequest
    encoder: Encoder
    processes: Processes

    def check(self) -> None:
        """Within a step, a search or mining: whether it is still worth while. Weights change at a step's end alone, so
        nothing done before is lost."""
        self.processes.check()
        if self.stop.waited_s > PATIENCE_S:
            raise StepGivenUp

    def save(self) -> None:
        if self.run is not None:
            self.run.save_checkpoint(self.encoder, self.optimizer, self.state)

    def not_finite(self, what: str, value: float, query_ids: list[str]) -> GradretError:
        shown = ", ".join(query_ids[:64]) + (", ..." if len(query_ids) > 64 else "")
        last = self.run.last_checkpoint if self.run is not None else None
        return self.told_once(
            f"step {self.state.step + 1}: {what} is {value}; lists: {shown}; last good checkpoint: "
            f"{last or 'none'}; look at these lists, or lower --learning-rate"
        )

    def told_once(self, message: str, kind: type[GradretError] = GradretError) -> GradretError:
        """What all processes raise at once, and only the first one tells."""
        return kind(message) if self.processes.is_first else ToldElsewhere(message)

    def interrupt(self, number: int) -> None:
        """Checkpoint and end."""
        with self.processes.agree():  # the others wait: once one has ended, torchrun gives the rest half a minute
            self.save_step()
        raise self.stopped(number)

    def end_by_signal(self) -> None:
        """Checkpoint and end without a word to the others, who may be anywhere."""
        self.save_step()
        if not self.processes.is_first:  # the first one may have heard nothing, and tell of a lost process alone
            name, here = signal.Signals(self.stop.signal).name, self.processes
            raise Interrupted(f"process {here.rank} of {here.size}: stopped by {name}")
        raise self.stopped(self.stop.signal)

    def stopped(self, number: int) -> GradretError:
        return self.told_once(
            f"stopped by {signal.Signals(number).name} after step {self.state.step} of {self.job.steps}, all saved; "
            f"continue with: {self.resume_command()}",
            Interrupted,
        )

    def end_without(self, error: ProcessLost) -> None:
        """Another process has ended: save what all had done by then, if this is the process that can."""
        if self.stop.waited_s > PATIENCE_S / 2:  # the other one heard the signal, too, and gave its step up
            self.end_by_signal()
        kept = "the last checkpoint, if there is one yet, holds what was saved"
        if self.run is not None:
            self.save_step()
            kept = f"all saved after step {self.state.step} of {self.job.steps}"
        raise GradretError(f"{error}; {kept}; continue with: {self.resume_command()}") from error

    def save_step(self) -> None:
        last = self.run.last_checkpoint if self.run is not None else None
        if last is None or last.name != step_name(self.state.step):
            self.save()

    def resume_command(self) -> str:
        return f"{self.processes.launcher} fit --out {self.out} --resume"
