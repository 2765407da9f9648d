"""The loop of a run: steps, dev evaluation, mining, checkpoints, and every way in which it can end."""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from tqdm import tqdm

from gradret.adapters import merge_adapters
from gradret.batches import Batch, draw_batches
from gradret.capacity import is_out_of_memory
from gradret.card import write_card
from gradret.checkpoint import Run, RunState
from gradret.console import StopRequest, say, show_bar
from gradret.contexts import Contexts
from gradret.endings import Endings, StepGivenUp
from gradret.errors import GradretError, ProcessLost
from gradret.evaluation import evaluate
from gradret.interpolation import Interpolation
from gradret.job import Job, make_optimizer
from gradret.kernels import describe_backend
from gradret.mining import MinedLists
from gradret.mining_spec import BM25, Mining
from gradret.objective import Objective
from gradret.settings import AUTO, learning_rate_at
from gradret.snapshot import named_tensors, share_optimizer
from gradret.versions import versions

# Texts encoded at once where all activations are kept: enough to be fast.
GROUPS = {"cpu": 8, "cuda": 64, "mps": 32}


@dataclass(frozen=True)
class FitResult:
    """What fit() leaves: the encoder's directory, steps done, the last loss, the best dev value and its step.

    was_finished: the run had already ended, and nothing was done.
    """

    out: Path
    steps: int
    loss: float | None
    dev: float | None
    dev_step: int | None
    seconds: float
    was_finished: bool = False


class Trainer(Endings):
    """One process of a run. `run` is the run's directory in the first process, None in the others.

    Raises: GradretError, see train.fit.
    """

    def __init__(self, job: Job, run: Run | None, out: Path, progress: bool):
        self.job, self.run, self.out, self.progress = job, run, out, progress
        self.settings, self.encoder, self.processes = job.settings, job.encoder, job.processes
        self.lists, self.mined_round = job.lists, None
        self.stop = StopRequest()
        self.optimizer = make_optimizer(job.encoder, self.settings.weight_decay)
        self.interpolation = Interpolation(job.encoder, self.settings.interpolate)
        self.state = self.restore()
        self.find_chunk()
        self.contexts = self.make_contexts()
        if run is not None:
            loss = self.settings.loss
            if loss == "wasserstein":
                loss += f" on {describe_backend(self.encoder.device)}"
            chunk = f", {self.state.chunk} passages at once" if self.state.chunk else ""
            shared = f" by {self.processes.size} processes" if self.processes.size > 1 else ""
            done = f"{self.state.step} of {job.steps} steps done"
            say(f"data: {job.describe()}")
            say(f"fit: {loss}, {done}, {job.batch_lists} lists a batch{chunk}{shared}, {out}")

    def restore(self) -> RunState:
        """The last checkpoint, from the first process to all."""
        state = None
        with self.processes.agree():
            if self.run is not None:
                state = self.run.restore(self.encoder, self.optimizer)
        state = self.processes.broadcast(state)
        if self.processes.size > 1 and state.step:
            self.processes.share_tensors([tensor.data for _, tensor in named_tensors(self.encoder)])
            share_optimizer(self.encoder, self.optimizer, self.processes)
        return state

    def find_chunk(self) -> None:
        """Settle how many texts are held at once."""
        found = self.state.chunk if self.settings.chunk == AUTO else None
        with self.processes.agree():
            chunk = self.job.find_chunk(found, has_optimizer=self.state.step > 0)
        self.state.chunk = min(filter(None, self.processes.gather_objects(chunk)), default=0)

    def make_contexts(self) -> Contexts:
        s, job, chunk = self.settings, self.job, self.state.chunk
        floor = None
        if s.in_batch:
            mined = job.miner.mining.grade if job.miner is not None else 0.0
            floor = min(0.0, job.summary.lowest, mined) if s.in_batch_grade is None else s.in_batch_grade
        group = chunk or GROUPS.get(self.encoder.device.type, GROUPS["cuda"])
        objective = Objective(s, floor)
        return Contexts(self.encoder, objective, job.precision, group, bool(chunk), self.processes, self.check)

    def loop(self) -> None:
        """Steps until the end."""
        state, steps = self.state, self.job.steps
        with (
            self.stop as stop,
            show_bar(shown=self.progress, total=steps, initial=state.step, desc="fit", unit="step") as bar,
        ):
            try:
                while True:
                    if self.dev_due() and state.dev_step != state.step and stop.signal is None:
                        self.measure_dev(stop)
                    if self.processes.add_number(stop.signal or 0):
                        with stop.uninterrupted():
                            self.interrupt(stop.signal or signal.SIGTERM)
                    if state.step == steps or self.is_patience_over():
                        return
                    # Cut short in one of several processes, it would leave the others waiting.
                    with stop.at_once() if self.processes.size == 1 else nullcontext():
                        self.mine()
                    if stop.signal is not None and self.processes.size == 1:
                        continue
                    self.train_step(bar)
                    if state.step % self.settings.checkpoint_every == 0 and state.step < steps and not self.dev_due():
                        self.save()
            except StepGivenUp:
                with stop.uninterrupted():
                    self.end_by_signal()
            except ProcessLost as error:
                with stop.uninterrupted():
                    self.end_without(error)

    def dev_due(self) -> bool:
        step = self.state.step
        return self.job.dev is not None and (step % self.settings.dev_every == 0 or step == self.job.steps)

    def is_patience_over(self) -> bool:
        return self.settings.patience is not None and self.state.waited >= self.settings.patience

    def mine(self) -> None:
        """Mine hard negatives where it is time to."""
        miner, state = self.job.miner, self.state
        if miner is None:
            return
        number = miner.mining.count_rounds(self.job.epoch_at(state.step))
        if number == self.mined_round:
            return
        name = f"mined-{number}.npy"
        found = self.processes.broadcast(self.run.read_array(name) if self.run is not None else None)
        if found is None:
            self.check_mined_anew(miner.mining, number, name)
            if self.processes.size > 1 and state.step:  # it may take long
                self.save_step()
            options = {"precision": self.job.precision, "processes": self.processes, "progress": self.progress}
            found = miner.mine(self.encoder, check=self.check, **options)
            if self.run is not None:
                self.run.write_array(name, found)
                mined = int((found >= 0).sum())
                few = "" if mined else "; lower skip, or mine from more documents"
                say(f"step {state.step}: {mined} passages mined, as grade {miner.mining.grade:g}{few}")
        self.lists = MinedLists(self.job.lists, miner.rows, miner.pool, found, miner.mining.grade)
        self.mined_round = number

    def check_mined_anew(self, mining: Mining, number: int, name: str) -> None:
        """Refuse to mine in the middle of a round, after what was mined at its start has gone from the directory."""
        step = self.state.step
        if step and mining.by != BM25 and mining.count_rounds(self.job.epoch_at(step - 1)) == number:
            raise self.told_once(
                f"{self.out / name}: is missing or damaged, and the encoder that mined it has been trained since: put "
                "it back from a copy, or start again in another --out"
            )

    def train_step(self, bar: tqdm) -> None:
        s, state, job = self.settings, self.state, self.job
        began = time.perf_counter()
        self.encoder.train()
        rate = learning_rate_at(state.step, job.steps, s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, passages, query_ids = 0.0, 0, []
        batches = draw_batches(
            self.lists,
            job.summary.kept,
            state.step,
            batch_lists=job.batch_lists,
            accumulate=s.accumulate,
            seed=s.seed,
            processes=self.processes,
        )
        for number, batch in enumerate(batches):
            # Dropout depends on seed and step alone, so a resumed run repeats it without saved generator states.
            total += self.add_gradients(batch, f"{s.seed}/{state.step}/{number}")
            passages += len(batch.documents)
            query_ids += batch.query_ids
            if not math.isfinite(total):
                raise self.not_finite("loss", total, batch.query_ids)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes.add_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, s.clip or math.inf).item()
        if not math.isfinite(norm):
            raise self.not_finite("gradient norm", norm, query_ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        step_ms = (time.perf_counter() - began) * 1000
        record = {"step": state.step, "epoch": round(job.epoch_at(state.step), 4), "loss": total, "learning_rate": rate}
        record |= {"gradient_norm": norm, "passages": passages, "step_ms": round(step_ms, 1)}
        if self.run is not None:
            self.run.append("metrics.jsonl", record)
        bar.set_postfix_str(
            f"loss {total:.4f}, lr {rate:.1e}, {passages / step_ms * 1000:.0f} passages/s", refresh=False
        )
        bar.update()

    def add_gradients(self, batch: Batch, seed: str) -> float:
        try:
            return self.contexts.add_gradients(batch, seed, 1 / self.settings.accumulate)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            share = math.ceil((len(batch.queries) + len(batch.documents)) / self.processes.size)
            held = min(self.state.chunk or share, share)
            raise GradretError(
                f"step {self.state.step + 1}: out of memory with {held} passages at once; try half: "
                f"{self.resume_command()} --chunk {max(1, held // 2)}"
            ) from error

    def measure_dev(self, stop: StopRequest) -> None:
        """Measure the dev collection, keep the model if it is the best, and checkpoint."""
        s, state, result = self.settings, self.state, None
        options = {
            "measures": [s.dev_measure],
            "precision": self.job.precision,
            "progress": self.progress,
            "check": self.check,
        }
        if self.processes.size > 1:  # cut short in one process, it would leave the others waiting: save what there is
            self.save()
        with self.interpolation.applied(self.encoder):
            if self.processes.size > 1:
                result = evaluate(self.encoder, self.job.dev, processes=self.processes, **options)
            else:
                with stop.at_once():
                    result = evaluate(self.encoder, self.job.dev, **options)
        if result is None:  # stopped: measured again when the run is resumed
            return
        (value,) = result.measures.values()  # under its canonical name, which may be another than the setting's
        state.dev_step, state.waited = state.step, state.waited + 1
        if state.best is None or value > state.best:
            state.best, state.best_step, state.waited = value, state.step, 0
        # The line first: without the checkpoint it is dropped and measured again, the other way round it is lost.
        if self.run is not None:
            self.run.append("dev.jsonl", {"step": state.step, s.dev_measure: value})
            say(f"step {state.step}: dev {s.dev_measure} {value:.4f}, best {state.best:.4f} at step {state.best_step}")
        self.save()

    def finish(self, seconds: float) -> FitResult:
        """Save the encoder; `seconds` is what the run has taken."""
        s, state, job, run = self.settings, self.state, self.job, self.run
        found: dict = {}
        with self.processes.agree():
            if run is not None:
                steps = run.read_lines("metrics.jsonl")
                found["loss"] = steps[-1]["loss"] if steps else None
                run.restore_best(self.encoder, state)
                self.interpolation.apply(self.encoder)
                merge_adapters(self.encoder)
                facts = {"data": str(job.summary), "steps": state.step, "dev": run.read_lines("dev.jsonl")}
                facts |= {"best_step": state.best_step, "encoder": self.encoder}
                facts["seconds"] = sum(line["step_ms"] for line in steps) / 1000  # also of what ran before a resume
                facts |= {"where": self.describe_place(), "versions": versions()}
                run.finish(self.encoder, lambda directory: write_card(directory, settings=s, **facts))
        loss = self.processes.broadcast(found.get("loss"))
        return FitResult(self.out, state.step, loss, state.best, state.best_step, seconds)

    def describe_place(self) -> str:
        size, where = self.processes.size, f"{self.encoder.device.type}, {self.job.precision}"
        return where if size == 1 else f"{size} processes, {where}"
