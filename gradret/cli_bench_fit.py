"""`gradret bench fit`: parse, call one function, print. Heavy imports stay inside the command."""

import json
from pathlib import Path

import click

from gradret.console import command_line, say, show_wait
from gradret.files import open_folder, write_json
from gradret.launch import require_one
from gradret.options import DEVICE, ENCODER_OPTIONS, JSON, POSITIVE, QUIET, make_settings, option
from gradret.settings import PRECISIONS


class Sizes(click.ParamType):
    """Whole numbers above 0, separated by commas, as a tuple."""

    name = "sizes"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        return tuple(POSITIVE.convert(part, param, ctx) for part in value.split(","))


@click.command()
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="Lists, as of fit. [default: of mixed length, made from the bundled sample]",
)
@ENCODER_OPTIONS
@click.option(
    "--max-length",
    default=256,
    show_default=True,
    type=POSITIVE,
    help="Tokens read of a query or passage, at most the encoder's own.",
)
@option("--batch-lists", type=POSITIVE, help="Lists whose passages share a batch.")
@click.option("--chunk", default=32, show_default=True, type=POSITIVE, help="Passages gradient caching takes at once.")
@option("--order", type=click.IntRange(1, 2), help="The p of wasserstein's W_p^p.")
@option("--precision", type=click.Choice(PRECISIONS), help="auto is bfloat16 where the device computes in it.")
@click.option("--steps", default=3, show_default=True, type=POSITIVE, help="Timed of each row in each round.")
@click.option("--rounds", default=5, show_default=True, type=POSITIVE, help="Each visits all rows.")
@click.option(
    "--memory",
    type=Sizes(),
    metavar="LISTS,...",
    help="Also measure the peak memory of batches of so many lists, such as 16,1024; takes minutes.",
)
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where fit.json goes.")
@DEVICE
@QUIET
@JSON
def fit(data, max_length, chunk, steps, rounds, memory, out, device, as_json, **given):
    """Time gradret fit against sentence-transformers' own trainer.

    The same model, lists, batches, lengths, precision, optimizer and learning rate; infonce against its multiple
    negatives ranking loss, without and with gradient caching, and wasserstein beside them. All lists need the same
    number of passages, one of the highest grade. Before anything is timed, both sides' losses must be equal.

    \b
    gradret bench fit
    gradret bench fit --data sample --batch-lists 8 --memory 16,1024
    """
    require_one("bench fit")
    from gradret.fit_report import format_fit_speed

    with show_wait("loading PyTorch"):
        from gradret.fit_speed import measure_fit

    open_folder(out, "fit.json")
    result = {"command": command_line()} | measure_fit(
        make_settings(given),
        data=data,
        chunk=chunk,
        max_length=max_length,
        steps=steps,
        rounds=rounds,
        memory=memory or (),
        device=device,
    )
    write_json(Path(out, "fit.json"), result)
    click.echo(json.dumps(result) if as_json else format_fit_speed(result))
    say(f"written: {out}/fit.json")
