"""Does the plan's runs that have no row yet: python -m benchmarks.quality.run [--plan dev] [--shard i/n]"""

from pathlib import Path

import click

from benchmarks.quality.controls import register
from benchmarks.script import RESULTS, Script
from gradret.bench.grid_file import read_grid
from gradret.bench.quality import run_grid
from gradret.console import GradretError
from gradret.generate.queries import parse_shard


@click.command(cls=Script)
@click.option("--plan", default="quality", show_default=True, type=click.Choice(["quality", "dev"]))
@click.option("--out", type=click.Path(), help="Folder of rows.jsonl. [default: benchmarks/results/PLAN]")
@click.option("--shard", default="1/1", show_default=True, metavar="i/n", help="Only every n-th run, from the i-th.")
@click.option("--max-runs", type=click.IntRange(min=0), help="End after so many runs.")
@click.option("--fresh", is_flag=True, help="Do the runs again that are done already.")
@click.option("--device", help="As of fit.")
def main(plan, out, shard, max_runs, fresh, device):
    """Do the plan's runs that have no row yet; stopped at any moment, the same command does the rest."""
    out = Path(out or RESULTS / plan)
    out.mkdir(parents=True, exist_ok=True)
    register()
    grid = read_grid(RESULTS.parent / f"{plan}.toml")
    outcome = run_grid(grid, out, device=device, shard=parse_shard(shard), max_runs=max_runs, fresh=fresh)
    click.echo(f"{len(outcome.rows)} of {outcome.planned} runs are done: {out}/rows.jsonl")
    if outcome.error is not None:
        raise GradretError(outcome.error)


if __name__ == "__main__":
    main()
