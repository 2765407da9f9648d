"""How fast does gradret train beside sentence-transformers' own trainer, and how much memory does a step need?

    python -m benchmarks.speed.fit [--chunk 4] [--memory 16,1024]

The same model, lists, batches, lengths, precision, optimizer and learning rate: infonce against its multiple negatives
ranking loss, without and with gradient caching, and the default loss beside them. Before anything is timed, both
sides' losses must be equal. Prints passages/s (passages alone, not queries) and writes OUT/fit.json, of which
`python -m benchmarks.tables fit` makes the tables of benchmarks/README.md. Needs sentence-transformers[train].
"""

import gc
import io
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import click
import torch

from benchmarks.script import Script, command_line
from benchmarks.speed.clock import OtherLoad, synchronize
from benchmarks.speed.fit_lists import WORDS, choose_lists, draw_fit_batches, passage_texts
from benchmarks.speed.fit_memory import check_memory, measure_memory
from benchmarks.speed.fit_report import LOSSES, RIVAL, SYSTEMS, describe_lengths, format_fit_speed, summarize_times
from benchmarks.speed.fit_rivals import (
    Rival,
    find_losses,
    merges_columns,
    require_trainer,
    rival_versions,
    time_trainer,
)
from gradret.bench.loss import find_percentiles
from gradret.console import GradretError, Interrupted, say
from gradret.data.lists import RankingList, write_lists
from gradret.distributed import ALONE
from gradret.encoder.load import choose_device, choose_precision, load_encoder
from gradret.encoder.model import Encoder
from gradret.files import open_folder, versions, write_json
from gradret.settings import DEFAULT_LOSS, PRECISIONS, FitSettings
from gradret.train.batches import Batch, collate
from gradret.train.gradients import Objective
from gradret.train.loop import Inputs, Trainer
from gradret.train.run_directory import RunDirectory

SAME_LOSS = 1e-4  # highest relative difference of both sides' losses, before anything is timed
LOSS_REPEATS = 100
MOST_OTHER_LOAD = 0.1
SHARED = ("temperature", "batch_lists", "learning_rate", "weight_decay", "seed")
OF_WASSERSTEIN = ("order", "targets", "ground")


def measure_fit(
    settings: FitSettings,
    *,
    data: Sequence[str] = (),
    chunk: int = 32,
    max_length: int = 256,
    steps: int = 3,
    rounds: int = 5,
    memory: Sequence[int] = (),
    device: str | None = None,
) -> dict:
    """Time training steps of gradret and of sentence-transformers' trainer in turns.

    Args:
        settings: of the runs: the encoder's, order, targets, ground, temperature, batch_lists, learning_rate,
            weight_decay, precision and seed are taken; sentence-transformers gets the same.
        data: sources of lists, see sources.parse_source; () for lists of mixed length made from the bundled sample.
        chunk: passages that gradient caching encodes at once, sentence-transformers' mini_batch_size.
        max_length: tokens read of a query or passage, unless the settings name another or the encoder reads fewer.
        steps: timed for each row in each round, after one that is not.
        rounds: each visits every row, every other one backwards.
        memory: lists per batch of which the peak memory is measured, too, see fit_memory.measure_memory.
    Returns: a JSON-serialisable document. "rows" hold passages_per_s over rounds and step_ms over steps, each as
        median, p20 and p80; "speed_ratios" are of passages a second within a round; "step_ratios" are of the times of
        the same step; "loss_alone" is the time of forward and backward from embeddings to the loss;
        "merges_columns" tells how the other trainer embeds, see fit_rivals.merges_columns.
    Raises: GradretError when something is missing, the lists do not suit both sides, or their losses differ.
    """
    began = time.monotonic()
    torch.set_num_threads(torch.get_num_threads())  # from here on fixed, whatever runs beside
    where = choose_device(device)
    require_trainer(where)
    if memory:
        check_memory(where)
    size, seed = settings.batch_lists, settings.seed
    lists = choose_lists(data, (steps + 2) * size, seed)
    batches = draw_fit_batches(lists, steps + 2, size, seed)
    many = choose_lists(data, max(memory), seed) if memory else []
    if memory:
        draw_fit_batches(many, 1, max(memory), seed)
    encoder = _open_encoder(settings, where, max_length)
    with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
        folder = Path(temporary)
        encoder.save(folder / "model")
        write_lists(folder / "lists.jsonl", lists)
        write_lists(folder / "many.jsonl", many)
        base = FitSettings(
            data=(str(folder / "lists.jsonl"),),
            model=str(folder / "model"),
            epochs=float(steps + 2),
            max_steps=steps + 1,
            warmup=0.0,  # the other trainer's default; the schedule is linear on both sides
            checkpoint_every=10**9,
            precision=choose_precision(settings.precision, where),
            **{name: getattr(settings, name) for name in (*SHARED, *OF_WASSERSTEIN, "trust_remote_code")},
        )
        rival = Rival(folder / "model", encoder.config, base, where, batches)
        say("checking that both sides compute the same loss")
        loss_error = compare_losses(encoder, rival, chunk, folder)
        alone = time_losses(encoder, batches[0], base)
        texts = [text for batch in batches for text in passage_texts(batch)]
        lengths = describe_lengths([len(ids) for ids in encoder.tokenize(texts, "document")])
        config = asdict(encoder.config)
        del encoder
        with OtherLoad() as others:
            times = _time_rounds(rival, chunk, steps, rounds, str(where), folder)
        if others.share is not None and others.share > MOST_OTHER_LOAD:
            say(f"others took {others.share:.0%} of the processors' time meanwhile; better run it again")
        one_step = replace(base, data=(str(folder / "many.jsonl"),), loss=DEFAULT_LOSS)
        peaks = measure_memory(one_step, memory, chunk, str(where), folder) if memory else []
    return {
        "versions": versions() | rival_versions(),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "precision": base.precision,
        "model": settings.model,
        "encoder": config,
        "data": list(data) or f"pieces of the sample, {WORDS[0]} to {WORDS[1]} words a passage",
        "batch_lists": size,
        "passages_a_list": len(batches[0][0].passages),
        "tokens": lengths,
        "chunk": chunk,
        "merges_columns": merges_columns(where),
        "steps": steps,
        "rounds": rounds,
        "settings": {name: getattr(base, name) for name in (*SHARED, "order", "clip")},
        "loss_error": loss_error,
        **summarize_times(times, len(passage_texts(batches[0]))),
        "loss_alone": alone,
        "memory": peaks,
        "other_load": others.share,
        "seconds": round(time.monotonic() - began, 1),
    }


def _open_encoder(settings: FitSettings, device: torch.device, max_length: int) -> Encoder:
    encoder = load_encoder(settings.model, device=device, **settings.encoder_options)
    names = ("query_max_length", "document_max_length")
    lengths = {name: getattr(settings, name) or min(max_length, getattr(encoder.config, name)) for name in names}
    encoder.config = replace(encoder.config, **lengths)
    return encoder


def compare_losses(encoder: Encoder, rival: Rival, chunk: int, folder: Path) -> float:
    """The highest relative difference of gradret's infonce and the trainer's loss over the batches; cached, the first.

    In evaluation mode and float32; the trainer's batches are those that its own loader gives.
    Raises: GradretError when it is above SAME_LOSS.
    """
    ours, objective = [], Objective(replace(rival.settings, loss="infonce"), 0.0)
    for lists in rival.batches:
        batch = collate(lists)
        queries, documents = (part.requires_grad_() for part in _embed(encoder, batch))
        ours.append(objective.backward(queries, documents, batch))
    theirs = [*find_losses(rival, None, folder / "trainer"), next(find_losses(rival, chunk, folder / "trainer"))]
    worst = 0.0
    for a, b in zip([*ours, ours[0]], theirs, strict=True):
        error = abs(a - b) / max(abs(b), 1e-3)
        if not error <= SAME_LOSS:
            raise GradretError(
                f"gradret's infonce of a batch is {a:.6f} where sentence-transformers' loss is {b:.6f}, both in "
                "float32 without dropout: they do not read the encoder alike, and nothing was timed; try another "
                "encoder, or one maximum length for queries and passages"
            )
        worst = max(worst, error)
    return worst


def time_losses(encoder: Encoder, lists: Sequence[RankingList], settings: FitSettings) -> dict[str, dict]:
    """Milliseconds of infonce and the default loss, as a step computes them from a batch's embeddings, in turns."""
    batch = collate(lists)
    queries, documents = (part.requires_grad_() for part in _embed(encoder, batch))
    objectives = {name: Objective(replace(settings, loss=loss), 0.0) for name, loss in LOSSES.items()}
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(LOSS_REPEATS + 1):
        for name, objective in objectives.items():
            synchronize(encoder.device)
            began = time.perf_counter()
            objective.backward(queries, documents, batch)
            synchronize(encoder.device)
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: find_percentiles(found[1:]) for name, found in times.items()}


def _embed(encoder: Encoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) queries and (N, D) documents whose dot products are the scores, without gradients, in float32."""
    return tuple(
        encoder.search_vectors(torch.from_numpy(encoder.encode(texts, kind)).to(encoder.device))
        for texts, kind in ((batch.queries, "query"), (batch.documents, "document"))
    )


def _time_rounds(
    rival: Rival, chunk: int, steps: int, rounds: int, device: str, folder: Path
) -> dict[str, list[list[float]]]:
    """For each row the milliseconds of each round's steps."""
    times: dict[str, list[list[float]]] = {system.name: [] for system in SYSTEMS}
    passages = steps * len(passage_texts(rival.batches[0]))
    for number in range(rounds):
        for system in SYSTEMS if number % 2 == 0 else reversed(SYSTEMS):
            gc.collect()  # a trainer and its model hold each other
            cached = chunk if system.cached else None
            if system.trainer == RIVAL:
                found = time_trainer(rival, cached, steps, folder / "trainer")
            else:
                settings = replace(rival.settings, loss=LOSSES[system.loss], chunk=cached)
                try:
                    found = time_fit(settings, device)
                except Interrupted:
                    raise GradretError(f"stopped in round {number + 1}; no result is written: start again") from None
            times[system.name].append(found)
            speed = passages / sum(found) * 1e3
            say(f"round {number + 1} of {rounds}: {system.name} {speed:.1f} passages/s")
    return times


def time_fit(settings: FitSettings, device: str) -> list[float]:
    """Milliseconds of each step of gradret's loop, after one that is not counted.

    As time_trainer counts them: a step lasts from the end of the one before to its own end.
    """
    ends_s: list[float] = []

    class Clock(Trainer):
        def train_step(self, bar):
            super().train_step(bar)
            synchronize(self.encoder.device)
            ends_s.append(time.perf_counter())

    # What every run says of its data would be said in every round.
    with tempfile.TemporaryDirectory(prefix="gradret-") as out, redirect_stderr(io.StringIO()):
        inputs = Inputs(settings, ALONE, device)
        run = RunDirectory(out, settings, inputs.content, resume=False)
        try:
            Clock(inputs, run, Path(out), progress=False).loop()
        finally:
            run.close()
    return [1e3 * (end - begin) for begin, end in pairwise(ends_s)]


DEFAULTS = FitSettings()
POSITIVE = click.IntRange(min=1)


class Sizes(click.ParamType):
    """Whole numbers above 0, separated by commas, as a tuple."""

    name = "sizes"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        return tuple(POSITIVE.convert(part, param, ctx) for part in value.split(","))


@click.command(cls=Script)
@click.option("--data", multiple=True, metavar="SOURCE", help="Lists, as of fit. [default: made from the sample]")
@click.option("--model", default=DEFAULTS.model, show_default=True, help="Encoder.")
@click.option("--layers", type=POSITIVE, help="Keep the encoder's first layers alone.")
@click.option("--max-length", default=256, show_default=True, type=POSITIVE, help="Tokens read of a text at most.")
@click.option("--batch-lists", default=DEFAULTS.batch_lists, show_default=True, type=POSITIVE, help="Lists per batch.")
@click.option("--chunk", default=32, show_default=True, type=POSITIVE, help="Passages gradient caching takes at once.")
@click.option("--precision", default=DEFAULTS.precision, show_default=True, type=click.Choice(PRECISIONS))
@click.option("--steps", default=3, show_default=True, type=POSITIVE, help="Timed of each row in each round.")
@click.option("--rounds", default=5, show_default=True, type=POSITIVE, help="Each visits all rows.")
@click.option("--memory", type=Sizes(), metavar="LISTS,...", help="Measure the peak memory of such batches, too.")
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where fit.json goes.")
@click.option("--device", help="As of fit.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def main(model, layers, batch_lists, precision, memory, out, as_json, **given):
    """Time gradret fit against sentence-transformers' own trainer, on the same batches."""
    open_folder(out, "fit.json")
    settings = FitSettings(model=model, layers=layers, batch_lists=batch_lists, precision=precision)
    command = {"command": command_line("benchmarks.speed.fit")}
    result = command | measure_fit(settings, memory=memory or (), **given)
    write_json(Path(out, "fit.json"), result)
    click.echo(json.dumps(result) if as_json else format_fit_speed(result))
    say(f"written: {out}/fit.json")


if __name__ == "__main__":
    main()
