"""How fast are gradret's losses beside other ways to the same ones?

    python -m benchmarks.speed.loss [--no-compile]

The rows of `gradret bench loss --all`, and beside them: the transport with the sorting done once, and by sums for each
grade; compiled by torch.compile; by POT; SyCL's Gaussian loss as published; F.cross_entropy without a temperature.
Prints a table per shape and writes OUT/loss.json and loss.png, of which `python -m benchmarks.tables loss` makes tables
of benchmarks/README.md. Needs the extra test.
"""

from pathlib import Path

import click

from benchmarks.script import Script, command_line
from gradret.bench import require_matplotlib
from gradret.bench.loss import draw_speed, format_speed, measure_speed
from gradret.console import say
from gradret.files import open_folder, write_json

SHAPES = ((16, 64), (128, 1024), (512, 4096), (2048, 16384, 384))


@click.command(cls=Script)
@click.option("--compile/--no-compile", "compiled", default=True, help="Whether torch.compile is measured, too.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(("float32", "bfloat16", "float16")))
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where the results go.")
@click.option("--device", help="As of fit.")
def main(compiled, dtype, out, device):
    """Time gradret's losses and their rivals."""
    require_matplotlib()
    open_folder(out, "loss.json", "loss.png")
    path, command = Path(out, "loss.json"), {"command": command_line("benchmarks.speed.loss")}
    result = command | measure_speed(
        SHAPES,
        device=device,
        dtype=dtype,
        every=True,
        rivals=f"benchmarks.speed.rivals:{'list_compiled_rivals' if compiled else 'list_rivals'}",
        keep=lambda found: write_json(path, command | found),
    )
    draw_speed(result, Path(out, "loss.png"))
    click.echo(format_speed(result))
    say(f"written: {out}/loss.json, {out}/loss.png")


if __name__ == "__main__":
    main()
