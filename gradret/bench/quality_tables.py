"""The tables of a quality benchmark's document, as rows of strings: the terminal and the page show the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradret.bench.grid import MEAN

DASH = "–"
P_NAMES = {  # of the document -> shown
    "t": "t-test",
    "t_holm": "t-test, Holm",
    "randomisation": "randomisation",
    "randomisation_holm": "randomisation, Holm",
}
P_SHOWN = "randomisation_holm"


@dataclass(frozen=True)
class Table:
    """What a table shows.

    Attributes:
        title: what is in it.
        header: the columns' names; the first is that of the rows' names.
        rows: as many cells as the header has.
        best: (row, column) of the highest value of each column, from the rows whose runs are all done.
        note: what the columns "change" and "p" are; "" where there is neither.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]]
    note: str = ""


def show_value(mean: float, sd: float | None = None) -> str:
    """`0.6479 ± 0.0015`, or `0.6479` of a single run."""
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def show_p(p: float | None) -> str:
    """`0.012`, `<0.001`, or a dash where nothing was tested."""
    return DASH if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def show_setting(value: object) -> str:
    """A value of a setting as TOML would have it, strings without quotes: `0.1`, `true`, `3,0`, `none`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return ", ".join(map(show_setting, value)) if isinstance(value, (list, tuple)) else str(value)


def is_curve(experiment: dict) -> bool:
    """Whether what the experiment varies is a number, an axis for a curve."""
    values = experiment["values"] or []
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def find_columns(experiment: dict, collections: Sequence[str]) -> list[str]:
    """The collections measured in the experiment, in the document's order, then their mean if there are several."""
    there = {name for row in experiment["rows"] for name in row["columns"]}
    return [*(name for name in collections if name in there), *([MEAN] if MEAN in there else [])]


def name_column(column: str) -> str:
    """The column's name in a header."""
    return "mean of collections" if column == MEAN else column


def name_axis(vary: str) -> str:
    """What an experiment varies, for people."""
    return "share of the lists shuffled" if vary == "shuffle" else vary.replace("_", " ")


def name_row(row: dict, experiment: dict) -> str:
    """The system, the value where one is varied, and how many runs there are when some are missing."""
    name = row["label"]
    if experiment["vary"] is not None and row["value"] is not None:
        name += f", {experiment['vary']} {show_setting(row['value'])}"
    return name + (f" ({row['runs']}/{row['wanted']})" if 0 < row["runs"] < row["wanted"] else "")


def count_seeds(rows: Sequence[dict]) -> str:
    """`3 seeds`: of the row that wants most."""
    seeds = max((row["wanted"] for row in rows), default=1)
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def group_by_encoder(experiment: dict) -> dict[str, list[dict]]:
    """The rows of each encoder, in the order of the tables."""
    groups: dict[str, list[dict]] = {}
    for row in experiment["rows"]:
        groups.setdefault(row["encoder"], []).append(row)
    return groups


def make_tables(document: dict, experiment: dict) -> list[Table]:
    """One table of the first measure for each encoder.

    Where numbers are varied it has a row a system and a column a value, of the mean over the collections; otherwise a
    row a system (and value), a column a collection, their mean, and the p-value of the last of these columns against
    the first of the baselines that is in the table.
    """
    measure = document["measures"][0]
    columns = find_columns(experiment, list(document["collections"]))
    tables = []
    for encoder, rows in group_by_encoder(experiment).items():
        title = f"{experiment['title']}{_name_encoder(document, encoder)}: {measure}"
        if is_curve(experiment) and columns:
            title += f" ({name_column(columns[-1])}), {count_seeds(rows)}"
            tables.append(_make_curve_table(document, title, rows, experiment, columns[-1], measure))
            continue
        cells = [[_take(row, column, measure) for column in columns] for row in rows]
        p = _make_p(document, rows, columns[-1] if columns else MEAN)
        names = list(map(name_column, columns))
        tables.append(_make_table(f"{title}, {count_seeds(rows)}", names, cells, rows, experiment, p))
    return tables


def make_measure_tables(document: dict, experiment: dict) -> list[Table]:
    """For each encoder and collection, and the collections' mean, a table with all measures."""
    measures = document["measures"]
    tables = []
    for encoder, rows in group_by_encoder(experiment).items():
        for column in find_columns(experiment, list(document["collections"])):
            size = document["collections"].get(column)
            sizes = f": {size['queries']} queries, {size['documents']} documents" if size else ""
            title = f"{name_column(column)}{_name_encoder(document, encoder)}{sizes}, {count_seeds(rows)}"
            cells = [[_take(row, column, measure) for measure in measures] for row in rows]
            header, p_cells, note = _make_p(document, rows, column)
            p = [f"{name} ({measures[0]})" for name in header], p_cells, note
            tables.append(_make_table(title, measures, cells, rows, experiment, p))
    return tables


def find_label(document: dict, system: str) -> str:
    """What a system is called."""
    return document["systems"][system]["label"]


def _make_table(title: str, names: list[str], cells: list, rows: list[dict], experiment: dict, p: tuple) -> Table:
    p_header, p_cells, note = p
    shown = [
        [name_row(row, experiment), *(text for text, _ in line), *p_line]
        for row, line, p_line in zip(rows, cells, p_cells, strict=True)
    ]
    return Table(title, ["system", *names, *p_header], shown, _find_best(cells), note)


def _make_curve_table(
    document: dict, title: str, rows: list[dict], experiment: dict, column: str, measure: str
) -> Table:
    systems = {row["system"]: row["label"] for row in rows}
    at = {(row["system"], show_setting(row["value"])): row for row in rows}
    values = [show_setting(value) for value in experiment["values"]]
    cells = [[_take(at.get((system, value)), column, measure, True) for value in values] for system in systems]
    changes = {c["system"]: c["columns"][column] for c in experiment["changes"] if c["encoder"] == rows[0]["encoder"]}
    tested = {name for change in changes.values() for name in change["p"]}
    baseline = next((name for name in document["baselines"] if name in tested), None)
    header, notes = [name_axis(experiment["vary"]), *values], []
    if changes:
        header.append("change")
        notes.append(f"change: from {values[0]} to {values[-1]}")
    if baseline is not None:
        header.append("p")
        notes.append(_explain_p(document, baseline, column, "change of"))
    shown = []
    for (system, label), line in zip(systems.items(), cells, strict=True):
        change = changes.get(system)
        ends = [f"{change['change']:+.4f}" if change else DASH] if changes else []
        if baseline is not None:
            p = change["p"].get(baseline) if change else None
            ends.append("" if system == baseline else show_p(p and p[P_SHOWN]))
        shown.append([label, *(text for text, _ in line), *ends])
    return Table(title, header, shown, _find_best(cells), ". ".join(notes))


def _take(row: dict | None, column: str, measure: str, counted: bool = False) -> tuple[str, float | None]:
    """A cell: its text, and its value if all runs are done; `counted`: the text says so if they are not."""
    found = row and row["columns"].get(column)
    if not found:
        return DASH, None
    mean, sd = found["mean"][measure], found["sd"][measure]
    missing = row["runs"] < row["wanted"]
    text = show_value(mean, sd) + (f" ({row['runs']}/{row['wanted']})" if missing and counted else "")
    return text, None if missing else mean


def _find_best(cells: list[list[tuple[str, float | None]]]) -> frozenset[tuple[int, int]]:
    """The highest of each column as they are shown, so that equals are all best; none where there is one row."""
    best = set()
    for j in range(len(cells[0]) if len(cells) > 1 else 0):
        shown = [None if line[j][1] is None else round(line[j][1], 4) for line in cells]
        highest = max((value for value in shown if value is not None), default=None)
        best |= {(i, j + 1) for i, value in enumerate(shown) if value is not None and value == highest}
    return frozenset(best)


def _make_p(document: dict, rows: list[dict], column: str) -> tuple[list[str], list[list[str]], str]:
    """Header, a list of cells a row, and the note; all empty where nothing is tested."""
    systems = {row["system"] for row in rows}
    baseline = next((name for name in document["baselines"] if name in systems), None)
    found = [row["columns"].get(column, {}).get("p", {}).get(baseline) for row in rows]
    if not any(found):
        return [], [[] for _ in rows], ""
    cells = [
        ["" if row["system"] == baseline else show_p(p and p[P_SHOWN])] for row, p in zip(rows, found, strict=True)
    ]
    return ["p"], cells, _explain_p(document, baseline, column)


def _explain_p(document: dict, baseline: str, column: str, of: str = "") -> str:
    """What p is, in a phrase; `of`: what of the baseline is compared, such as "change of"."""
    where = ", on the mean of collections" if column == MEAN else ""
    label = find_label(document, baseline)
    against = f"the {of} {label}" if of else label
    return (
        f"p: paired randomisation test over queries against {against}{where}, Holm-corrected for the systems compared"
    )


def _name_encoder(document: dict, encoder: str) -> str:
    return f", encoder {encoder}" if len(document["encoders"]) > 1 else ""
