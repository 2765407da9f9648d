"""The main table on the SciFact test claims that no training list is near to: python benchmarks/apart.py ROWS.jsonl"""

import sys
from pathlib import Path

import numpy as np
from quality.controls import register

from gradret.bench.grid import Grid
from gradret.bench.grid_file import read_grid
from gradret.bench.grid_rows import GridRows
from gradret.bench.quality import choose_rows

FOLDER = Path(__file__).parent
COLLECTION = "SciFact test"


def make_table(grid: Grid, rows: dict[str, dict], chosen: set[str]) -> list[str]:
    """Lines of a Markdown table: nDCG@10 on all queries of the collection, on the chosen ones, and on the others.

    Args:
        rows: key of a run -> its row.
        chosen: query ids.
    """
    source, measure = grid.collections[COLLECTION], grid.measures[0]
    lines = [f"| {measure}, {COLLECTION} | all | apart | near |", "|---|---:|---:|---:|"]
    for cell in grid.cells():
        runs = [rows[run.key] for run in cell.runs if run.key in rows]
        if cell.experiment != "main" or not runs:
            continue
        per_query = [run["collections"][source]["per_query"][measure] for run in runs]
        groups = [[], [], []]
        for query in per_query[0]:
            value = np.mean([run[query] for run in per_query])
            groups[0].append(value)
            groups[1 if query in chosen else 2].append(value)
        name = f"{grid.systems[cell.system].label}, {cell.encoder}"
        lines.append(f"| {name} | " + " | ".join(f"{np.mean(group):.4f}" for group in groups) + " |")
    return lines


if __name__ == "__main__":
    register()
    grid = read_grid(FOLDER / "quality.toml")
    rows = choose_rows(GridRows(sys.argv[1]).read(), grid.wanted(), grid.measures)
    chosen = set((FOLDER / "queries" / "apart-scifact.txt").read_text().split())
    print("\n".join(make_table(grid, rows, chosen)))
