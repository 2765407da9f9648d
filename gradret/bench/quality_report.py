"""The document of a quality benchmark, made of the rows of its runs: means, spreads and p-values of every table.

It is plain JSON (None for what could not be computed) and all that the tables, the charts and the page are made of.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradret.bench.grid import MEAN, Cell, Grid
from gradret.bench.quality_charts import draw_experiment
from gradret.bench.quality_compare import Comparisons, Found, compare_changes, compare_rows
from gradret.bench.quality_tables import Table, is_curve, make_measure_tables, make_tables
from gradret.bench.report import format_table

RUN_FIELDS = {"model", "data", "exclude", "seed"}  # of FitSettings; every encoder or run names its own
LINE, NAME, COLUMN = 110, 28, 15  # characters of a line, of a row's name and of a column's


def make_document(grid: Grid, rows_by_run: Mapping[str, dict], facts: Mapping) -> dict:
    """Everything measured so far, table by table.

    The p-values of a table's column compare, of the first measure, each query's mean over seeds with the baseline's.
    They are given where all runs of both systems are done, with several seeds where one is trained, and corrected
    (Holm) for the systems of the table that were compared with this baseline in this column. An experiment that varies
    a number has "changes", see quality_compare.compare_changes.

    Args:
        grid: what is to be run; its cells are the rows of the tables.
        rows_by_run: the key of a run -> its row of rows.jsonl; a key that is missing is a run that is not done.
        facts: "command": the command line; "collections": shown name -> source, queries, documents.
    Returns: a JSON-serialisable document. A row's "columns" hold the mean over seeds of every measure, the standard
        deviation (None for a single run), each seed's value and the p-values; "mean", the mean over the collections,
        is there if there are two or more. Without a finished run they are empty.
    Raises: GradretError when two runs were measured on other queries of the same collection.
    """
    found: dict[str, list[Found]] = {experiment.name: [] for experiment in grid.experiments}
    wanted: dict[str, set[str]] = {}
    for cell in grid.cells():
        sources = {grid.collections[name] for name in cell.collections}
        runs = [r for run in cell.runs if (r := rows_by_run.get(run.key)) and r["collections"].keys() >= sources]
        found[cell.experiment].append(Found(cell, runs, _make_row(grid, cell, runs)))
        for run in cell.runs:
            wanted.setdefault(run.key, set()).update(sources)
    comparisons = Comparisons()
    compare_rows(grid, found, comparisons)
    changes = {e.name: compare_changes(grid, e, found[e.name], comparisons) for e in grid.experiments}
    comparisons.make()
    used = {id(row): row for rows in found.values() for one in rows for row in one.runs}
    versions: list[dict] = []
    for row in used.values():
        # The versions name a GPU where there is one, also of runs that did without it.
        there = row["versions"] | {"ran_on": row["device"], "precision": row.get("precision")}  # BM25 has none
        if there not in versions:
            versions.append(there)
    done = sum(key in rows_by_run and rows_by_run[key]["collections"].keys() >= wanted[key] for key in wanted)
    return _to_json(
        {
            "command": facts["command"],
            "title": grid.title,
            "measures": grid.measures,
            "baselines": grid.baselines,
            "primary": grid.primary,
            "done": done,
            "planned": len(wanted),
            "settings": {name: value for name, value in asdict(grid.settings).items() if name not in RUN_FIELDS},
            "encoders": grid.encoders,
            "tuned": grid.tuned,
            "systems": {
                name: {"label": s.label, "ranker": s.ranker, "settings": s.settings, "data": s.data}
                for name, s in grid.systems.items()
            },
            "data": grid.data,
            "collections": facts["collections"],
            "versions": versions,
            "training": _collect_training(found),
            "experiments": [
                {
                    "name": experiment.name,
                    "title": experiment.title,
                    "vary": experiment.vary,
                    "values": experiment.values,
                    "rows": [one.entry for one in found[experiment.name]],
                    "changes": changes[experiment.name],
                }
                for experiment in grid.experiments
            ],
        }
    )


def format_quality(document: dict) -> str:
    """Tables for a terminal: one for each experiment and encoder; of a single experiment all measures, too."""
    experiments = document["experiments"]
    tables = [table for experiment in experiments for table in make_tables(document, experiment)]
    if len(experiments) == 1:
        details = make_measure_tables(document, experiments[0])
        # On one collection the table of the first measure says nothing that the other one does not.
        repeated = len(document["collections"]) == 1 and details and not is_curve(experiments[0])
        tables = details if repeated else tables + details
    notes = [table.note for table in tables]
    blocks = []
    for table, following in zip(tables, [*notes[1:], ""], strict=True):
        blocks.append(f"{textwrap.fill(table.title, LINE)}\n{_format_rows(table)}")
        if table.note and table.note != following:  # once under tables that share it
            blocks[-1] += f"\n\n{textwrap.fill(table.note, LINE)}"
    if document["done"] < document["planned"]:
        blocks.append(f"{document['done']} of {document['planned']} runs are done")
    return "\n\n".join(blocks)


def draw_quality(document: dict, path: Path) -> None:
    """A PNG of the first experiment, see quality_charts.draw_experiment. Raises: GradretError."""
    draw_experiment(document, document["experiments"][0], path)


def _format_rows(table: Table) -> str:
    """Long names in several lines; without the spreads where the table would be too wide."""
    header = ["\n".join(textwrap.wrap(name, COLUMN)) for name in table.header]
    for spreads in (True, False):
        rows = []
        for name, *cells in table.rows:
            first, *others = textwrap.wrap(name, NAME) or [""]
            rows.append([first, *(cell if spreads else cell.split(" ± ")[0] for cell in cells)])
            rows += [[f"  {other}", *("" for _ in cells)] for other in others]
        text = format_table(header, rows)
        if max(map(len, text.splitlines())) <= LINE:
            break
    return text


def _make_row(grid: Grid, cell: Cell, runs: list[dict]) -> dict:
    columns = {}
    if runs:
        by_seed = {
            name: [run["collections"][grid.collections[name]]["measures"] for run in runs] for name in cell.collections
        }
        if len(cell.collections) > 1:
            seeds = list(zip(*by_seed.values(), strict=True))
            by_seed[MEAN] = [{m: float(np.mean([v[m] for v in seed])) for m in grid.measures} for seed in seeds]
        columns = {name: _summarise(grid.measures, seeds) for name, seeds in by_seed.items()}
    return {
        "encoder": cell.encoder,
        "system": cell.system,
        "label": grid.systems[cell.system].label,
        "data": cell.data,
        "value": cell.value,
        "runs": len(runs),
        "wanted": len(cell.runs),
        "columns": columns,
    }


def _summarise(measures: Sequence[str], seeds: list[dict]) -> dict:
    values = {m: [seed[m] for seed in seeds] for m in measures}
    return {
        "mean": {m: float(np.mean(v)) for m, v in values.items()},
        "sd": {m: float(np.std(v, ddof=1)) if len(v) > 1 else None for m, v in values.items()},
        "values": values,
        "p": {},
    }


def _collect_training(found: Mapping[str, list[Found]]) -> dict[str, list[dict]]:
    """Lists, steps and seconds of each training by its system, every run once, though several tables show it."""
    training: dict[str, dict[int, dict]] = {}
    for rows in found.values():
        for one in rows:
            for run in one.runs:
                if run["run"]["ranker"] == "fit":
                    facts = {"lists": run["lists"], "steps": run["steps"], "seconds": run["fit_seconds"]}
                    training.setdefault(one.cell.system, {})[id(run)] = facts
    return {system: list(runs.values()) for system, runs in training.items()}


def _to_json(content):
    """The same as it would come back from a JSON file: lists for tuples, None for nan."""
    if isinstance(content, Mapping):
        return {str(key): _to_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_to_json(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
