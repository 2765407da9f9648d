"""Shows the rows that are there: python -m benchmarks.quality.report [--plan dev] [--page DIR]"""

from pathlib import Path

import click

from benchmarks.quality.controls import register
from benchmarks.quality.page import write_page
from benchmarks.script import RESULTS, Script, command_line
from gradret.bench.grid_file import read_grid
from gradret.bench.quality import run_grid
from gradret.bench.quality_report import format_quality, make_document


@click.command(cls=Script)
@click.option("--plan", default="quality", show_default=True, type=click.Choice(["quality", "dev"]))
@click.option("--out", type=click.Path(), help="Folder of rows.jsonl. [default: benchmarks/results/PLAN]")
@click.option("--page", type=click.Path(), help="Write a page with all tables and charts, too.")
def main(plan, out, page):
    """Print every table of the plan, made of the rows that are done, whatever version of gradret made them."""
    register()
    grid = read_grid(RESULTS.parent / f"{plan}.toml")
    outcome = run_grid(grid, out or RESULTS / plan, max_runs=0)
    facts = {"command": command_line("benchmarks.quality.report"), "collections": outcome.collections}
    document = make_document(grid, outcome.rows, facts)
    if page:
        Path(page).mkdir(parents=True, exist_ok=True)
        write_page(document, Path(page))
    click.echo(format_quality(document))


if __name__ == "__main__":
    main()
