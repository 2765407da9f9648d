"""What came of the runs: every experiment as a table with its tests, and the charts.

    python -m benchmarks.quality.report [--plan development] [--charts DIR]

Makes everything of the rows that are there, whatever code made them, and tells which code that was. Needs no data. In
tables p is that of the paired randomisation test over queries against the first of the plan's baselines that is in the
table, corrected (Holm) for the systems of the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
import pandas as pd

from benchmarks.quality import PLANS
from benchmarks.quality.plan import Cell, Plan, list_cells, list_runs, list_sources
from benchmarks.script import RESULTS, Script
from gradret.bench import require_matplotlib
from gradret.bench.quality import (
    DASH,
    EDGE,
    MEAN,
    ROWS_FILE,
    SET_OFF,
    Rows,
    choose_rows,
    collect_versions,
    compare_columns,
    draw_bars,
    mean_per_query,
    show_p,
    show_value,
    tabulate,
)
from gradret.console import GradretError

COLOURS = ("#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#8c564b", "#17a2b8", "#c65fa6", "#6b7a1f", "#444444")
MARKERS = "osD^vPX*<>"


class Results:
    """A plan and the rows that its runs have.

    Attributes:
        rows: key of a run -> its row.
        frame: a line per cell and column (a collection's name, or MEAN), with "mean", "sd" and "values" of each
            measure, "runs", "wanted", and "p": baseline -> p-values.
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
            for row in tabulate(runs, self.rows, plan.measures, sources, plan.baselines):
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

    def is_done(self, cell: Cell) -> bool:
        """Whether all have."""
        return self.count_done(cell) == len(cell.runs)

    def per_query(self, cell: Cell) -> dict[str, dict[str, float]]:
        """Source -> query -> mean of the first measure over the seeds that are done, one at least."""
        rows = [self.rows[run.key] for run in cell.runs if run.key in self.rows]
        return {source: mean_per_query(rows, source, self.plan.measures[0]) for source in cell.runs[0].sources}

    def changes(self, experiment: str, encoder: str) -> tuple[dict[str, float], dict[str, dict]]:
        """How far the mean of collections rises or falls from the first value to the last, and whether by chance.

        Returns: system -> change; and system -> p-values of its change against the first baseline's, query by query.
        """
        values = list(self.plan.experiments[experiment].values)
        ends = {
            (cell.system, cell.value): cell
            for cell in self.cells
            if cell.experiment == experiment and cell.encoder == encoder and cell.value in (values[0], values[-1])
        }
        changed, per_query = {}, {}
        for system in dict.fromkeys(system for system, _ in ends):
            first, last = (ends[system, value] for value in (values[0], values[-1]))
            if not (self.is_done(first) and self.is_done(last)):
                continue
            means = [
                self.find(experiment=experiment, encoder=encoder, system=system, value=value, column=MEAN)
                for value in (values[0], values[-1])
            ]
            before, after = (frame["mean"].iloc[0][self.plan.measures[0]] for frame in means)
            changed[system] = after - before
            if len(first.runs) > 1 or self.plan.systems[system].ranker != "fit":
                old, new = self.per_query(first), self.per_query(last)
                per_query[system] = {s: {q: new[s][q] - old[s][q] for q in old[s]} for s in old}
        baseline = next((name for name in self.plan.baselines if name in per_query), None)
        found = compare_columns(per_query, [baseline], list_sources(self.plan, experiment)) if baseline else {}
        return changed, found.get((baseline, MEAN), {})


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


def show_setting(value: object) -> str:
    """A value of a setting, as it is given: `0.1`, `true`, `3,0`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        columns = list(frame["column"].unique())
        title = f"{experiment.title}, {encoder}: {measure}"
        if experiment.vary:
            changed, tested = results.changes(name, encoder) if _is_curve(experiment.values) else ({}, {})
            at = {(line.system, line.value): line for _, line in frame[frame["column"] == columns[-1]].iterrows()}
            header = [*map(show_setting, experiment.values), *(["change", "p"] if changed else [])]
            rows = {}
            for system in experiment.systems:
                cells = [show_cell(at.get((system, value)), measure) for value in experiment.values]
                if changed:
                    p = tested.get(system)
                    cells += [
                        f"{changed[system]:+.4f}" if system in changed else DASH,
                        show_p(p and p["randomisation_holm"]),
                    ]
                rows[plan.systems[system].label] = cells
        else:
            header, rows = [*("mean" if c == MEAN else c for c in columns), "p"], {}
            baseline = next(b for b in (*plan.baselines, None) if b is None or b in set(frame["system"]))
            for system in experiment.systems:
                found = {line["column"]: line for _, line in frame[frame["system"] == system].iterrows()}
                p = found[columns[-1]]["p"].get(baseline) if columns[-1] in found else None
                cells = [show_cell(found.get(column), measure) for column in columns]
                rows[plan.systems[system].label] = [*cells, show_p(p and p["randomisation_holm"])]
        lines += [*[""] * bool(lines), *write_table(title, header, rows)]
    return lines


def _is_curve(values: Iterable) -> bool:
    """Whether what is varied is a number, an axis for a curve; with one value nothing changes."""
    values = list(values)
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


# --- charts


def draw_experiment(results: Results, name: str, path: Path) -> None:
    """A PNG of the first measure: a panel per encoder and collection, and for their mean; whiskers are one sd.

    Systems are bars from top to bottom; where numbers are varied, lines. The plan's primary system is set off.
    Raises: GradretError without matplotlib.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt

    plan, experiment = results.plan, results.plan.experiments[name]
    encoders = [e for e in experiment.encoders or plan.encoders if not results.find(experiment=name, encoder=e).empty]
    columns = list(results.find(experiment=name)["column"].unique())
    curves = _is_curve(experiment.values)
    width, height = (2.7, 3.0) if curves else (2.3, 0.27 * len(experiment.systems) + 0.9)
    size = (2.4 + width * len(columns), 0.3 + height * len(encoders))
    with plt.rc_context({"font.size": 9}):
        figure, panels = plt.subplots(
            len(encoders), len(columns), figsize=size, layout="constrained", squeeze=False,
            sharex=not curves, sharey=False if curves else "row",
        )  # fmt: skip
        for encoder, line in zip(encoders, panels, strict=True):
            for column, axes in zip(columns, line, strict=True):
                frame = results.find(experiment=name, encoder=encoder, column=column)
                (_draw_curves if curves else _draw_bars)(axes, plan, experiment, frame)
                shown = "mean" if column == MEAN else column
                axes.set_title(shown + (f", {encoder}" if len(encoders) > 1 else ""), fontsize=9, loc="left")
        if curves:
            panels[0, 0].set_ylabel(plan.measures[0])
            figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)


def _draw_bars(axes, plan: Plan, experiment, frame: pd.DataFrame) -> None:
    found = {line["label"]: line.to_dict() for _, line in frame.iterrows()}
    labels = [plan.systems[system].label for system in experiment.systems]
    draw_bars(axes, {label: found.get(label) for label in labels}, plan.measures[0], plan.systems[plan.primary].label)


def _draw_curves(axes, plan: Plan, experiment, frame: pd.DataFrame) -> None:
    measure, values = plan.measures[0], list(experiment.values)
    others = [system for system in experiment.systems if system != plan.primary]
    for number, system in enumerate(experiment.systems):
        lines = frame[(frame["system"] == system) & (frame["runs"] == frame["wanted"])].sort_values("value")
        means = [mean[measure] for mean in lines["mean"]]
        spread = [sd[measure] or 0.0 for sd in lines["sd"]]
        # Side by side, so that whiskers do not hide one another.
        shift = 0.012 * (values[-1] - values[0]) * (number - (len(experiment.systems) - 1) / 2)
        if system == plan.primary:
            style = {"color": SET_OFF, "linewidth": 2.4, "zorder": 3, "marker": "o"}
        elif plan.systems[system].ranker != "fit":  # the same at every value
            style, shift = {"color": EDGE, "linewidth": 1.2, "linestyle": ":"}, 0.0
        else:
            other = others.index(system)
            style = {"color": COLOURS[other % len(COLOURS)], "marker": MARKERS[other % len(MARKERS)], "linewidth": 1.2}
        x = [value + shift for value in lines["value"]]
        axes.errorbar(
            x, means, yerr=spread if any(spread) else None, label=plan.systems[system].label, capsize=2,
            elinewidth=0.9, markersize=4, **style,
        )  # fmt: skip
    axes.set_xticks(values, [show_setting(value) for value in values])
    axes.set_xlabel(experiment.vary)
    axes.spines[["top", "right"]].set_visible(False)


@click.command(cls=Script)
@click.option("--plan", default="reported", show_default=True, type=click.Choice(tuple(PLANS)))
@click.option("--rows", type=click.Path(path_type=Path), help="A rows.jsonl. [default: the committed one]")
@click.option("--charts", type=click.Path(path_type=Path), metavar="DIR", help="Draw every experiment, too.")
def main(plan, rows, charts):
    """Print every experiment as a Markdown table, and which code made the rows."""
    chosen = PLANS[plan]
    results = Results(chosen, rows or RESULTS / plan / ROWS_FILE)
    for name in chosen.experiments:
        click.echo("\n".join([*write_experiment(results, name), ""]))
        if charts:
            charts.mkdir(parents=True, exist_ok=True)
            draw_experiment(results, name, charts / f"{name}.png")
    click.echo(f"{len(results.rows)} of {len(list_runs(chosen))} runs are done; made by")
    for made in collect_versions(results.rows.values()):
        click.echo(f"- commit {made['commit']}, torch {made['torch']}, {made['device']}, {made['precision']}")


if __name__ == "__main__":
    main()
