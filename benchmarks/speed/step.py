"""Where does the time of a training step go, and how does a whole step compare with sentence-transformers', by batch?

    python -m benchmarks.speed.step [--lists 16,256,4096]

The default loss in gradret's own loop beside sentence-transformers' trainer, without and with gradient caching; both
embed the same batches with the same encoder. Before anything is timed, both sides' InfoNCE must be equal. Lists are
pieces of the bundled sample, short ones, so that 4,096 of them take minutes. Writes OUT/step.json and step.png, of
which `python -m benchmarks.tables step` makes tables of benchmarks/README.md. Needs sentence-transformers[train].
"""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import click
import torch
from torch import nn

from benchmarks.script import Script, command_line
from benchmarks.speed.clock import OtherLoad, synchronize
from benchmarks.speed.fit import Sizes, compare_losses
from benchmarks.speed.fit_lists import GRADES, draw_fit_batches, make_lists
from benchmarks.speed.fit_report import RIVAL
from benchmarks.speed.fit_rivals import Rival, require_trainer, rival_versions, time_trainer
from gradret.bench import require_matplotlib
from gradret.bench.loss import find_percentiles
from gradret.console import say
from gradret.data.lists import write_lists
from gradret.distributed import ALONE
from gradret.encoder.load import choose_device, choose_precision, load_encoder
from gradret.files import open_folder, versions, write_json
from gradret.loss import retrieval
from gradret.settings import FitSettings
from gradret.train import gradients
from gradret.train.loop import Inputs, Trainer
from gradret.train.run_directory import RunDirectory

PASSAGE_WORDS = (3, 40)
PARTS = ("read", "encode", "score", "loss", "backward", "optimiser")
PASSAGES = 512  # timed of a row in a round, if a batch is not larger
LARGEST_PLAIN = 256  # lists of a batch whose activations are all kept
LARGEST_REPEATED = 256  # lists of a batch that is timed more than once, after one that is not counted
ROUNDS = 2
CACHED = ", cached"


class Parts:
    """Seconds by part; one that is entered inside another is not counted in that."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, dict.fromkeys(PARTS, 0.0), [0.0]

    def timed(self, function: Callable, part: str | Callable[[], str]) -> Callable:
        """The function, with its time added to a part, or to the one that `part` names when it is called."""

        def call(*arguments, **options):
            name = part if isinstance(part, str) else part()
            began = self._now()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                taken = self._now() - began
                self.seconds[name] += taken - self._inner.pop()
                self._inner[-1] += taken

        return call

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def time_parts(settings: FitSettings, device: torch.device, warm_up: int) -> list[dict[str, float]]:
    """Milliseconds of the parts of each step of gradret's loop, after `warm_up` steps.

    "read" draws and tokenizes a batch, "encode" is the embedding of all texts, "score" the matrix products with the
    softmax's sums and their gradient, "loss" the rest of the loss and its gradient, "backward" that of the encoder,
    with caching its second forward, too.
    """
    found: list[dict[str, float]] = []

    class Clock(Trainer):
        def train_step(self, bar):
            parts = Parts(device)
            embeds = "encode"

            def differentiate(*arguments):
                nonlocal embeds
                value = objective(*arguments)
                embeds = "backward"
                return value

            objective, owner = parts.timed(self.gradients.objective.backward, "loss"), self.gradients.objective
            embed = parts.timed(gradients.BatchGradients._embed, lambda: embeds)
            replaced = [
                (gradients, "tokenize_batch", parts.timed(gradients.tokenize_batch, "read")),
                (gradients.BatchGradients, "_embed", lambda *given: embed(*given)),
                (type(owner), "backward", lambda _, *given: differentiate(*given)),
                (retrieval, "_score_pairs", parts.timed(retrieval._score_pairs, "score")),
                (retrieval, "_score_pairs_backward", parts.timed(retrieval._score_pairs_backward, "score")),
                (nn.utils, "clip_grad_norm_", parts.timed(nn.utils.clip_grad_norm_, "optimiser")),
                (self.optimizer, "step", parts.timed(self.optimizer.step, "optimiser")),
                (self, "differentiate", parts.timed(self.differentiate, "backward")),
            ]
            with ExitStack() as stack:
                for target, name, function in replaced:
                    stack.enter_context(patch.object(target, name, function))
                # What is left of a step is the reading of its lists, and a line of metrics.
                parts.timed(super().train_step, "read")(bar)
            found.append({part: 1e3 * seconds for part, seconds in parts.seconds.items()})

    with tempfile.TemporaryDirectory(prefix="gradret-") as out, redirect_stderr(io.StringIO()):
        inputs = Inputs(settings, ALONE, str(device))
        run = RunDirectory(out, settings, inputs.content, resume=False)
        try:
            Clock(inputs, run, Path(out), progress=False).loop()
        finally:
            run.close()
    return found[warm_up:]


def measure_batch(size: int, settings: FitSettings, max_length: int, device: torch.device, check: bool) -> list[dict]:
    """A row for each system, on batches of `size` lists; `check` compares both sides' losses first.

    settings: model, layers and chunk are taken.
    """
    warm_up = int(size <= LARGEST_REPEATED)
    rounds = ROUNDS if warm_up else 1
    steps = max(1, PASSAGES // (size * len(GRADES)))
    lists = make_lists(size * (steps + 2 if warm_up else 1), passage_words=PASSAGE_WORDS)
    batches = draw_fit_batches(lists, steps + 2, size, settings.seed)
    encoder = load_encoder(settings.model, device=device, **settings.encoder_options)
    encoder.config = replace(encoder.config, query_max_length=max_length, document_max_length=max_length)
    with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
        folder = Path(temporary)
        encoder.save(folder / "model")
        write_lists(folder / "lists.jsonl", lists)
        base = FitSettings(
            data=(str(folder / "lists.jsonl"),),
            model=str(folder / "model"),
            epochs=float(steps + 2),
            max_steps=steps + warm_up,
            warmup=0.0,
            checkpoint_every=10**9,
            batch_lists=size,
            precision=choose_precision(settings.precision, device),
        )
        rival = Rival(folder / "model", encoder.config, base, device, batches)
        if check:
            compare_losses(encoder, rival, settings.chunk, folder)
        del encoder
        ways = [settings.chunk, None] if size <= LARGEST_PLAIN else [settings.chunk]
        ours: dict[int | None, list[dict[str, float]]] = {chunk: [] for chunk in ways}
        theirs: dict[int | None, list[float]] = {chunk: [] for chunk in ways}
        for number in range(rounds):
            for chunk in ways:
                theirs[chunk] += time_trainer(rival, chunk, steps, folder / "trainer", warm_up=warm_up)
                ours[chunk] += time_parts(replace(base, chunk=chunk), device, warm_up)
            say(f"{size} lists: round {number + 1} of {rounds}")
    rows = []
    for chunk in ways:
        whole = [sum(parts.values()) for parts in ours[chunk]]
        for system, times in ((RIVAL, theirs[chunk]), ("gradret", whole)):
            row = {"lists": size, "row": system + (CACHED if chunk else ""), "steps": len(times)}
            step_ms = find_percentiles(times)
            row |= {"step_ms": step_ms, "passages_per_s": 1e3 * size * len(GRADES) / step_ms["median"]}
            if system == "gradret":
                row["parts_ms"] = {p: find_percentiles([s[p] for s in ours[chunk]])["median"] for p in PARTS}
                row["ratio"] = find_percentiles(theirs[chunk])["median"] / step_ms["median"]
            rows.append(row)
    return rows


def draw_parts(result: dict, path: Path) -> None:
    """A PNG: each batch of gradient caching as bars of the parts' shares, with the step's time beside it."""
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["row"] == "gradret" + CACHED]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    for part in PARTS:
        shares = [100 * row["parts_ms"][part] / sum(row["parts_ms"].values()) for row in rows]
        axes.barh(range(len(rows)), shares, 0.7, left=ends, label=part)
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    names = [f"{row['lists']} lists, {row['step_ms']['median'] / 1e3:.3g} s" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of a step's time, gradient caching")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


POSITIVE = click.IntRange(min=1)


@click.command(cls=Script)
@click.option("--lists", type=Sizes(), default="16,256,4096", show_default=True, help="Lists of a batch.")
@click.option("--model", default=FitSettings().model, show_default=True, help="Encoder.")
@click.option("--layers", default=3, show_default=True, type=POSITIVE, help="Keep the encoder's first layers alone.")
@click.option("--max-length", default=64, show_default=True, type=POSITIVE, help="Tokens read of a text at most.")
@click.option("--chunk", default=32, show_default=True, type=POSITIVE, help="Passages gradient caching takes at once.")
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where the results go.")
@click.option("--device", help="As of fit.")
def main(lists, model, layers, max_length, chunk, out, device):
    """Time a training step by parts, and beside sentence-transformers' own trainer."""
    require_matplotlib()
    open_folder(out, "step.json", "step.png")
    where = choose_device(device)
    require_trainer(where)
    settings = FitSettings(model=model, layers=layers, chunk=chunk)
    result = {
        "command": command_line("benchmarks.speed.step"),
        "versions": versions() | rival_versions(),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "precision": choose_precision(settings.precision, where),
        "model": model,
        "layers": layers,
        "max_length": max_length,
        "passage_words": PASSAGE_WORDS,
        "passages_a_list": len(GRADES),
        "chunk": chunk,
        "rows": [],
    }
    with OtherLoad() as others:
        for size in lists:
            result["rows"] += measure_batch(size, settings, max_length, where, check=size == min(lists))
            write_json(Path(out, "step.json"), result)
    write_json(Path(out, "step.json"), result | {"other_load": others.share})
    draw_parts(result, Path(out, "step.png"))
    say(f"written: {out}/step.json, {out}/step.png")


if __name__ == "__main__":
    main()
