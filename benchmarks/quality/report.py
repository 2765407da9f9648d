"""What came of a plan's runs: its results, its experiments as Markdown tables, and the chart of those with an axis."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from benchmarks.quality.plan import Cell, Plan, list_cells, list_runs, list_sources
from gradret.bench import require_matplotlib
from gradret.bench.quality import DASH, EDGE, MEAN, Rows, choose_rows, mean_per_query, show_value, tabulate
from gradret.console import GradretError

SET_OFF = "#0b66c3"
COLOURS, MARKERS = ("#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#8c564b"), "sD^vP"


class Results:
    """A plan and the rows that its runs have, whatever code made them.

    Attributes:
        rows: key of a run -> its row.
        frame: a line per cell and column (a collection's name, or MEAN), with "mean", "sd" and "values" of each
            measure, "runs" and "wanted".
    Raises: GradretError when there are no rows.
    """

    def __init__(self, plan: Plan, path: Path, experiments: Sequence[str] = ()):
        self.plan = plan
        self.rows = choose_rows(Rows(path).read(), list_runs(plan), plan.measures)
        if not self.rows:
            raise GradretError(f"{path}: holds no row of the plan; python -m benchmarks.quality.run makes them")
        self.cells = [cell for cell in list_cells(plan) if not experiments or cell.experiment in experiments]
        names = {source: name for name, source in plan.collections.items()}
        lines = []
        for (experiment, encoder, value), cells in _group(self.cells).items():
            runs = {cell.system: cell.runs for cell in cells}
            sources = list_sources(plan, experiment)
            for row in tabulate(runs, self.rows, plan.measures, sources, ()):
                line = {"experiment": experiment, "encoder": encoder, "value": value}
                line |= {key: row[key] for key in ("system", "runs", "wanted")}
                line["label"] = plan.systems[row["system"]].label
                for source, found in row["columns"].items():
                    lines.append(line | {"column": names.get(source, source)} | found)
        self.frame = pd.DataFrame(lines)

    def find(self, **chosen) -> pd.DataFrame:
        """The lines with these values."""
        frame = self.frame
        for name, value in chosen.items():
            frame = frame[frame[name].isna() if value is None else frame[name] == value]
        return frame

    def count_done(self, cell: Cell) -> int:
        """How many runs of a cell have a row."""
        return sum(run.key in self.rows for run in cell.runs)

    def per_query(self, cell: Cell) -> dict[str, dict[str, float]]:
        """Source -> query -> mean of the first measure over the seeds that are done, one at least."""
        rows = [self.rows[run.key] for run in cell.runs if run.key in self.rows]
        return {source: mean_per_query(rows, source, self.plan.measures[0]) for source in cell.runs[0].sources}


def _group(cells: Iterable[Cell]) -> dict[tuple, list[Cell]]:
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.experiment, cell.encoder, cell.value), []).append(cell)
    return groups


def show_cell(line: Mapping | None, measure: str) -> str:
    """A cell's mean and spread, and how many of its runs are done where some are missing."""
    if line is None:
        return DASH
    sd = line["sd"][measure]
    missing = f" ({line['runs']} of {line['wanted']})" if line["runs"] < line["wanted"] else ""
    return show_value(line["mean"][measure], sd) + missing


def write_table(first: str, others: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of Markdown: name -> cells."""
    lines = [f"| {' | '.join([first, *others])} |", "|---|" + "---:|" * len(others)]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def write_experiment(results: Results, name: str) -> list[str]:
    """Lines of Markdown: a table per encoder, of collections or, where something is varied, of its values."""
    plan, measure = results.plan, results.plan.measures[0]
    experiment, lines = plan.experiments[name], []
    for encoder in experiment.encoders or plan.encoders:
        frame = results.find(experiment=name, encoder=encoder)
        if frame.empty:
            continue
        columns, rows = list(frame["column"].unique()), {}
        title = f"{experiment.title}, {encoder}: {measure}"
        if experiment.vary:
            at = {(line.system, line.value): line for _, line in frame[frame["column"] == columns[-1]].iterrows()}
            header = [*map(str, experiment.values)]
            for system in experiment.systems:
                cells = [show_cell(at.get((system, value)), measure) for value in experiment.values]
                rows[plan.systems[system].label] = cells
        else:
            header = ["mean" if c == MEAN else c for c in columns]
            for system in experiment.systems:
                found = {line["column"]: line for _, line in frame[frame["system"] == system].iterrows()}
                rows[plan.systems[system].label] = [show_cell(found.get(column), measure) for column in columns]
        lines += [*[""] * bool(lines), *write_table(title, header, rows)]
    return lines


def draw_curves(results: Results, path: Path) -> None:
    """A PNG of the first measure's mean over collections: a panel per experiment that varies a number.

    The plan's primary system is set off. The values stand in the file's Description, too, so that they can be checked.
    Raises: GradretError without matplotlib.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt

    plan = results.plan
    varied = {name: experiment for name, experiment in plan.experiments.items() if experiment.vary}
    systems = dict.fromkeys(system for experiment in varied.values() for system in experiment.systems)
    trained = [system for system in systems if plan.systems[system].ranker == "fit" and system != plan.primary]
    styles = {system: {"color": EDGE, "linewidth": 1.2, "linestyle": ":"} for system in systems}
    for system, colour, marker in zip(trained, COLOURS, MARKERS, strict=False):
        styles[system] = {"color": colour, "marker": marker, "linewidth": 1.2}
    styles[plan.primary] = {"color": SET_OFF, "marker": "o", "linewidth": 2.4, "zorder": 3}
    with plt.rc_context({"font.size": 9}):
        figure, panels = plt.subplots(
            1, len(varied), figsize=(3.6 * len(varied), 3.4), layout="constrained", sharey=True, squeeze=False
        )
        shown, values = {}, {}
        for axes, (name, experiment) in zip(panels[0], varied.items(), strict=True):
            frame = results.find(experiment=name, column=MEAN)
            for system in experiment.systems:
                lines = frame[frame["system"] == system].sort_values("value")
                means = [mean[plan.measures[0]] for mean in lines["mean"]]
                values[f"{name} {system}"] = [round(mean, 4) for mean in means]
                (shown[plan.systems[system].label],) = axes.plot(lines["value"], means, markersize=4, **styles[system])
            axes.set_xticks([*experiment.values], [str(value) for value in experiment.values])
            axes.set_xlabel(experiment.vary)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, 0].set_ylabel(f"{plan.measures[0]}, mean of collections")
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None, "Description": json.dumps(values)})
        plt.close(figure)
