"""A quality benchmark's document as one self-contained HTML page: no script, nothing fetched, charts inside."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from gradret.bench.quality_charts import describe_chart, draw_experiment
from gradret.bench.quality_tables import (
    P_NAMES,
    Table,
    count_seeds,
    find_columns,
    find_label,
    group_by_encoder,
    is_curve,
    make_measure_tables,
    make_tables,
    name_column,
    name_row,
    show_p,
    show_setting,
)
from gradret.files import open_folder, write_json

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #59636e; --page: #fff; --line: #d1d9e0; --head: #f3f5f7;
  --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --faint: #9aa5b1; --page: #14171b; --line: #363d46;
  --head: #1e2329; --link: #79b8ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { margin-top: 2.5rem; font-size: 1.35rem } h3 { font-size: 1.1rem }
a { color: var(--link) } nav a { margin-right: 1rem; white-space: nowrap }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem }
caption { text-align: left; color: var(--faint); padding-bottom: .4rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums }
td { white-space: nowrap }
thead th { background: var(--head); vertical-align: bottom }
tbody th, thead tr:first-child th:first-child, .text th, .text td { text-align: left } tbody th { font-weight: 500 }
.text td { white-space: normal; overflow-wrap: anywhere }
tr.primary { background: var(--head) }
figure { margin: 1rem 0; overflow-x: auto } figure img { width: 100%; min-width: 38rem; max-width: 68rem;
  background: #fff; border-radius: 4px } .narrow img { width: auto; min-width: 0; max-width: 100% }
.note, figcaption { color: var(--faint); font-size: .85rem }
pre { overflow-x: auto; padding: .8rem; background: var(--head); white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--link) }
"""
HARDWARE = ("device", "threads", "ran_on", "precision")  # of the versions
SETUP = "_setup"  # an anchor; an experiment's name has no underscore
KINDS = ("Tables", "Curves", "Ablations")


def write_page(document: dict, folder: Path) -> None:
    """Write index.html, a PNG an experiment and quality.json, the document; what is there is replaced.

    The same document gives the same files.

    Raises: GradretError when the folder can not be written or matplotlib is not installed.
    """
    folder = Path(folder)
    pictures = [f"{experiment['name']}.png" for experiment in document["experiments"]]
    open_folder(str(folder), "index.html", "quality.json", *pictures)
    write_json(folder / "quality.json", document)
    sections: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for experiment, picture in zip(document["experiments"], pictures, strict=True):
        draw_experiment(document, experiment, folder / picture)
        kind = KINDS[0] if experiment["vary"] is None else KINDS[1] if is_curve(experiment) else KINDS[2]
        sections[kind].append(_show_experiment(document, experiment, (folder / picture).read_bytes()))
    parts = [
        _open_page(document),
        *(f"<h2>{kind}</h2>\n" + "\n".join(found) for kind, found in sections.items() if found),
        _show_setup(document),
        "</main>\n</body>\n</html>\n",
    ]
    (folder / "index.html").write_text("\n".join(parts), encoding="utf-8")


def _open_page(document: dict) -> str:
    title, experiments = escape(document["title"]), document["experiments"]
    rows = [row for experiment in experiments for row in experiment["rows"]]
    links = [f'<a href="#{escape(e["name"])}">{escape(e["title"])}</a>' for e in experiments]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{escape(_summarise(document, rows))}</p>
<p class="status">{document["done"]} of {document["planned"]} runs are done.</p>
<nav>{" ".join(links)} <a href="#{SETUP}">Settings, data, versions</a></nav>"""


def _summarise(document: dict, rows: list[dict]) -> str:
    """What was compared, in one sentence."""

    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    systems = list(dict.fromkeys(row["label"] for row in rows))
    encoders = {row["encoder"] for row in rows}
    return (
        f"{count(len(systems), 'system')} ({'; '.join(systems)}) with {count(len(encoders), 'encoder')}, "
        f"measured on {count(len(document['collections']), 'collection')} ({'; '.join(document['collections'])}) "
        f"by {', '.join(document['measures'])}, with up to {count_seeds(rows)} each."
    )


def _show_experiment(document: dict, experiment: dict, picture: bytes) -> str:
    parts = [f'<section id="{escape(experiment["name"])}">', f"<h3>{escape(experiment['title'])}</h3>"]
    groups = group_by_encoder(experiment).values()  # a table each
    tables = "\n".join(
        _show_table(table, _find_primary(document, experiment, rows))
        for table, rows in zip(make_tables(document, experiment), groups, strict=True)
    )
    alt = escape(describe_chart(document, experiment))
    several = any(row["runs"] > 1 for row in experiment["rows"])
    spread = "Whiskers: one standard deviation over seeds." if several else "A single run each."
    width = ' class="narrow"' if len(find_columns(experiment, list(document["collections"]))) < 2 else ""
    chart = (
        f'<figure{width}><img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="{alt}">\n'
        f"<figcaption>{escape(document['measures'][0])}. {spread}</figcaption></figure>"
    )
    parts += [chart, tables] if is_curve(experiment) else [tables, chart]
    # A caption says all that a reader needs who jumps from table to table.
    details = "\n".join(
        _show_table(replace(table, title=f"{experiment['title']}: {table.title}"))
        for table in make_measure_tables(document, experiment)
    )
    if details:
        parts.append(f"<details><summary>All measures, each collection</summary>\n{details}</details>")
    if tested := _show_tests(document, experiment):
        parts.append(f"<details><summary>All p-values</summary>\n{tested}</details>")
    return "\n".join([*parts, "</section>"])


def _find_primary(document: dict, experiment: dict, rows: list[dict]) -> int | None:
    """The number of the row that is set off."""
    systems = [row["system"] for row in rows]
    named = experiment["vary"] is None and document["primary"] in systems
    return systems.index(document["primary"]) if named else None


def _show_table(table: Table, primary: int | None = None) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    lines = []
    for i, row in enumerate(table.rows):
        cells = [
            f"<td>{f'<b>{escape(text)}</b>' if (i, j) in table.best else escape(text)}</td>"
            for j, text in enumerate(row[1:], 1)
        ]
        mark = ' class="primary"' if i == primary else ""
        lines.append(f'<tr{mark}><th scope="row">{escape(row[0])}</th>{"".join(cells)}</tr>')
    note = f'<p class="note">{escape(table.note)}.</p>' if table.note else ""
    return _wrap(table.title, f"<tr>{head}</tr>", lines) + note


def _wrap(caption: str, head: str, lines: Sequence[str], kind: str = "") -> str:
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table{kind}><caption>{escape(caption)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _show_tests(document: dict, experiment: dict) -> str:
    """A table for each encoder and baseline: of every column the four p-values; then those of the curves' changes."""
    tables = []
    changes = [(change, find_label(document, change["system"])) for change in experiment["changes"]]
    for encoder, rows in group_by_encoder(experiment).items():
        named = [(row, name_row(row, experiment)) for row in rows]
        changed = [(change, label) for change, label in changes if change["encoder"] == encoder]
        for entries, what in ((named, ""), (changed, "the change of ")):
            for baseline in document["baselines"]:
                caption = f"{experiment['title']}: p against {what}{find_label(document, baseline)}"
                caption += f", encoder {encoder}, {document['measures'][0]}"
                tables.append(_show_p_values(document, experiment, entries, baseline, caption))
    return "\n".join(filter(None, tables))


def _show_p_values(
    document: dict, experiment: dict, entries: Sequence[tuple[dict, str]], baseline: str, caption: str
) -> str:
    """A table of entries with their names; "" where none was tested against the baseline."""
    columns = find_columns(experiment, list(document["collections"]))
    groups = "".join(f'<th scope="colgroup" colspan="{len(P_NAMES)}">{escape(name_column(c))}</th>' for c in columns)
    kinds = "".join(f'<th scope="col">{escape(name)}</th>' for name in P_NAMES.values()) * len(columns)
    lines = []
    for entry, name in entries:
        found = [entry["columns"].get(c, {}).get("p", {}).get(baseline) for c in columns]
        if any(found):
            cells = "".join(f"<td>{show_p(p and p[kind])}</td>" for p in found for kind in P_NAMES)
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = f'<tr><th scope="col" rowspan="2">system</th>{groups}</tr>\n<tr>{kinds}</tr>'
    return _wrap(caption, head, lines) if lines else ""


def _show_setup(document: dict) -> str:
    """Settings, data, collections, versions, hardware and the command."""
    systems = document["systems"]
    hardware = list(dict.fromkeys(tuple(str(v.get(name) or "") for name in HARDWARE) for v in document["versions"]))
    names = list(dict.fromkeys(name for v in document["versions"] for name in v if name not in HARDWARE))
    versions = list(dict.fromkeys(tuple(show_setting(v.get(name)) for name in names) for v in document["versions"]))
    training, tuned = document["training"], document["tuned"]
    tables = [
        _show_facts(
            "Systems",
            ["system", "ranker", "settings", "data"],
            [[s["label"], s["ranker"], _show_settings(s["settings"]), s["data"] or ""] for s in systems.values()],
        ),
        _show_facts(
            "Encoders", ["encoder", "settings"], [[k, _show_settings(v)] for k, v in document["encoders"].items()]
        ),
        _show_facts(
            "Systems with one encoder",
            ["encoder", "system", "settings"],
            [[e, find_label(document, s), _show_settings(v)] for e, own in tuned.items() for s, v in own.items()],
        )
        if tuned
        else "",
        _show_facts("Data", ["name", "sources"], [[k, ", ".join(v)] for k, v in document["data"].items()]),
        _show_facts(
            "Collections",
            ["name", "source", "queries", "documents"],
            [[k, c["source"], str(c["queries"]), str(c["documents"])] for k, c in document["collections"].items()],
        ),
        _show_facts("Versions", names, [list(line) for line in versions]) if names else "",
        _show_facts("Hardware", ["device", "threads", "run on", "precision"], hardware) if hardware else "",
        _show_facts(
            "Training",
            ["system", "runs", "lists", "steps", "mean seconds"],
            [_show_training(find_label(document, system), runs) for system, runs in training.items()],
        )
        if training
        else "",
        "<details><summary>Every setting</summary>\n"
        + _show_facts(
            "Settings of every run, where its system, encoder or experiment names no other",
            ["setting", "value"],
            [[name, show_setting(value)] for name, value in document["settings"].items()],
        )
        + "</details>",
    ]
    command = f"<h3>Command</h3>\n<pre>{escape(document['command'])}</pre>"
    return "\n".join(
        [f'<section id="{SETUP}">', "<h2>Settings, data, versions</h2>", *filter(None, tables), command, "</section>"]
    )


def _show_training(label: str, runs: Sequence[dict]) -> list[str]:
    ranges = []
    for name in ("lists", "steps"):
        values = sorted(run[name] for run in runs)
        ranges.append(f"{values[0]} to {values[-1]}" if values[0] < values[-1] else str(values[0]))
    return [label, str(len(runs)), *ranges, f"{sum(run['seconds'] for run in runs) / len(runs):.1f}"]


def _show_facts(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    ]
    return _wrap(caption, f"<tr>{head}</tr>", lines, ' class="text"')


def _show_settings(settings: dict) -> str:
    return ", ".join(f"{name} {show_setting(value)}" for name, value in settings.items())
