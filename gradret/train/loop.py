"""The whole life of a training run, from its settings to the saved encoder, alone or in torchrun's processes.

`fit` is the story in short: `Inputs` reads what the settings name, `RunDirectory` claims the directory, `Trainer`
restores the last checkpoint, finds out what fits into memory and makes the steps. A run ends finished, or with one line
that says what is saved and how to go on: after SIGINT or SIGTERM, out of memory, with a loss or gradient that is not
finite, with a full disk, or when another of its processes has ended. A second signal, more than two seconds after the
first, ends it without that line, but never while it saves. Killed at any moment, it loses nothing that was done before
its last checkpoint.
"""

import math
import shlex
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn

from gradret.console import (
    GivenUp,
    GradretError,
    Interrupted,
    ProcessLost,
    StopRequest,
    ToldElsewhere,
    count_of,
    say,
    show_bar,
)
from gradret.data.collections import Collection
from gradret.data.lists import RankingList, query_words
from gradret.data.sources import SOFTMAX_ADVICE, ListsSummary, MixedLists, check_lists, open_collection, parse_source
from gradret.distributed import Processes, join_processes
from gradret.encoder.load import choose_precision, load_encoder
from gradret.evaluation.measures import evaluate, parse_measures
from gradret.files import versions
from gradret.loss.kernels import describe_backend
from gradret.loss.one_pass import ONE_PASS
from gradret.settings import AUTO, FitSettings
from gradret.train.batches import Batch, draw_batches
from gradret.train.card import write_card
from gradret.train.gradients import BatchGradients, Objective
from gradret.train.interpolation import (
    MEASURE,
    SHARES,
    choose_share,
    copy_trained,
    interpolate,
    interpolated,
    make_held_out,
    measure_share,
)
from gradret.train.memory import adapt, check_chunk, is_out_of_memory, measure_capacity, merge_adapters
from gradret.train.mining import BM25, MinedLists, Miner, Mining, parse_mining
from gradret.train.run_directory import BOARD, DEV, METRICS, RunDirectory, RunState, import_board, share_restored

# So long a signal to end waits for the end of a step: those who send one wait half a minute, torchrun and others.
STEP_GRACE_S = 8.0
PROBED_TEXTS = 256  # a batch of more is tried on a few texts first: where a CPU's memory ends, nothing says so
SAMPLED_LISTS = 64  # whose lengths stand for all
ADAM_BYTES = 8  # per parameter, that the optimizer takes in its first step
LEAST_EPOCHS, MOST_EPOCHS, LEAST_READ = 2, 8, 320  # without --epochs: passes over the lists, and lists read in them
GROUPS = {"cpu": 8, "cuda": 64, "mps": 32}  # texts encoded at once where all activations are kept: enough to be fast


@dataclass(frozen=True)
class FitResult:
    """What fit() leaves: the encoder's directory, steps done, the last loss, the best dev value and its step.

    share: of the way from the encoder's own weights to the trained ones, which was saved. was_finished: the run had
    already ended, and nothing was done.
    """

    out: Path
    steps: int
    loss: float | None
    dev: float | None
    dev_step: int | None
    seconds: float
    share: float
    was_finished: bool = False


def fit(
    settings: FitSettings,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    processes: Processes | None = None,
) -> FitResult:
    """Train an encoder on ranking lists and save it in `out` as a sentence-transformers directory.

    Started by torchrun, the processes share every batch and do what one would do, to rounding.

    Args:
        settings: see FitSettings.
        out: the run's directory, see train/run_directory.
        resume: continue the unfinished run in `out`, if there is one; the number of processes may be another.
        device: None picks cuda (with several processes, that of the local rank), mps or cpu.
        progress: show a bar on a terminal.
        tensorboard: write the run's curves for TensorBoard, too, to `out`/tensorboard; a resumed run that has such a
            folder goes on with it.
        processes: that have joined already, each with its device; None: those that torchrun started.
    Raises: GradretError on bad data, a loss that is not finite, too little memory, a full disk, SIGINT or SIGTERM, or
        when another of the processes has ended; TypeError for settings or a directory that are none.
    """
    if not isinstance(settings, FitSettings) or not isinstance(out, str | Path):
        raise TypeError(f"expected FitSettings and a directory, got {settings!r:.100} and {out!r:.100}")
    with join_processes(device) if processes is None else nullcontext((processes, device)) as (processes, device):
        began, out = time.monotonic(), Path(out)
        tensorboard = tensorboard or (resume and (out / BOARD).is_dir())
        with processes.agree():
            if tensorboard:
                import_board()
            inputs = Inputs(settings, processes, device, resume=resume)
        found = processes.gather_objects((inputs.content, inputs.precision))
        directory = None
        with processes.agree():
            check_alike(found)
            if processes.is_first:
                directory = RunDirectory(out, inputs.settings, inputs.content, resume=resume)
        try:
            done = read_result(directory, settings) if directory is not None and directory.finished else None
            done = processes.broadcast(done)
            trainer = None if done is not None else Trainer(inputs, directory, out, progress and processes.is_first)
            if directory is not None and tensorboard:
                directory.open_board()  # of the steps that the trainer has kept
            if trainer is None:
                return cast(FitResult, done)
            with trainer.stop:
                trainer.loop()
                with trainer.stop.uninterrupted():  # all steps are done, and it takes a moment
                    return trainer.finish(began)
        finally:
            if directory is not None:
                directory.close()


def read_result(directory: RunDirectory, settings: FitSettings) -> FitResult:
    """What a finished run left, as its files tell it."""
    last: dict[str, Any] = (directory.read_lines(METRICS) or [{"step": 0, "loss": None}])[-1]
    measured = [(line[settings.dev_measure], line["step"]) for line in directory.read_lines(DEV)]
    dev, dev_step = max(measured, key=lambda pair: pair[0], default=(None, None))  # the first of equals, as in training
    share = directory.share if settings.interpolate == AUTO else cast(float, settings.interpolate)
    return FitResult(directory.directory, last["step"], last["loss"], dev, dev_step, 0.0, share, was_finished=True)


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


class Inputs:
    """What a run is made from, as one process reads it, without an exchange with the others.

    Args:
        resume: whether the settings are those of a run that is gone on with.
    Attributes:
        lists, summary: all lists, and which of them are trained on.
        held_out: those that choose the share of the way that is saved; None where there are none.
        dev: the collection measured while training, or None.
        mining, miner: which hard negatives, and what finds them; or None.
        encoder: as it is trained, with adapters if there are any.
        content: fingerprints of what the settings name.
        steps, batch_lists, precision: as they come out of settings, lists and device.
    Raises: GradretError.
    """

    def __init__(self, settings: FitSettings, processes: Processes, device: str | None, *, resume: bool = False):
        self.settings, self.processes = settings, processes
        if settings.batch_lists % processes.size:
            even = math.ceil(settings.batch_lists / processes.size) * processes.size
            raise GradretError(
                f"--batch-lists {settings.batch_lists} is not a multiple of the {processes.size} processes that share "
                f"it; {'start a number of them that divides it' if resume else f'try --batch-lists {even}'}"
            )
        parse_measures([settings.dev_measure])
        self.mining = mining = parse_mining(settings.mine) if settings.mine else None
        self.dev = open_collection(parse_source(settings.dev)) if settings.dev else None
        measured = [open_collection(parse_source(s)) for s in settings.exclude] + ([self.dev] if self.dev else [])
        self.lists, self.summary = open_lists(settings, measured)
        check_loss_suits(settings, self.summary, mining)
        self.held_out = make_held_out(self.lists, self.summary)
        self.miner = None
        if mining is not None:
            kept, best = self.summary.kept, self.summary.best
            self.miner = Miner(mining, self.lists, kept, kept[best > mining.grade])
        self.encoder = load_encoder(settings.model, device=device, weights=settings.weights, **settings.encoder_options)
        self.content = {"data": self.lists.fingerprint, "encoder": self.encoder.fingerprint()}
        if self.miner is not None:
            self.content["pool"] = self.miner.pool.fingerprint
        adapt(self.encoder, settings)
        self.steps = count_steps(settings, len(self.summary.kept))
        self.batch_lists = min(settings.batch_lists, len(self.summary.kept))
        self.precision = choose_precision(settings.precision, self.encoder.device)
        self.settings = replace(settings, precision=self.precision)  # a run goes on in it on any machine

    def describe(self) -> str:
        """The data, for people."""
        text, mining = str(self.summary), self.mining
        if self.lists.colliding_ids:
            ids = count_of(self.lists.colliding_ids, "query id")
            text += f"; kept apart: {ids} of different queries in different sources"
        spared = len(self.summary.kept) - len(self.miner.rows) if self.miner is not None else 0
        if mining is not None and spared:
            text += f"; no mined passages: {count_of(spared, 'list')} without a grade above {mining.grade:g}"
        return text

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step * self.batch_lists * self.settings.accumulate / len(self.summary.kept)

    def find_chunk(self, found: int | None = None, *, has_optimizer: bool = False) -> int:
        """Texts to hold in memory at once; 0 for all of a batch. Looks at the memory where that is in question.

        Args:
            found: what "auto" was before: it stays, because dropout depends on it, where it still fits.
            has_optimizer: whether the optimizer has taken its memory already.
        Raises: GradretError with a chunk to try where a batch, or its chunks, do not fit.
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
        if isinstance(chunk, str):
            if capacity is None:
                raise GradretError("--chunk auto: this system does not show its memory; give a number, as --chunk 32")
            check_chunk(capacity, 1, 1)
            return 0 if capacity.chunk >= share else capacity.chunk
        check_chunk(capacity, share, chunk)
        return chunk or 0

    def _texts_per_list(self) -> float:
        mined = min(self.mining.k, self.miner.pool.document_count) if self.mining and self.miner else 0
        return 1 + self.summary.passages / len(self.summary.kept) + mined

    def _measure_texts(self) -> tuple[int, int]:
        """Tokens of the longest text, and how many so long texts take as much memory as those of a batch do."""
        every = math.ceil(len(self.summary.kept) / SAMPLED_LISTS)
        sample = [self.lists[i] for i in self.summary.kept[::every].tolist()]
        passages = [p.content for entry in sample for p in entry.passages]
        counts = [len(t) for t in self.encoder.tokenize([*passages, self.summary.longest], "document")]
        counts += [len(t) for t in self.encoder.tokenize([entry.query for entry in sample], "query")]
        longest = max(counts)
        if self.mining is not None and self.mining.source is not None:  # other documents, perhaps longer ones
            longest = self.encoder.config.document_max_length
        mean = sum(counts) / len(counts)
        return longest, math.ceil(self.batch_lists * self._texts_per_list() * mean / longest)


def open_lists(settings: FitSettings, measured: Iterable[Collection]) -> tuple[MixedLists, ListsSummary]:
    """All lists of the settings' data, and which are trained on: none with a query of what is measured."""
    lists = MixedLists([parse_source(source) for source in settings.data], seed=settings.seed)
    queries = {query_words(text) for collection in measured for text in collection.queries.values()}
    options = {"refuse_negative": settings.weighs_from_zero, "hold_out": settings.interpolate == AUTO}
    return lists, check_lists(lists, exclude=queries, **options)


def count_epochs(settings: FitSettings, lists: int) -> float:
    """Passes over the lists. Few are read more often, or there would be hardly a step."""
    if settings.epochs == AUTO:
        return min(MOST_EPOCHS, max(LEAST_EPOCHS, LEAST_READ / lists))
    return cast(float, settings.epochs)


def count_steps(settings: FitSettings, lists: int) -> int:
    """Optimizer steps of a run: every list at least as often as there are epochs, the last step filled up."""
    size = min(settings.batch_lists, lists) * settings.accumulate
    steps = max(1, math.ceil(count_epochs(settings, lists) * lists / size - 1e-9))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_at(step: int, steps: int, settings: FitSettings) -> float:
    """The learning rate of step `step` (from 0) out of `steps`."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    share = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * share


def check_loss_suits(settings: FitSettings, summary: ListsSummary, mining: Mining | None) -> None:
    """Whether the grades of lists, and of what is mined for them, suit the loss. Raises: GradretError."""
    positive = settings.positive_from
    if mining is not None:
        here = f"mine '{settings.mine}'"
        if mining.grade < 0 and settings.weighs_from_zero:
            raise GradretError(
                f"{here}: targets of 2^grade - 1 or sqrt(grade) give the negative grade {mining.grade:g} nothing; "
                f"use a grade of 0 or above, or {SOFTMAX_ADVICE}"
            )
        for bound, what in ((summary.highest, "the best of the lists,"), (positive, "--positive-from")):
            if bound is not None and mining.grade >= bound:
                raise GradretError(
                    f"{here}: mined passages are negatives, and grade {mining.grade:g} is no lower than {what} "
                    f"{bound:g}; give a lower grade"
                )
    if positive is not None and positive > summary.highest:
        raise GradretError(
            f"loss {settings.loss}: no passage has grade {positive:g} or above; the highest is {summary.highest:g}; "
            "lower --positive-from"
        )
    lowest = summary.lowest if mining is None else min(summary.lowest, mining.grade)
    if settings.in_batch and min(settings.batch_lists, len(summary.kept)) > 1:
        lowest = min(lowest, settings.in_batch_grade or 0.0)
    if summary.highest <= (max(lowest, 0) if settings.weighs_from_zero else lowest):
        raise GradretError(
            f"loss {settings.loss}: no passage is more relevant than another, the highest grade is "
            f"{summary.highest:g}; give lists with other grades, or map them (SOURCE?grades=OLD:NEW,...)"
        )


class Trainer:
    """One process of a run: from the last checkpoint, if there is one, to the saved encoder.

    Args:
        directory: the run's, in the first process; None in the others, which write nothing.
        out: how the user named it.
    Raises: GradretError, see fit.
    """

    def __init__(self, inputs: Inputs, directory: RunDirectory | None, out: Path, progress: bool):
        self.inputs, self.directory, self.out, self.progress = inputs, directory, out, progress
        self.settings, self.encoder, self.processes = inputs.settings, inputs.encoder, inputs.processes
        self.lists: Sequence[RankingList] = inputs.lists
        self.mined_round: int | None = None
        self.stop = StopRequest()
        self.start_weights = copy_trained(self.encoder) if self.settings.interpolate != 1 else {}
        self.held_out_means: dict[float, float] = {}  # share -> nDCG@10, as last measured
        self.optimizer = make_optimizer(self.encoder, self.settings.weight_decay)
        self.state = self.restore()
        self.state.chunk = self.agree_on_chunk()
        self.gradients = self.make_gradients()
        if directory is not None:
            loss = self.settings.loss
            if self.settings.loss_weights.keys() & {*ONE_PASS, "infonce"}:  # a contrast, too
                loss += f" on {describe_backend(self.encoder.device)}"
            chunk = f", {self.state.chunk} texts at once" if self.state.chunk else ""
            shared = f" by {self.processes.size} processes" if self.processes.size > 1 else ""
            done = f"{self.state.step} of {inputs.steps} steps done"
            say(f"data: {inputs.describe()}")
            say(f"fit: {loss}, {done}, {count_of(inputs.batch_lists, 'list')} per batch{chunk}{shared}, {out}")

    def restore(self) -> RunState:
        """The last checkpoint, from the first process to all."""
        found = None
        with self.processes.agree():
            if self.directory is not None:
                found = self.directory.restore(self.encoder, self.optimizer)
        state: RunState = self.processes.broadcast(found)
        if self.settings.interpolate != AUTO:  # what an earlier version has written does not say it
            state.share = cast(float, self.settings.interpolate)
        if self.processes.size > 1 and state.step:
            share_restored(self.encoder, self.optimizer, self.processes)
        return state

    def agree_on_chunk(self) -> int:
        """How many texts are held at once, the same in all processes; 0 for all."""
        found = self.state.chunk if self.settings.chunk == AUTO else None
        with self.processes.agree():
            chunk = self.inputs.find_chunk(found, has_optimizer=self.state.step > 0)
        return min(filter(None, self.processes.gather_objects(chunk)), default=0)

    def make_gradients(self) -> BatchGradients:
        s, inputs, chunk = self.settings, self.inputs, self.state.chunk
        default_grade = None
        if s.in_batch:
            mined = inputs.mining.grade if inputs.mining is not None else 0.0
            default_grade = min(0.0, inputs.summary.lowest, mined) if s.in_batch_grade is None else s.in_batch_grade
        objective = Objective(s, default_grade)
        group = chunk or GROUPS.get(self.encoder.device.type, GROUPS["cuda"])
        return BatchGradients(self.encoder, objective, inputs.precision, group, bool(chunk), self.processes)

    def loop(self) -> None:
        state, steps, patience = self.state, self.inputs.steps, self.settings.patience
        with show_bar(shown=self.progress, total=steps, initial=state.step, desc="fit", unit="step") as bar:
            try:
                while True:
                    # First of all, and summed: all processes must stop before the same exchange, whoever heard first.
                    if self.processes.sum_number(self.stop.signal or 0):
                        self.end_together()
                    if self.is_dev_due() and state.dev_step != state.step:
                        self.measure_dev()
                    if state.step == steps or (patience is not None and state.waited >= patience):
                        if self.inputs.dev is None:
                            state.share, state.held_out_means = self.find_share()
                        return
                    self.mine()
                    self.train_step(bar)
                    due = state.step % self.settings.checkpoint_every == 0 and state.step < steps
                    if due and not self.is_dev_due():  # which saves after it has measured
                        self.save_step()
            except (GivenUp, ProcessLost) as error:
                self.end_alone(error)

    def is_dev_due(self) -> bool:
        """Whether this step's weights are measured on dev: every so many steps, and at the end."""
        step = self.state.step
        return self.inputs.dev is not None and (step % self.settings.dev_every == 0 or step == self.inputs.steps)

    def train_step(self, bar: Any) -> None:
        """Learning rate, batches, gradients, their sum over the processes, clipping, the optimizer, a line of metrics.

        The weights change in optimizer.step() alone. Whatever ends a step before that leaves the run where it was.
        """
        s, state, inputs = self.settings, self.state, self.inputs
        began = time.perf_counter()
        self.encoder.train()
        rate = learning_rate_at(state.step, inputs.steps, s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss, passages, query_ids = 0.0, 0, []
        with self.stop.give_up(STEP_GRACE_S):
            batches = draw_batches(
                self.lists,
                inputs.summary.kept,
                state.step,
                batch_lists=inputs.batch_lists,
                accumulate=s.accumulate,
                seed=s.seed,
                in_batch=s.in_batch,
            )
            for number, batch in enumerate(batches):
                # Dropout depends on seed and step alone, so a resumed run repeats it without saved generator states.
                loss += self.differentiate(batch, f"{s.seed}/{state.step}/{number}")
                passages += len(batch.documents)
                query_ids += batch.query_ids
                if not math.isfinite(loss):
                    raise self.not_finite("loss", loss, batch.query_ids)
            self.processes.sum_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, s.clip or math.inf).item()  # waits for the device
        if not math.isfinite(norm):
            raise self.not_finite("gradient norm", norm, query_ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        step_ms = (time.perf_counter() - began) * 1000
        record = {"step": state.step, "epoch": round(inputs.epoch_at(state.step), 4), "loss": loss}
        record |= {"learning_rate": rate, "gradient_norm": norm, "passages": passages, "step_ms": round(step_ms, 1)}
        if self.directory is not None:
            self.directory.append(METRICS, record)
        bar.set_postfix_str(
            f"loss {loss:.4f}, lr {rate:.1e}, {passages / step_ms * 1000:.0f} passages/s", refresh=False
        )
        bar.update()

    def differentiate(self, batch: Batch, seed: str) -> float:
        """Add a batch's gradient to the parameters and return its loss; out of memory, say which chunk to try."""
        try:
            return self.gradients.accumulate(batch, seed, 1 / self.settings.accumulate)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            share = math.ceil((len(batch.queries) + len(batch.documents)) / self.processes.size)
            held = min(self.state.chunk or share, share)
            raise GradretError(
                f"step {self.state.step + 1}: out of memory with {held} texts at once; try half: "
                f"{self.resume_command()} --chunk {max(1, held // 2)}"
            ) from error

    @property
    def search_grace_s(self) -> float:
        """So long a signal waits for the end of a search; one of several processes would leave the others waiting."""
        return STEP_GRACE_S if self.processes.size > 1 else 0.0

    def find_share(self) -> tuple[float, dict[str, float]]:
        """The share of the way that is to be saved, and the means of the held-out lists at each: share -> nDCG@10."""
        given, inputs = self.settings.interpolate, self.inputs
        if given != AUTO:
            return cast(float, given), {}
        if inputs.held_out is None or self.state.step == 0:
            return SHARES[0], {}
        self.save_step()  # it may take long
        means = self.held_out_means
        for share in (*SHARES, *(() if 0.0 in means else (0.0,))):  # the encoder's own weights stay what they were
            means[share] = measure_share(
                self.encoder,
                self.start_weights,
                share,
                inputs.held_out,
                precision=inputs.precision,
                processes=self.processes,
                give_up=partial(self.stop.give_up, self.search_grace_s),
            )
        return choose_share(means), {f"{share:g}": means[share] for share in sorted(means)}

    def measure_dev(self) -> None:
        """Measure the dev collection, keep the model if it is the best, and checkpoint."""
        s, state = self.settings, self.state
        assert self.inputs.dev is not None
        if self.processes.size > 1:  # it may take long, and torchrun kills those that do not end in time
            self.save_step()
        share, means = self.find_share()
        with interpolated(self.encoder, self.start_weights, share), self.stop.give_up(self.search_grace_s):
            result = evaluate(
                self.encoder,
                self.inputs.dev,
                measures=[s.dev_measure],
                precision=self.inputs.precision,
                progress=self.progress,
                processes=self.processes,
            )
        (value,) = result.measures.values()  # under its canonical name, which may be another than the setting's
        state.dev_step, state.waited = state.step, state.waited + 1
        if state.best is None or value > state.best:
            state.best, state.best_step, state.waited = value, state.step, 0
            state.share, state.held_out_means = share, means
        # The line first: without the checkpoint it is dropped and measured again, the other way round it is lost.
        if self.directory is not None:
            self.directory.append(DEV, {"step": state.step, s.dev_measure: value})
            at = f" at {share:g} of the way" if s.interpolate == AUTO else ""
            best = f"best {state.best:.4f} at step {state.best_step}"
            say(f"step {state.step}: dev {s.dev_measure} {value:.4f}{at}, {best}")
        self.save()

    def mine(self) -> None:
        """Mine hard negatives where it is time to."""
        miner, step = self.inputs.miner, self.state.step
        if miner is None:
            return
        number = miner.mining.count_rounds(self.inputs.epoch_at(step))
        if number == self.mined_round:
            return
        name = f"mined-{number}.npy"
        found = self.processes.broadcast(self.directory.read_array(name) if self.directory is not None else None)
        if found is None:
            is_late = step > 0 and miner.mining.count_rounds(self.inputs.epoch_at(step - 1)) == number
            if is_late and miner.mining.by != BM25:
                raise self.told_once(
                    f"{self.out / name}: is missing or damaged, and the encoder that mined it has been trained "
                    "since: put it back from a copy, or start again in another --out"
                )
            if self.processes.size > 1 and step:  # as before a search on dev
                self.save_step()
            with self.stop.give_up(self.search_grace_s):
                found = miner.mine(
                    self.encoder, precision=self.inputs.precision, processes=self.processes, progress=self.progress
                )
            if self.directory is not None:
                self.directory.write_array(name, found)
                mined = int((found >= 0).sum())
                few = "" if mined else "; lower skip, or mine from more documents"
                say(f"step {step}: {mined} passages mined, as grade {miner.mining.grade:g}{few}")
        with self.stop.give_up(self.search_grace_s):  # it looks through the documents again
            self.lists = MinedLists(self.inputs.lists, miner.rows, miner.pool, found, miner.mining.grade)
        self.mined_round = number

    def save(self) -> None:
        if self.directory is not None:
            self.directory.save_checkpoint(self.encoder, self.optimizer, self.state)

    def save_step(self) -> None:
        """Write a checkpoint if this step has none."""
        if self.directory is not None and not self.directory.checkpoint_of(self.state.step).exists():
            self.save()

    def finish(self, began: float) -> FitResult:
        """Save the encoder as it was best on dev, and its card; the run began at time.monotonic() = `began`."""
        s, state, inputs, directory = self.settings, self.state, self.inputs, self.directory
        loss, share = None, cast(float, state.share)  # since the last step, or the best one on dev
        with self.processes.agree():
            if directory is not None:
                lines = directory.read_lines(METRICS)
                loss = lines[-1]["loss"] if lines else None
                directory.restore_best(self.encoder, state)
                interpolate(self.encoder, self.start_weights, share)
                merge_adapters(self.encoder)
                where = f"{self.encoder.device.type}, {inputs.precision}"
                facts = {
                    "data": str(inputs.summary),
                    "steps": state.step,
                    "dev": directory.read_lines(DEV),
                    "best_step": state.best_step,
                    "share": share,
                    "held_out_means": state.held_out_means,
                    "encoder": self.encoder,
                    "where": where if self.processes.size == 1 else f"{self.processes.size} processes, {where}",
                    "seconds": sum(line["step_ms"] for line in lines) / 1000,  # also of what ran before a resume
                    "versions": versions(),
                }
                directory.finish(self.encoder, lambda folder: write_card(folder, settings=s, **facts), share)
                if state.held_out_means:
                    shown = ", ".join(f"{value:.4f} at {share}" for share, value in state.held_out_means.items())
                    say(f"{MEASURE} of the held-out lists: {shown} of the way")
        loss = self.processes.broadcast(loss)
        seconds = time.monotonic() - began
        return FitResult(self.out, state.step, loss, state.best, state.best_step, seconds, share)

    # The ways to end before that: one of the processes tells, the others end with it

    def resume_command(self) -> str:
        return f"{self.processes.launcher} fit --out {shlex.quote(str(self.out))} --resume"

    def told_once(self, message: str, kind: type[GradretError] = GradretError) -> GradretError:
        """What all processes raise at once, and only the first one tells."""
        return kind(message) if self.processes.is_first else ToldElsewhere(message)

    def not_finite(self, what: str, value: float, query_ids: Sequence[str]) -> GradretError:
        """For all processes, which have summed it and see the same."""
        shown = ", ".join(query_ids[:64]) + (", ..." if len(query_ids) > 64 else "")
        last = self.directory.last_checkpoint if self.directory is not None else None
        return self.told_once(
            f"step {self.state.step + 1}: {what} is {value}; lists: {shown}; last good checkpoint: "
            f"{last or 'none'}; look at these lists, or lower --learning-rate"
        )

    def stopped(self) -> GradretError:
        """For all processes, once everything is saved; one that heard nothing stops with those that did."""
        name = signal.Signals(self.stop.signal or signal.SIGTERM).name
        return self.told_once(
            f"stopped by {name} after step {self.state.step} of {self.inputs.steps}, all saved; "
            f"continue with: {self.resume_command()}",
            Interrupted,
        )

    def end_together(self) -> NoReturn:
        """Checkpoint and end after a signal, between two steps."""
        with self.stop.uninterrupted():
            with self.processes.agree():  # the others wait: once one has ended, torchrun gives the rest half a minute
                self.save_step()
            raise self.stopped()

    def end_alone(self, error: GivenUp | ProcessLost) -> NoReturn:
        """Checkpoint and end without a word to the others, who may be anywhere, or gone.

        The first process saves the last whole step: nothing of the one that was cut short is in the weights. A process
        that waits for another one hears no signal before that one has gone, so after a signal to all of them some tell
        of the signal and some of a lost process.
        """
        here = self.processes
        with self.stop.uninterrupted():
            self.save_step()
            if isinstance(error, ProcessLost):
                kept = "the last checkpoint, if there is one yet, holds what was saved"
                if here.is_first:
                    kept = f"all saved after step {self.state.step} of {self.inputs.steps}"
                raise GradretError(f"{error}; {kept}; continue with: {self.resume_command()}") from error
            if here.is_first:
                raise self.stopped() from error
            # The first one may have heard nothing, and tell of a lost process alone: so this one speaks, too.
            name = signal.Signals(self.stop.signal or signal.SIGTERM).name
            raise Interrupted(f"process {here.rank} of {here.size}: stopped by {name}") from error


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and norm weights are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0)
