"""Lists of `gradret gen` as they are committed under benchmarks/results/lists: without the words of the queries.

    python -m benchmarks.lists LISTS.jsonl DIR

Many collections allow no copies of their queries. DIR gets the passages and their grades in BEIR's layout and the plans
and models in plans.jsonl, all by query id. Train on it with the collection's own queries:
`gradret fit --data 'DIR:train?query_file=QUERIES.jsonl'`.
"""

import json
from pathlib import Path

import click

from benchmarks.script import Script
from gradret import read_lists
from gradret.data.export import export_lists
from gradret.files import read_object


@click.command(cls=Script)
@click.argument("lists", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(lists, folder):
    """Write LISTS, of `gradret gen`, to DIR without the words of their queries."""
    export_lists(str(lists), "beir", folder)
    (folder / "queries.jsonl").unlink()
    record = read_object(lists.with_name(f"{lists.stem}.gen.json"))
    plans = [{"query_id": found.query_id, **(found.meta or {})} for found in read_lists(lists)]
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in [record, *plans]]
    (folder / "plans.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
