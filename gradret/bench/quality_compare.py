"""Whether the differences that a quality benchmark shows could be chance: p-values of its tables and curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradret.bench.grid import MEAN, Cell, Experiment, Grid
from gradret.bench.quality_tables import is_curve
from gradret.bench.significance import correct_holm, find_differences, randomisation_tests, t_test
from gradret.console import GradretError


@dataclass
class Found:
    """A row of a table: its cell, the rows of its runs that are done, and what the document says of it."""

    cell: Cell
    runs: list[dict]
    entry: dict
    per_query: dict[str, dict[str, float]] = field(default_factory=dict)  # collection -> query -> mean over seeds

    @property
    def is_complete(self) -> bool:
        return len(self.runs) == len(self.cell.runs)

    @property
    def is_tested(self) -> bool:
        """Whether all runs are done, and more than one where it is trained: seeds move a mean as queries do."""
        return self.is_complete and (self.cell.data is None or len(self.runs) > 1)


class Comparisons:
    """Tests waiting to be made: randomisation tests are made together, which is much faster.

    A family is what one correction (Holm) is for.
    """

    def __init__(self):
        self._families: list[list[dict]] = []
        self._tests: list[tuple[dict, Sequence[np.ndarray]]] = []

    def compare(self, entries: Sequence[dict], baseline: str, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Give each column of each entry the p-values against a baseline, filled in by make(); a column is a family.

        Args:
            entries: their "columns" have the same names.
            samples: for each entry, collection -> differences from the baseline, query by query.
        """
        for column in entries[0]["columns"] if entries else ():
            family = [entry["columns"][column]["p"].setdefault(baseline, {}) for entry in entries]
            taken = [list(sample.values()) if column == MEAN else [sample[column]] for sample in samples]
            self._families.append(family)
            self._tests += zip(family, taken, strict=True)

    def make(self) -> None:
        """Make all tests."""
        random_p = randomisation_tests([sample for _, sample in self._tests])
        for (p, sample), randomisation in zip(self._tests, random_p, strict=True):
            p.update(t=t_test(sample), randomisation=randomisation)
        for family in self._families:
            for kind in ("t", "randomisation"):
                for p, corrected in zip(family, correct_holm([p[kind] for p in family]), strict=True):
                    p[f"{kind}_holm"] = corrected


def compare_rows(grid: Grid, found: Mapping[str, Sequence[Found]], comparisons: Comparisons) -> None:
    """Give each row the p-values against the baselines of its table, of each query's mean over seeds."""
    tables: dict[tuple, list[Found]] = {}
    for name, rows in found.items():
        for one in rows:
            if one.is_tested:
                tables.setdefault((name, one.cell.encoder, repr(one.cell.value)), []).append(one)
    for table in tables.values():
        for baseline in grid.baselines:
            theirs = next((one for one in table if one.cell.system == baseline), None)
            others = [one for one in table if one is not theirs]
            if theirs is None:
                continue
            samples = [
                {name: _find_differences(grid, name, one, theirs) for name in one.cell.collections} for one in others
            ]
            comparisons.compare([one.entry for one in others], baseline, samples)


def compare_changes(grid: Grid, experiment: Experiment, rows: Sequence[Found], comparisons: Comparisons) -> list[dict]:
    """How far each curve rises or falls from its first value to its last, and whether a baseline's does as much.

    Returns: for each encoder and system whose runs at both values are done, "encoder", "system", and "columns": for
        each collection and their mean, the "change" of the first measure and "p": for each baseline of the experiment
        the p-values of the difference between the two changes, query by query, where what is trained has several
        seeds. Nothing where no number is varied.
    """
    if not is_curve({"values": experiment.values}) or len(experiment.values) < 2:
        return []
    ends: dict[tuple[str, str], dict[object, Found]] = {}
    for one in rows:
        if one.is_complete and one.cell.value in (experiment.values[0], experiment.values[-1]):
            ends.setdefault((one.cell.encoder, one.cell.system), {})[one.cell.value] = one
    changes: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    found = []
    for (encoder, system), pair in ends.items():
        if len(pair) < 2:
            continue
        first, last = (pair[experiment.values[i]] for i in (0, -1))
        if first.is_tested and last.is_tested:
            changes[encoder, system] = {
                name: dict(
                    zip(_mean_per_query(grid, name, last), _find_differences(grid, name, last, first), strict=True)
                )
                for name in first.cell.collections
            }
        columns = {}
        for column in first.entry["columns"]:
            means = [one.entry["columns"][column]["mean"][grid.measures[0]] for one in (first, last)]
            columns[column] = {"change": means[1] - means[0], "p": {}}
        found.append({"encoder": encoder, "system": system, "columns": columns})
    for encoder in experiment.encoders:
        table = [entry for entry in found if entry["encoder"] == encoder and (encoder, entry["system"]) in changes]
        for baseline in grid.baselines:
            if (encoder, baseline) not in changes:
                continue
            others = [entry for entry in table if entry["system"] != baseline]
            theirs = changes[encoder, baseline]
            samples = [
                {name: find_differences(ours, theirs[name]) for name, ours in changes[encoder, entry["system"]].items()}
                for entry in others
            ]
            comparisons.compare(others, baseline, samples)
    return found


def _find_differences(grid: Grid, name: str, ours: Found, theirs: Found) -> np.ndarray:
    try:
        return find_differences(_mean_per_query(grid, name, ours), _mean_per_query(grid, name, theirs))
    except ValueError:
        raise _queries_differ(grid, name, ours, theirs) from None


def _mean_per_query(grid: Grid, name: str, one: Found) -> dict[str, float]:
    if name not in one.per_query:
        runs = [run["collections"][grid.collections[name]]["per_query"][grid.measures[0]] for run in one.runs]
        if any(run.keys() != runs[0].keys() for run in runs):
            raise _queries_differ(grid, name, one, one)
        one.per_query[name] = {query: sum(run[query] for run in runs) / len(runs) for query in runs[0]}
    return one.per_query[name]


def _queries_differ(grid: Grid, name: str, ours: Found, theirs: Found) -> GradretError:
    systems = " and ".join(dict.fromkeys((ours.cell.system, theirs.cell.system)))
    return GradretError(
        f"rows of {systems} on {grid.collections[name]}: the queries differ, so the collection has changed since; "
        "measure again with --fresh"
    )
