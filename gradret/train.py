"""Training: the step and the loop, with dev evaluation, checkpoints and resume."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradret.batches import Batch, draw_batches
from gradret.checkpoint import Run, RunState, step_name
from gradret.collection import Collection
from gradret.console import StopRequest, say
from gradret.encoder import Encoder, autocast, load
from gradret.errors import GradretError, Interrupted
from gradret.evaluation import evaluate, parse_measures
from gradret.kernels import describe_backend
from gradret.lists import RankingList, hash64, query_words
from gradret.losses import make_loss
from gradret.mix import ListsSummary, MixedLists, check_lists
from gradret.settings import FitSettings, count_steps, learning_rate_at
from gradret.sources import open_collection, parse_source


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


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and norm weights are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0)


def choose_precision(precision: str, device: torch.device) -> str:
    """ "auto" resolved: bfloat16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and supported() else "float32"


def batch_loss(encoder: Encoder, batch: Batch, loss: Callable, floor: float | None, precision: str) -> Tensor:
    """The loss of one batch; floor is the grade of the other lists' documents, None to leave them out."""
    with autocast(encoder.device, precision):
        queries = encoder(batch.queries, "query")  # (B, D)
        documents = encoder(batch.documents, "document")  # (N, D)
    scores = encoder.score(queries, documents)  # (B, N)
    if floor is None:
        return loss(batch.to_lists(scores), batch.grades.to(scores.device), mask=batch.mask.to(scores.device))
    return loss(scores, batch.spread_grades(floor).to(scores.device))


def fit(
    settings: FitSettings, out: str | Path, *, resume: bool = False, device: str | None = None, progress: bool = True
) -> FitResult:
    """Train an encoder on ranking lists and save it in `out` as a sentence-transformers directory.

    Args:
        settings: see FitSettings.
        out: the run's directory, see checkpoint.Run.
        resume: continue the unfinished run in `out`, if there is one.
        device: None picks cuda, mps or cpu.
        progress: show a bar on a terminal.
    Raises: GradretError on bad data, a loss that is not finite, a full disk, SIGINT or SIGTERM.
    """
    began = time.monotonic()
    parse_measures([settings.dev_measure])
    lists = MixedLists([parse_source(s) for s in settings.data], seed=settings.seed)
    dev = open_collection(parse_source(settings.dev)) if settings.dev else None
    measured = [open_collection(parse_source(s)) for s in settings.exclude] + ([dev] if dev else [])
    queries = {query_words(text) for collection in measured for text in collection.queries.values()}
    summary = check_lists(lists, refuse_negative=settings.takes_gain, exclude=queries)
    encoder = load(settings.model, device=device, **settings.encoder_options)
    run = Run(out, _as_json(settings), {"data": lists.fingerprint, "encoder": encoder.fingerprint()}, resume=resume)
    try:
        steps = count_steps(settings, len(summary.kept))
        if run.finished:
            return FitResult(Path(out), steps, run.last_loss(), None, None, 0.0, was_finished=True)
        optimizer = make_optimizer(encoder, settings.weight_decay)
        state = run.restore(encoder, optimizer)
        say(f"data: {summary}" + _tell_collisions(lists))
        loss = settings.loss
        if loss == "wasserstein":
            loss += f" on {describe_backend(encoder.device)}"
        say(f"fit: {loss}, {state.step} of {steps} steps done, {settings.batch_lists} lists a batch, {out}")
        trainer = _Trainer(settings, encoder, optimizer, run, state, steps, lists, summary, dev, progress)
        trainer.loop()
        run.finish(encoder, state)
        return FitResult(Path(out), steps, run.last_loss(), state.best, state.best_step, time.monotonic() - began)
    finally:
        run.close()


@dataclass
class _Trainer:
    settings: FitSettings
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    run: Run
    state: RunState
    steps: int
    lists: Sequence[RankingList]
    summary: ListsSummary
    dev: Collection | None
    progress: bool

    def __post_init__(self):
        s = self.settings
        self.loss = make_loss(s.loss, order=s.order, temperature=s.temperature, targets=s.targets)
        self.floor = None
        if s.in_batch:
            self.floor = min(0.0, self.summary.lowest) if s.in_batch_grade is None else s.in_batch_grade
        self.precision = choose_precision(s.precision, self.encoder.device)

    def loop(self) -> None:
        """Steps until the end."""
        state = self.state
        quiet = None if self.progress else True
        with (
            StopRequest() as stop,
            tqdm(total=self.steps, initial=state.step, desc="fit", unit="step", disable=quiet) as bar,
        ):
            while True:
                if self.dev_due() and state.dev_step != state.step and stop.signal is None:
                    self.measure_dev(stop)
                if stop.signal is not None:
                    with stop.uninterrupted():
                        self.interrupt(stop.signal)
                if state.step == self.steps:
                    return
                self.train_step(bar)
                if state.step % self.settings.checkpoint_every == 0 and state.step < self.steps and not self.dev_due():
                    self.run.save_checkpoint(self.encoder, self.optimizer, state)

    def dev_due(self) -> bool:
        step = self.state.step
        return self.dev is not None and (step % self.settings.dev_every == 0 or step == self.steps)

    def train_step(self, bar: tqdm) -> None:
        s, state = self.settings, self.state
        began = time.perf_counter()
        # Dropout depends on seed and step alone, so a resumed run repeats it without saved generator states.
        torch.manual_seed(hash64(str(s.seed), str(state.step)) >> 1)
        self.encoder.train()
        rate = learning_rate_at(state.step, self.steps, s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, passages, query_ids = 0.0, 0, []
        batch_lists = min(s.batch_lists, len(self.summary.kept))
        for batch in draw_batches(
            self.lists, self.summary.kept, state.step, batch_lists=batch_lists, accumulate=s.accumulate, seed=s.seed
        ):
            loss = batch_loss(self.encoder, batch, self.loss, self.floor, self.precision)
            (loss / s.accumulate).backward()
            total += loss.item() / s.accumulate  # waits for the device, as the gradient norm does below
            passages += len(batch.documents)
            query_ids += batch.query_ids
            if not math.isfinite(total):
                raise self.not_finite("loss", total, batch.query_ids)
        norm = nn.utils.clip_grad_norm_(self.encoder.parameters(), s.clip or math.inf).item()
        if not math.isfinite(norm):
            raise self.not_finite("gradient norm", norm, query_ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        step_ms = (time.perf_counter() - began) * 1000
        epoch = state.step * batch_lists * s.accumulate / len(self.summary.kept)
        record = {"step": state.step, "epoch": round(epoch, 4), "loss": total, "learning_rate": rate}
        record |= {"gradient_norm": norm, "passages": passages, "step_ms": round(step_ms, 1)}
        self.run.append("metrics.jsonl", record)
        bar.set_postfix_str(
            f"loss {total:.4f}, lr {rate:.1e}, {passages / step_ms * 1000:.0f} passages/s", refresh=False
        )
        bar.update()

    def measure_dev(self, stop: StopRequest) -> None:
        """Measure the dev collection, keep the model if it is the best, and checkpoint."""
        s, state, result = self.settings, self.state, None
        with stop.at_once():
            result = evaluate(
                self.encoder, self.dev, measures=[s.dev_measure], precision=self.precision, progress=self.progress
            )
        if result is None:  # stopped: measured again when the run is resumed
            return
        (value,) = result.measures.values()  # under its canonical name, which may be another than the setting's
        state.dev_step = state.step
        if state.best is None or value > state.best:
            state.best, state.best_step = value, state.step
        # The line first: without the checkpoint it is dropped and measured again, the other way round it is lost.
        self.run.append("dev.jsonl", {"step": state.step, s.dev_measure: value})
        self.run.save_checkpoint(self.encoder, self.optimizer, state)
        say(f"step {state.step}: dev {s.dev_measure} {value:.4f}, best {state.best:.4f} at step {state.best_step}")

    def not_finite(self, what: str, value: float, query_ids: list[str]) -> GradretError:
        last = self.run.last_checkpoint
        shown = ", ".join(query_ids[:64]) + (", ..." if len(query_ids) > 64 else "")
        return GradretError(
            f"step {self.state.step + 1}: {what} is {value}; lists: {shown}; last good checkpoint: "
            f"{last or 'none'}; look at these lists, or lower --learning-rate"
        )

    def interrupt(self, number: int) -> None:
        """Checkpoint and end."""
        if self.run.last_checkpoint is None or self.run.last_checkpoint.name != step_name(self.state.step):
            self.run.save_checkpoint(self.encoder, self.optimizer, self.state)
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.state.step} of {self.steps}, all saved; "
            f"continue with: gradret fit --out {self.run.directory} --resume"
        )


def _as_json(settings: FitSettings) -> dict:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()}


def _tell_collisions(lists: MixedLists) -> str:
    if not lists.colliding_ids:
        return ""
    return f"; {lists.colliding_ids} query ids stand for different queries in different sources: kept apart"
