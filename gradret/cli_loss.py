"""`gradret bench loss`: parse, call one function, print. Heavy imports stay inside the command."""

import json
import re
from pathlib import Path

import click

from gradret.console import command_line, say, show_wait
from gradret.files import open_folder, write_json
from gradret.launch import require_one
from gradret.options import DEVICE, JSON, POSITIVE, QUIET

DTYPES = ("float32", "bfloat16", "float16")


class Shape(click.ParamType):
    """Whole numbers joined by x, as a tuple: two for lists x documents, three for queries x documents x dimensions."""

    name = "shape"

    def __init__(self, form: str, example: str):
        self.form, self.example = form, example

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        numbers = [int(n) for n in value.split("x") if re.fullmatch("[0-9]{1,9}", n)]
        if len(numbers) != len(self.form.split("x")) or len(numbers) != value.count("x") + 1:
            self.fail(f"'{value}' is not {self.form} in whole numbers, such as {self.example}", param, ctx)
        if min(numbers) < 1 or numbers[1] < 2:
            self.fail(f"'{value}' has too little: two documents and one of everything else at least", param, ctx)
        return tuple(numbers)


class Shapes(Shape):
    """Several, separated by commas."""

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        shapes = tuple(super(Shapes, self).convert(part, param, ctx) for part in value.split(","))
        if len(set(shapes)) < len(shapes):
            self.fail(f"'{value}': the same shape stands there twice", param, ctx)
        return shapes


class ShapeOrNone(Shape):
    """One, or `none`."""

    def convert(self, value, param, ctx):
        return () if value == "none" else super().convert(value, param, ctx)


@click.command()
@click.option(
    "--shapes",
    type=Shapes("BxN", "128x1024"),
    metavar="BxN,...",
    help="Lists x documents a list. [default: 16x64,128x1024,512x4096; on CUDA 512x4096,8192x1024,4096x65536]",
)
@click.option(
    "--retrieval",
    default="2048x16384x384",
    show_default=True,
    type=ShapeOrNone("BxNxD", "2048x16384x384"),
    metavar="BxNxD|none",
    help="Queries x documents x dimensions, to score and compare from embeddings.",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES), help="Of the scores.")
@click.option(
    "--order", default="both", show_default=True, type=click.Choice(["1", "2", "both"]), help="The p of W_p^p."
)
@click.option("--repeats", default=30, show_default=True, type=POSITIVE, help="Samples a row; slow rows take fewer.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Whether torch.compile is measured, too.")
@click.option(
    "--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where loss.json and loss.png go."
)
@DEVICE
@QUIET
@JSON
def loss(shapes, retrieval, dtype, order, repeats, compiled, out, device, as_json):
    """Time losses side by side, forward and backward, and measure their peak memory.

    The exact Wasserstein losses of orders 1 and 2: gradret's, with grades prepared once and raw; in plain PyTorch, as
    textbooks have it, with the sorting done once, and by sums for each grade; compiled by torch.compile; by POT. Beside
    them SyCL's Gaussian loss as published and gradret's form of it, InfoNCE with one positive a list, and
    F.cross_entropy alone. From embeddings: scoring fused with the loss against a matrix of all scores.

    Every row is first checked against float64; what torch.compile or POT has wrong is left out, and says so. The rows
    take turns within one process, so compare within one run only. Stopped before the end, it leaves the shapes that it
    has done in loss.part.json.

    \b
    gradret bench loss
    gradret bench loss --shapes 512x4096 --order 2 --retrieval none --no-compile
    """
    require_one("bench loss")
    from gradret.report import draw_speed, format_speed, require_bench_extra

    require_bench_extra()
    with show_wait("loading PyTorch"):
        from gradret.encoder_load import choose_device
    from gradret.kernels import describe_backend
    from gradret.speed import measure_speed

    where = choose_device(device)
    open_folder(out, "loss.json", "loss.part.json", "loss.png")
    (say if as_json else click.echo)(f"path: {describe_backend(where)}")
    part, command = Path(out, "loss.part.json"), {"command": command_line()}
    result = command | measure_speed(
        shapes,
        device=where,
        dtype=dtype,
        orders=(1, 2) if order == "both" else (int(order),),
        repeats=repeats,
        compiled=compiled,
        retrieval=retrieval or None,
        keep=lambda result: write_json(part, command | result),
    )
    write_json(Path(out, "loss.json"), result)
    part.unlink()
    draw_speed(result, Path(out, "loss.png"))
    click.echo(json.dumps(result) if as_json else format_speed(result))
    say(f"written: {out}/loss.json, {out}/loss.png")
