"""Training a run from its settings to the saved encoder, alone or with the processes that torchrun started."""

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from gradret.console import GradretError, Interrupted, ProcessLost, StopRequest, ToldElsewhere, say, show_bar
from gradret.data.lists import query_words
from gradret.data.sources import SOFTMAX_ADVICE, ListsSummary, MixedLists, check_lists, open_collection, parse_source
from gradret.distributed import Processes, join_processes
from gradret.encoder.load import choose_precision, load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import evaluate, parse_measures
from gradret.files import versions
from gradret.loss.kernels import describe_backend
from gradret.settings import AUTO, FitSettings, count_steps, learning_rate_at
from gradret.train.adapters import adapt, merge_adapters
from gradret.train.batches import Batch, draw_batches
from gradret.train.card import write_card
from gradret.train.gradients import Contexts, Objective
from gradret.train.memory import check_chunk, is_out_of_memory, measure_capacity
from gradret.train.mining import BM25, MinedLists, Miner, Mining, parse_mining
from gradret.train.run import (
    Board,
    Interpolation,
    Run,
    RunState,
    check_board,
    has_board,
    named_tensors,
    share_optimizer,
    step_name,
)

PROBED_TEXTS = 256  # a batch of more is tried on a few texts first: where a CPU's memory ends, nothing says so
SAMPLED_LISTS = 64  # whose lengths stand for all
ADAM_BYTES = 8  # a parameter, that the optimizer takes in its first step


class Job:
    """A run as one process sees it; loading makes no exchange with the other processes.

    Args:
        resume: whether the settings are those of a run that is gone on with.
    Attributes:
        lists, summary: all lists, and which of them are trained on.
        dev: the collection measured while training, or None.
        miner: finds hard negatives, or None.
        encoder: as it is trained, with adapters if there are any.
        content: fingerprints of what the settings name.
        steps, batch_lists, precision: as they come out of settings, lists and device.
    Raises: GradretError.
    """

    def __init__(self, settings: FitSettings, processes: Processes, device: str | None, *, resume: bool = False):
        self.settings, self.processes = settings, processes
        if settings.batch_lists % processes.size:
            raise GradretError(
                f"--batch-lists {settings.batch_lists} is not a multiple of the {processes.size} processes that share "
                f"it; {_advise_on_sharing(settings.batch_lists, processes.size, resume)}"
            )
        parse_measures([settings.dev_measure])
        mining = parse_mining(settings.mine) if settings.mine else None
        self.lists = MixedLists([parse_source(s) for s in settings.data], seed=settings.seed)
        self.dev = open_collection(parse_source(settings.dev)) if settings.dev else None
        measured = [open_collection(parse_source(s)) for s in settings.exclude] + ([self.dev] if self.dev else [])
        queries = {query_words(text) for collection in measured for text in collection.queries.values()}
        self.summary = check_lists(self.lists, refuse_negative=settings.weighs_from_zero, exclude=queries)
        check_grades(settings, self.summary, mining)
        self.miner = None
        if mining is not None:
            kept, best = self.summary.kept, self.summary.best
            self.miner = Miner(mining, self.lists, kept, kept[best > mining.grade])
        self.encoder = load_encoder(settings.model, device=device, weights=settings.weights, **settings.encoder_options)
        self.content = {"data": self.lists.fingerprint, "encoder": self.encoder.fingerprint()}
        if self.miner is not None:
            self.content["pool"] = self.miner.fingerprint
        adapt(self.encoder, settings)
        self.steps = count_steps(settings, len(self.summary.kept))
        self.batch_lists = min(settings.batch_lists, len(self.summary.kept))
        self.precision = choose_precision(settings.precision, self.encoder.device)

    def describe(self) -> str:
        """The data, for people."""
        text = str(self.summary)
        if self.lists.colliding_ids:
            text += (
                f"; {self.lists.colliding_ids} query ids stand for different queries in different sources: kept apart"
            )
        spared = 0 if self.miner is None else len(self.summary.kept) - len(self.miner.rows)
        if spared:
            grade = self.miner.mining.grade
            text += f"; {spared} lists get no mined passages: their best grade is no higher than {grade:g}"
        mining = None if self.miner is None else self.miner.mining
        if self.settings.contrasts and find_lowest_added(self.settings, self.summary, mining) > 0:
            bare = int((self.summary.worst > 0).sum())
            text += f"; {bare} lists have no contrast: all their grades are above 0" if bare else ""
        return text

    def settings_json(self) -> dict:
        """The settings as they are stored."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.settings).items()}

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step * self.batch_lists * self.settings.accumulate / len(self.summary.kept)

    def find_chunk(self, found: int | None = None, *, has_optimizer: bool = False) -> int:
        """Texts to hold in memory at once; 0 for all of a batch. Looks at the memory where that is in question.

        Args:
            found: what "auto" was before: it stays, because dropout depends on it, where it still fits.
            has_optimizer: whether the optimizer has taken its memory already.
        Raises: GradretError when a batch, or its chunks, do not fit, with a chunk to try.
        """
        chunk = self.settings.chunk
        if chunk is None and self.batch_lists * self._texts_per_list() <= PROBED_TEXTS * self.processes.size:
            return 0
        length, texts = self._measure_texts()
        share = math.ceil(texts / self.processes.size)
        trained = sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)
        optimizer_bytes = 0 if has_optimizer else ADAM_BYTES * trained
        capacity = measure_capacity(self.encoder, length, self.precision, optimizer_bytes, self.processes.local_size)
        if found is not None:
            check_chunk(capacity, share, found or None)
            return found
        if chunk == AUTO:
            if capacity is None:
                raise GradretError("--chunk auto: this system does not show its memory; give a number, as --chunk 32")
            check_chunk(capacity, 1, 1)
            return 0 if capacity.chunk >= share else capacity.chunk
        check_chunk(capacity, share, chunk)
        return chunk or 0

    def _texts_per_list(self) -> float:
        mined = min(self.miner.mining.k, self.miner.pool.document_count) if self.miner is not None else 0
        return 1 + self.summary.passages / len(self.summary.kept) + mined

    def _measure_texts(self) -> tuple[int, int]:
        """Tokens of the longest text, and how many so long texts take as much memory as those of a batch do."""
        every = math.ceil(len(self.summary.kept) / SAMPLED_LISTS)
        sample = [self.lists[i] for i in self.summary.kept[::every].tolist()]
        passages = [p.content for entry in sample for p in entry.passages]
        counts = [len(t) for t in self.encoder.tokenize([*passages, self.summary.longest], "document")]
        counts += [len(t) for t in self.encoder.tokenize([entry.query for entry in sample], "query")]
        longest = max(counts)
        if self.miner is not None and self.miner.mining.source is not None:  # other documents, perhaps longer ones
            longest = self.encoder.config.document_max_length
        mean = sum(counts) / len(counts)
        return longest, math.ceil(self.batch_lists * self._texts_per_list() * mean / longest)


def check_grades(settings: FitSettings, summary: ListsSummary, mining: Mining | None) -> None:
    """Whether the grades of lists, and of what is mined for them, suit the loss. Raises: GradretError."""
    if mining is not None and mining.grade < 0 and settings.weighs_from_zero:
        raise GradretError(
            f"mine '{settings.mine}': targets of 2^grade - 1 or sqrt(grade) give the negative grade "
            f"{mining.grade:g} nothing; use a grade of 0 or above, or {SOFTMAX_ADVICE}"
        )
    if mining is not None and mining.grade >= summary.highest:
        raise GradretError(
            f"mine '{settings.mine}': mined passages are negatives, and grade {mining.grade:g} is no lower than "
            f"the best of the lists, {summary.highest:g}; give a lower grade"
        )
    if mining is not None and settings.positive_from is not None and mining.grade >= settings.positive_from:
        raise GradretError(
            f"mine '{settings.mine}': mined passages are negatives, and grade {mining.grade:g} is no lower than "
            f"--positive-from {settings.positive_from:g}; give a lower grade"
        )
    lowest = min(summary.lowest, find_lowest_added(settings, summary, mining))
    if settings.contrasts and lowest > 0:
        where = "a batch of one list" if settings.in_batch else "without --in-batch a list"
        raise GradretError(
            f"loss {settings.loss}: contrast sets passages with target mass against those without, and {where} has "
            f"none here: the lowest grade is {lowest:g}; train with --in-batch and two lists a batch or more, or "
            "choose a --loss without contrast, such as wasserstein"
        )


def find_lowest_added(settings: FitSettings, summary: ListsSummary, mining: Mining | None) -> float:
    """The lowest grade of the passages that join every list from elsewhere; infinite where none do."""
    others = settings.in_batch and min(settings.batch_lists, len(summary.kept)) > 1
    mined = math.inf if mining is None else mining.grade
    return min(mined, settings.in_batch_grade or 0.0) if others else mined


def _advise_on_sharing(batch_lists: int, size: int, resume: bool) -> str:
    if not resume:
        return f"try --batch-lists {math.ceil(batch_lists / size) * size}"
    even = [n for n in range(1, batch_lists + 1) if batch_lists % n == 0]
    near = [*[n for n in even if n < size][-1:], *[n for n in even if n > size][:1]]  # a run keeps its batches
    return f"start {' or '.join(map(str, near))} of them" if near != [1] else "start one alone"


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and norm weights are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0)


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
