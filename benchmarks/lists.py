"""Lists of `gradret gen` as they are committed under benchmarks/results/lists: without the texts of the queries.

    python -m benchmarks.lists LISTS.jsonl DIR

Many collections allow no copies of their queries. DIR gets the passages and their grades in BEIR's layout, the plans by
query id in plans.jsonl, and the model and settings in gen.json. A plan may say much of its query. Train on it with the
collection's own queries:
`gradret fit --data 'DIR:train?query_file=QUERIES.jsonl'`.
"""

import json
import shutil
from pathlib import Path

import click

from benchmarks.script import Script
from gradret import read_lists
from gradret.console import GradretError
from gradret.data.export import export_lists


@click.command(cls=Script)
@click.argument("lists", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(lists, folder):
    """Write LISTS, of `gradret gen`, to DIR without the texts of their queries."""
    record = lists.with_name(f"{lists.stem}.gen.json")
    if not record.exists():
        raise GradretError(f"{record}: is missing; give lists that `gradret gen` wrote, beside their record")
    export_lists(str(lists), "beir", folder)
    (folder / "queries.jsonl").unlink()
    shutil.copyfile(record, folder / "gen.json")
    plans = ({"query_id": found.query_id, **(found.meta or {})} for found in read_lists(lists))
    lines = [json.dumps(plan, ensure_ascii=False) + "\n" for plan in plans]
    (folder / "plans.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
