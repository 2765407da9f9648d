"""The README's tables of a quality.json made with quality.toml: python benchmarks/quality_table.py FILE.json

Those of another measure that it has, of which nothing is tested: python benchmarks/quality_table.py FILE.json R@100
"""

import json
import sys
from pathlib import Path

from gradret.bench.quality_tables import DASH, MEAN, find_label, show_p, show_value

COLUMNS = (  # experiment, its column, shown
    ("main", "SciFact test", "SciFact"),
    ("main", "Cranfield, even", "Cranfield"),
    ("main", MEAN, "mean of both"),
    ("scifact-to-cranfield", "Cranfield, even", "SciFact to Cranfield"),
    ("cranfield-to-scifact", "SciFact test", "Cranfield to SciFact"),
    ("in-domain", MEAN, "held-out lists"),
)


def make_tables(document: dict, measure: str | None = None) -> list[str]:
    """Lines of Markdown: for each encoder its systems' means and spreads, and how far the primary one is ahead.

    A column, or an encoder, for which the primary system has not been trained yet is left out.

    Args:
        measure: one of the document's; its first, the default, has the tests.
    """
    lines: list[str] = []
    measure = measure or document["measures"][0]
    shown = {experiment for experiment, *_ in COLUMNS}
    for encoder in document["encoders"]:
        rows = {
            (e["name"], row["system"]): row
            for e in document["experiments"]
            for row in e["rows"]
            if row["encoder"] == encoder and row["columns"] and e["name"] in shown
        }
        trained = {
            (e, column)
            for (e, system), row in rows.items()
            if find_label(document, system) == find_label(document, document["primary"])
            for column in row["columns"]
        }
        columns = [column for column in COLUMNS if column[:2] in trained]
        if columns:
            lines += [""] * bool(lines) + _show_systems(document, encoder, rows, columns, measure)
            if measure == document["measures"][0]:
                lines += ["", *_show_lead(document, rows, columns)]
    return lines


def _show_systems(document: dict, encoder: str, rows: dict, columns: list[tuple], measure: str) -> list[str]:
    labels: dict[str, list[str]] = {}  # systems of one label stand for one another: each has its experiment's data
    for _, system in rows:
        labels.setdefault(find_label(document, system), []).append(system)
    lines = open_table(f"{measure}, {encoder}", [shown for *_, shown in columns])
    for label, systems in labels.items():
        cells = []
        for experiment, column, _ in columns:
            row = next((r for s in systems if (r := rows.get((experiment, s)))), None)
            cells.append(show_cell(row, column, measure))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _show_lead(document: dict, rows: dict, columns: list[tuple]) -> list[str]:
    """The primary system's mean less a baseline's, the p-value of that, and in how many seeds it is above 0."""
    measure, primary = document["measures"][0], document["primary"]
    lines = open_table(f"{find_label(document, primary)} against", [shown for *_, shown in columns])
    labels: dict[str, list[str]] = {}
    for baseline in document["baselines"]:
        labels.setdefault(find_label(document, baseline), []).append(baseline)
    for label, baselines in labels.items():
        cells = []
        for experiment, column, _ in columns:
            ours = rows.get((experiment, primary), {}).get("columns", {}).get(column, {})
            found = [(rows[experiment, b]["columns"][column], p) for b in baselines if (p := ours.get("p", {}).get(b))]
            cells.append(_show_difference(ours, *found[0], measure) if found else DASH)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _show_difference(ours: dict, theirs: dict, p: dict, measure: str) -> str:
    values = ours["values"][measure]
    others = theirs["values"][measure]
    ahead = sum(a > b for a, b in zip(values, others * len(values) if len(others) == 1 else others, strict=True))
    difference = ours["mean"][measure] - theirs["mean"][measure]
    return f"{difference:+.4f} ({show_p(p['randomisation_holm'])}; {ahead}/{len(values)})"


def show_cell(row: dict | None, column: str, measure: str) -> str:
    """A row's mean and spread in a column, and how many of its runs are done where some are missing."""
    if row is None or column not in row["columns"]:
        return DASH
    found = row["columns"][column]
    missing = f" ({row['runs']} of {row['wanted']})" if row["runs"] < row["wanted"] else ""
    return show_value(found["mean"][measure], found["sd"][measure]) + missing


def open_table(first: str, others: list[str]) -> list[str]:
    """The two lines above a table's rows."""
    return [f"| {' | '.join([first, *others])} |", "|---|" + "---:|" * len(others)]


if __name__ == "__main__":
    print("\n".join(make_tables(json.loads(Path(sys.argv[1]).read_text()), *sys.argv[2:3])))
