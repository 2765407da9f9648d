"""Charts of a quality benchmark's document, as PNG: bars for tables, curves where a number is varied."""

import textwrap
from pathlib import Path

from gradret.bench.quality_tables import (
    DASH,
    find_columns,
    find_label,
    group_by_encoder,
    is_curve,
    name_axis,
    name_column,
    name_row,
    show_setting,
)
from gradret.bench.report import require_bench_extra

SET_OFF, PLAIN, EDGE = "#0b66c3", "#a9b4c0", "#3c4650"
OTHERS = ("#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#8c564b", "#17a2b8", "#c65fa6", "#6b7a1f", "#444444")
MARKERS = "osD^vPX*<>"
LOG_FROM = 8  # times the lowest value: from there on the axis of the values is logarithmic
LABEL = 34  # characters of a line


def draw_experiment(document: dict, experiment: dict, path: Path) -> None:
    """A PNG of make_figure. Raises: GradretError when matplotlib is not installed."""
    require_bench_extra()
    import matplotlib

    # Names are users' text: a dollar sign opens no formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        make_figure(document, experiment).savefig(path, dpi=150, metadata={"Software": None})


def make_figure(document: dict, experiment: dict):
    """The first measure: a panel for each encoder and collection, and for their mean; whiskers are one deviation.

    Rows of a table are horizontal bars in the table's order; where numbers are varied, a line a system. The primary
    system is set off in colour. What is not done yet has no bar; where some of its runs are missing, it has no point.
    An encoder with which nothing has been trained yet is left out where another one has been.

    Returns: a matplotlib Figure that knows how to be a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups, measure, curves = _choose_groups(experiment), document["measures"][0], is_curve(experiment)
    columns = find_columns(experiment, list(document["collections"])) or [next(iter(document["collections"]))]
    width, height = (2.7, 3.0) if curves else (2.3, 0.27 * max(map(len, groups.values())) + 0.9)
    figure = Figure(figsize=(2.4 + width * len(columns), 0.3 + height * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), len(columns), squeeze=False, sharey=False if curves else "row")
    for line, (encoder, rows) in zip(panels, groups.items(), strict=True):
        for axes, column in zip(line, columns, strict=True):
            (_draw_curves if curves else _draw_bars)(axes, document, experiment, rows, column)
            name = name_column(column) + (f", {encoder}" if len(groups) > 1 else "")
            axes.set_title(_wrap(name), fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.set_xlabel(name_axis(experiment["vary"]) if curves else measure)
            if not curves:  # one scale; room for the number behind the longest bar
                axes.set_xlim(0, 1.28 * _find_highest(document, experiment) or 1.0)
                axes.locator_params(axis="x", nbins=4)
        if curves:
            line[0].set_ylabel(measure)
    if curves:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, list(map(_wrap, labels)), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _wrap(text: str) -> str:
    return textwrap.fill(text, LABEL, break_on_hyphens=False)  # which names of models are full of


def _choose_groups(experiment: dict) -> dict[str, list[dict]]:
    groups = group_by_encoder(experiment)
    begun = {e: rows for e, rows in groups.items() if any(row["data"] and row["columns"] for row in rows)}
    return begun or groups


def describe_chart(document: dict, experiment: dict) -> str:
    """What a reader who does not see the chart should know of it."""
    measure, collections = document["measures"][0], list(document["collections"])
    columns = find_columns(experiment, collections)
    kind = f"curves of {measure} by {experiment['vary']}" if is_curve(experiment) else f"bars of {measure}"
    if not columns:
        return f"{experiment['title']}: {kind}; no run is done yet"
    text = f"{experiment['title']}: {kind} on {', '.join(map(name_column, columns))}"
    rows = [row for row in experiment["rows"] if row["columns"].get(columns[-1])]
    found = [(row["columns"][columns[-1]]["mean"][measure], name_row(row, experiment)) for row in rows]
    (high, best), (low, worst) = max(found), min(found)
    return f"{text}. On {name_column(columns[-1])}: highest {best} with {high:.4f}, lowest {worst} with {low:.4f}"


def _draw_bars(axes, document: dict, experiment: dict, rows: list[dict], column: str) -> None:
    measure = document["measures"][0]
    found = [row["columns"].get(column) for row in rows]
    means = [f["mean"][measure] if f else 0.0 for f in found]
    spread = [(f["sd"][measure] or 0.0) if f else 0.0 for f in found]
    colours = [SET_OFF if row["system"] == document["primary"] else PLAIN for row in rows]
    places = range(len(rows))
    axes.barh(places, means, 0.72, color=colours)
    for place, f, mean, sd in zip(places, found, means, spread, strict=True):
        if sd:
            axes.errorbar(mean, place, xerr=sd, color=EDGE, capsize=2, linewidth=1)
        axes.annotate(
            f"{mean:.4f}" if f else DASH,
            (mean + sd, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(places, [_wrap(name_row(row, experiment)) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top


def _draw_curves(axes, document: dict, experiment: dict, rows: list[dict], column: str) -> None:
    measure, values = document["measures"][0], sorted(experiment["values"])
    systems = list(dict.fromkeys(row["system"] for row in rows))
    logarithmic = values[0] > 0 and values[-1] / values[0] >= LOG_FROM
    others = [system for system in systems if system != document["primary"]]
    for i, system in enumerate(systems):
        points = sorted(
            (row["value"], found["mean"][measure], found["sd"][measure] or 0.0)
            for row in rows
            if row["system"] == system and row["runs"] == row["wanted"] and (found := row["columns"].get(column))
        )
        flat = document["systems"][system]["ranker"] != "fit"  # the same at every value
        # Side by side, so that whiskers do not hide one another.
        shift = 0.0 if flat else 0.012 * (i - (len(systems) - 1) / 2)
        if logarithmic:
            x = [value * (values[-1] / values[0]) ** shift for value, _, _ in points]
        else:
            x = [value + (values[-1] - values[0]) * shift for value, _, _ in points]
        number = others.index(system) if system in others else 0
        if system == document["primary"]:
            style = {"color": SET_OFF, "linewidth": 2.4, "zorder": 3, "marker": "o"}
        elif flat:
            style = {"color": EDGE, "linewidth": 1.2, "linestyle": (0, (1 + 2 * (number % 3), 2))}
        else:
            style = {"color": OTHERS[number % len(OTHERS)], "linewidth": 1.2, "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar(
            x,
            [mean for _, mean, _ in points],
            yerr=[sd for _, _, sd in points] if any(sd for _, _, sd in points) else None,
            label=find_label(document, system),
            capsize=2,
            elinewidth=0.9,
            markersize=4,
            **style,
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(values, [show_setting(value) for value in values])
    axes.minorticks_off()


def _find_highest(document: dict, experiment: dict) -> float:
    """The end of the longest bar with its whisker; 0 without bars."""
    measure = document["measures"][0]
    found = [column for row in experiment["rows"] for column in row["columns"].values()]
    return max((f["mean"][measure] + (f["sd"][measure] or 0.0) for f in found), default=0.0)
