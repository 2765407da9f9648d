"""The tables of what quality.toml varies, from its quality.json: python benchmarks/ablations_table.py FILE.json"""

import json
import sys
from pathlib import Path

from quality_table import open_table, show_cell

from gradret.bench.quality_tables import MEAN, show_setting


def make_tables(document: dict) -> list[str]:
    """Lines of Markdown: for each experiment that varies a setting, its systems' means over collections by value."""
    measure = document["measures"][0]
    lines: list[str] = []
    for experiment in document["experiments"]:
        if experiment["vary"] is None:
            continue
        labels: dict[str, list[str]] = {}
        for row in experiment["rows"]:
            labels.setdefault(row["label"], []).append(show_cell(row, MEAN, measure))
        lines += [""] * bool(lines) + open_table(experiment["title"], [*map(show_setting, experiment["values"])])
        lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in labels.items()]
    return lines


if __name__ == "__main__":
    print("\n".join(make_tables(json.loads(Path(sys.argv[1]).read_text()))))
