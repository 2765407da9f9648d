"""Makes the rows that every table of quality is made of.

    python -m benchmarks.quality.run [--plan development] [--out DIR] [--shard i/n]

Run from the repository, with the data that benchmarks/README.md names. It does
the plan's runs that have no row in DIR/rows.jsonl made by this code: stopped at any moment, the same command does the
rest, on any number of machines with --shard. Prints each run's measures as it ends.
"""

from pathlib import Path

import click

from benchmarks.quality import PLANS, losses
from benchmarks.quality.plan import list_runs
from benchmarks.script import RESULTS, Script
from gradret.bench.quality import do_runs
from gradret.console import GradretError
from gradret.files import open_folder
from gradret.generate.queries import parse_shard


@click.command(cls=Script)
@click.option("--plan", default="reported", show_default=True, type=click.Choice(tuple(PLANS)))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of rows.jsonl. [default: the committed one]")
@click.option("--shard", default="1/1", show_default=True, metavar="i/n", help="Only every n-th run, from the i-th.")
@click.option("--fresh", is_flag=True, help="Do the runs again that are done already.")
@click.option("--device", help="As of fit.")
def main(plan, out, shard, fresh, device):
    """Do the plan's runs that have no row yet; stopped at any moment, the same command does the rest."""
    chosen, out = PLANS[plan], out or RESULTS / plan
    open_folder(out)
    first, step = parse_shard(shard)
    runs = list_runs(chosen)[first - 1 :: step]
    rows, error = do_runs(runs, out, measures=chosen.measures, device=device, fresh=fresh, code=[Path(losses.__file__)])
    click.echo(f"{len(rows)} of {len(runs)} runs are done: {out}/rows.jsonl")
    if error is not None:
        raise GradretError(error)


if __name__ == "__main__":
    main()
