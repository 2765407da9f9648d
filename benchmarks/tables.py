"""Which tables do the committed results make? Markdown, as it stands in benchmarks/README.md.

    python -m benchmarks.tables quality [--measure R@100]    systems by collection
    python -m benchmarks.tables leads [--system contrast]    how far the default loss, fit or another is ahead
    python -m benchmarks.tables writers                      lists of a small model against those of a large one
    python -m benchmarks.tables transfer                     systems on the collection that they had no lists for
    python -m benchmarks.tables curves [--chart FILE.png]    fewer lists, and lists whose grades are shuffled
    python -m benchmarks.tables tuning                       which settings of the losses were chosen, and why
    python -m benchmarks.tables loss|fit|step|gen [FILE.json]  speed of losses, of training, of writing lists
    python -m benchmarks.tables defaults                     learning rates and shares of the way, by encoder
    python -m benchmarks.tables look                         whether grades of written lists follow an encoder's order
    python -m benchmarks.tables runs                         how many are done, and which code made their rows

Those of quality and runs read results/reported/rows.jsonl, tuning results/development/rows.jsonl (or --rows), defaults
results/development/defaults.jsonl, look results/lists/*/look.json, the others results/NAME-cpu.json. Needs no data.
In tables of quality p is that of the paired randomisation test over queries, corrected (Holm) for the table's rows.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import click
import numpy as np

from benchmarks.defaults import BASE, ENCODERS, FEW
from benchmarks.quality import PLANS
from benchmarks.quality.plan import MEASURES, list_runs, list_sources
from benchmarks.quality.report import Results, draw_curves, write_experiment, write_table
from benchmarks.quality.reported import FOUR
from benchmarks.script import RESULTS, Script
from gradret.bench.quality import DASH, FIT, MEAN, ROWS_FILE, collect_versions, show_p, show_value
from gradret.console import GradretError
from gradret.evaluation.significance import compare_systems, find_differences
from gradret.files import read_object
from gradret.settings import AUTO, FitSettings

RESAMPLES = 10_000
PerQuery = Mapping[str, Mapping[str, float]]  # a collection's source -> query -> value
COLUMNS = {  # experiment, its column -> shown
    **{
        (experiment, column): "mean of the four" if column == MEAN else column
        for experiment in ("main", "aligned")
        for column in (*FOUR, MEAN)
    },
    ("held-out", "sample's lists"): "sample's lists",
}
LISTS = (
    *("cross_entropy", "InfoNCE", "gradret default loss", "gradret default loss, raw grades"),
    *("gradret transport of it", "gradret transport of it, raw grades"),
    *("gradret W1", "gradret W1, raw grades", "PyTorch W1", "PyTorch W1, by level"),
    *("torch.compile W1", "POT W1", "gradret W2", "gradret W2, raw grades", "PyTorch W2", "PyTorch W2, by level"),
    *("torch.compile W2", "POT W2", "SyCL Gaussian", "gradret Gaussian"),
)
CACHED = ", cached"


# --- quality


def write_quality(results: Results, measure: str) -> list[str]:
    """For each encoder its systems' means and spreads."""
    plan, lines = results.plan, []
    for encoder in plan.encoders:
        found = {
            (line["experiment"], line["column"], line["system"]): line
            for _, line in results.find(encoder=encoder).iterrows()
            if line["experiment"] in {experiment for experiment, _ in COLUMNS}
        }
        columns = [column for column in COLUMNS if (*column, plan.primary) in found]
        if not columns:
            continue
        systems = dict.fromkeys(s for experiment, _ in columns for s in plan.experiments[experiment].systems)
        rows = {}
        for system in systems:
            cells = [found.get((*column, system)) for column in columns]
            done = [line for line in cells if line is not None and line["runs"]]
            missing = next((f" ({x['runs']} of {x['wanted']} seeds)" for x in done if x["runs"] < x["wanted"]), "")
            if done:
                rows[plan.systems[system].label + missing] = [
                    DASH if line is None else show_value(line["mean"][measure], line["sd"][measure]) for line in cells
                ]
        shown = [COLUMNS[column] for column in columns]
        lines += [*[""] * bool(lines), *write_table(f"{measure}, {encoder}", shown, rows)]
    return lines


def write_leads(results: Results, experiment: str, encoder: str, system: str) -> list[str]:
    """How far a system is ahead of each other one, of the seeds that are done."""
    plan = results.plan
    cells = {c.system: c for c in results.cells if (c.experiment, c.encoder) == (experiment, encoder)}
    found = {plan.systems[name].label: results.per_query(c) for name, c in cells.items() if results.count_done(c)}
    title = f"{plan.systems[system].label} ahead of, {encoder}"
    return _write_leads(results, title, list_sources(plan, experiment), found, plan.systems[system].label)


def write_writers(results: Results) -> list[str]:
    """By system, lists of a small model against a large one's for the same queries; and the systems on either."""
    plan, writers = results.plan, {"small-model": "a small model", "large-model": "a large one"}
    done = _find_done(results)
    sources, primary = list_sources(plan, "small-model"), plan.primary
    systems = [name for name in plan.experiments["small-model"].systems if all((w, name) in done for w in writers)]
    labels = {name: plan.systems[name].label for name in systems}
    rows = {}
    for name in systems:
        means = [np.mean([np.mean([*done[w, name][s].values()]) for s in sources]) for w in writers]
        rows[labels[name]] = [f"{mean:.4f}" for mean in means]
    lines = write_table(f"{plan.measures[0]}, mean of the two, lists of", [*writers.values()], rows)
    trained = [name for name in systems if plan.systems[name].ranker == FIT]
    pairs = {labels[name]: (done["small-model", name], done["large-model", name]) for name in trained}
    lines += ["", *_write_differences(results, "lists of a small model ahead of a large one's", sources, pairs)]
    for writer, shown in writers.items() if primary in trained else ():
        title = f"{labels[primary]}, lists of {shown}, ahead of"
        found = {labels[name]: done[writer, name] for name in systems}
        lines += ["", *_write_leads(results, title, sources, found, labels[primary])]
    return lines


def write_transfer(results: Results) -> list[str]:
    """Systems on collections whose lists they were not trained on, and how far the default loss is ahead there."""
    plan, done, found, rows = results.plan, _find_done(results), {}, {}
    sources = [plan.collections[name] for name in FOUR]
    for system in plan.experiments[f"without-{FOUR[0]}"].systems:
        for place in ("", ", with its lists") if plan.systems[system].ranker == FIT else ("",):
            trained = [("main" if place else f"without-{name}", system) for name in FOUR]
            if not all(key in done for key in trained):
                continue
            name = plan.systems[system].label + place
            found[name] = {source: done[key][source] for source, key in zip(sources, trained, strict=True)}
            means = [np.mean([*found[name][source].values()]) for source in sources]
            rows[name] = [f"{mean:.4f}" for mean in (*means, np.mean(means))]
    table = write_table(f"{plan.measures[0]}, its lists left out", [*FOUR, "mean"], rows)
    label = plan.systems[plan.primary].label
    if label not in found:
        return table
    return [*table, "", *_write_leads(results, f"{label}, its lists left out, ahead of", sources, found, label)]


def _find_done(results: Results) -> dict[tuple[str, str], PerQuery]:
    """Experiment and system -> its measures, of the seeds that are done."""
    return {(c.experiment, c.system): results.per_query(c) for c in results.cells if results.count_done(c)}


def _write_leads(
    results: Results, title: str, sources: list[str], found: Mapping[str, PerQuery], ours: str
) -> list[str]:
    """How far one of what was found is ahead of each other one."""
    pairs = {name: (found[ours], theirs) for name, theirs in found.items() if name != ours}
    return _write_differences(results, title, sources, pairs)


def _write_differences(
    results: Results, title: str, sources: list[str], pairs: Mapping[str, tuple[PerQuery, PerQuery]]
) -> list[str]:
    """How far the first of each pair is ahead of the second: by collection, their mean, its interval and p.

    The interval is a bootstrap's over queries, 95 %.
    """
    names = [name for name, source in results.plan.collections.items() if source in sources]
    samples = {name: [find_differences(a[s], b[s]) for s in sources] for name, (a, b) in pairs.items()}
    tested, rows = compare_systems({MEAN: samples})[MEAN], {}
    for name, sample in samples.items():
        means = [float(differences.mean()) for differences in sample]
        means += [float(np.mean(means))] * (len(means) > 1)
        low, high = find_interval(sample)
        p = show_p(tested[name]["randomisation_holm"])
        rows[name] = [*(f"{mean:+.3f}" for mean in means), f"{low:+.3f} to {high:+.3f}", p]
    return write_table(title, [*names, *["mean"] * (len(names) > 1), "95 %", "p"], rows)


def find_interval(sample: list[np.ndarray]) -> tuple[float, float]:
    """95 % of the mean over collections of their mean differences, queries drawn anew within each."""
    random = np.random.default_rng(0)
    drawn = [d[random.integers(0, len(d), (RESAMPLES, len(d)))].mean(1) for d in sample]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)


# --- speed


def write_loss(result: dict) -> list[str]:
    """Losses by shape of the lists, and losses from embeddings."""
    found = {("x".join(map(str, row["shape"])), row["row"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    lists = [shape for shape in shapes if shape.count("x") == 1]
    known = [name for name in LISTS if any((shape, name) in found for shape in lists)]
    rows = {name: [_show_speed(found[shape, name]) for shape in lists] for name in known}
    lines = write_table("forward + backward, ms (peak MiB)", [s.replace("x", " x ") for s in lists], rows)
    for shape in (shape for shape in shapes if shape.count("x") == 2):
        rows = {
            name: [DASH, DASH] if row["skipped"] else [f"{row['both_ms']['median']:.0f}", f"{row['peak_mib']:.0f}"]
            for (other, name), row in found.items()
            if other == shape
        }
        title = f"from embeddings, {shape.replace('x', ' x ')}"
        lines += ["", *write_table(title, ["forward + backward, ms", "peak MiB"], rows)]
    return lines


def _show_speed(row: dict) -> str:
    if row["skipped"]:
        return DASH
    peak = row["peak_mib"]
    return f"{row['both_ms']['median']:.3g}" + (f" ({peak:.0f})" if peak is not None and peak >= 1 else "")


def write_fit(result: dict) -> list[str]:
    """Passages a second without and with gradient caching, ratios, and peak memory."""
    speeds = {row["row"]: f"{row['passages_per_s']['median']:.1f}" for row in result["rows"]}
    rows = {name: [speeds[name], speeds[name + CACHED]] for name in speeds if not name.endswith(CACHED)}
    for ratios, what, form in ((result["speed_ratios"], "", ".2f"), (result["step_ratios"], ", time of a step", ".3f")):
        for name, ratio in ratios.items():
            ours, theirs = name.split(" / ")
            if not ours.endswith(CACHED):
                both = (ratio, ratios[f"{ours}{CACHED} / {theirs}{CACHED}"])
                rows[name + what] = [format(r["median"], form) for r in both]
    size = f"{result['batch_lists']} lists of {result['passages_a_list']} a batch"
    caching = f"gradient caching, {result['chunk']} at once"
    lines = write_table(f"passages/s, {size}", ["plain", caching], rows)
    if result["memory"]:
        rows = {}
        for row in result["memory"]:
            how = f"gradient caching, {row['chunk']} at once" if row["chunk"] else "plain"
            rows[f"{row['lists']} lists, {how}"] = [f"{row['peak_mib']:.0f}", f"{row['ratio']:.2f}"]
        lines += ["", *write_table("one step", ["peak MiB", "ratio"], rows)]
    return lines


def write_step(result: dict) -> list[str]:
    """Passages a second of whole steps by lists of a batch, and the parts of those with gradient caching."""
    found = {(row["row"], row["lists"]): row for row in result["rows"]}
    sizes = list(dict.fromkeys(lists for _, lists in found))
    shown = [f"{size:,} lists" for size in sizes]
    rows: dict[str, list[str]] = {}
    for how in ("", CACHED):
        for name in ("sentence-transformers", "gradret"):
            cells = [found.get((name + how, size)) for size in sizes]
            rows[name + how] = [f"{row['passages_per_s']:.0f}" if row else DASH for row in cells]
        rows[f"gradret / sentence-transformers{how}"] = [f"{row['ratio']:.2f}" if row else DASH for row in cells]
    lines = write_table(f"passages/s of a step, {result['passages_a_list']} passages a list", shown, rows)
    parts = {size: found["gradret" + CACHED, size]["parts_ms"] for size in sizes}
    rows = {part: [f"{parts[size][part]:,.0f}" for size in sizes] for part in parts[sizes[0]]}
    return [*lines, "", *write_table("ms of a step, gradient caching", shown, rows)]


def write_gen(result: dict) -> list[str]:
    """Tokens a second by system under each condition, and their ratio."""
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        rows.setdefault(row["system"], []).append(f"{row['tokens_per_s']['median']:.1f}")
    rows["gradret / loop"] = [f"{ratio['median']:.2f}" for ratio in result["ratios"].values()]
    return write_table(f"tokens/s, {result['sequences']} sequences", [*result["ratios"]], rows)


def write_look(results: dict[str, dict]) -> list[str]:
    """By what the lists are for, documents of `gradret look --json`: pairs in order by kind, lists, lengths."""
    rows: dict[str, list[str]] = {}
    for result in results.values():
        order, lists = result["order"]["encoder"], result["lists"]
        for kind, found in order["kinds"].items():
            rows.setdefault(f"grades {kind.replace('>', ' and ')}", []).append(f"{found['share']:.2f}")
        rows.setdefault("all pairs", []).append(f"{order['share']:.2f}")
        rows.setdefault("lists, with all grades", []).append(f"{lists}, {result['complete']}")
        lengths = " ".join(f"{grade['characters']:.0f}" for grade in result["grades"].values())
        rows.setdefault("mean characters at 3, 2, 1, 0", []).append(lengths)
        rows.setdefault("passages that repeat another list's", []).append(str(result["repeating"]))
    return write_table("pairs in the order of their grades", [*results], rows)


def write_defaults(results: list[dict]) -> list[str]:
    """Rows of benchmarks.defaults: the collections' mean at each share of the way, and at the one that fit chooses.

    A table of all lists by encoder and settings, and one of fewer by encoder and their number.
    """
    columns = {"0": "untrained", "0.25": "0.25", "0.5": "0.5", "1": "1", AUTO: "as fit comes"}
    tables: dict[str, dict[str, dict[str, str]]] = {"encoder, learning rate": {}, "encoder, lists": {}}
    usual = {f.name: f.default for f in fields(FitSettings)} | BASE
    for result in sorted(results, key=lambda result: [*ENCODERS].index(result["encoder"])):
        rows = [*tables.values()][FEW in result]
        names = [result["encoder"], str(result[FEW]) if FEW in result else f"{result['learning_rate']:g}"]
        names += [
            f"{name} {value}"
            for name, value in result.items()
            if name not in ("learning_rate", "interpolate", FEW) and value not in (AUTO, usual.get(name, value))
        ]
        found = {share: f"{np.mean([*values.values()]):.3f}".lstrip("0") for share, values in result["shares"].items()}
        if "interpolate" in result:
            share = max(found, key=float)
            found = {"0": found["0"], AUTO: f"{found[share]} ({share})"}
        name = ", ".join(names)
        rows[name] = found | rows.get(name, {})
    lines = []
    for title, rows in tables.items():
        shown = {name: [found.get(share, DASH) for share in columns] for name, found in rows.items()}
        lines += [*[""] * bool(lines), *write_table(title, [*columns.values()], shown)]
    return lines


SPEED = {"loss": write_loss, "fit": write_fit, "step": write_step, "gen": write_gen}


QUALITY = ("quality", "leads", "writers", "transfer", "curves", "tuning", "runs")


@click.command(cls=Script)
@click.argument("table", type=click.Choice((*QUALITY, "defaults", "look", *SPEED)))
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rows", type=click.Path(path_type=Path), help="Of tables of quality: a rows.jsonl.")
@click.option("--measure", default=MEASURES[0], show_default=True, type=click.Choice(MEASURES), help="Of quality.")
@click.option("--system", help="Of leads: whose. [default: the default loss; of aligned encoders fit]")
@click.option("--chart", type=click.Path(path_type=Path), help="Of curves: a PNG to write, too.")
def main(table, file, rows, measure, system, chart):
    """Print a table made of committed results."""
    if table in SPEED:
        path = file or RESULTS / f"{table}-cpu.json"
        try:
            lines = SPEED[table](read_object(path))
        except KeyError as error:
            raise GradretError(f"{path}: is no result of benchmarks.speed.{table}, it has no {error}") from None
    elif table == "look":
        found = sorted((RESULTS / "lists").glob("*/look.json"))
        lines = write_look({path.parent.name: read_object(path) for path in found})
    elif table == "defaults":
        path = RESULTS / "development" / "defaults.jsonl"
        lines = write_defaults([*map(json.loads, path.read_text().splitlines())])
    else:
        name = "development" if table == "tuning" else "reported"
        results = Results(PLANS[name], rows or RESULTS / name / ROWS_FILE)
        lines = write_rows(results, table, measure, system)
        if chart and table == "curves":
            draw_curves(results, chart)
    click.echo("\n".join(lines))


def write_rows(results: Results, table: str, measure: str, system: str | None) -> list[str]:
    """A table of quality."""
    plan = results.plan
    if table == "runs":
        lines = [f"{len(results.rows)} of {len(list_runs(plan))} runs are done; made by"]
        for made in collect_versions(results.rows.values()):
            lines.append(f"- commit {made['commit']}, torch {made['torch']}, {made['device']}, {made['precision']}")
        return lines
    if table in ("curves", "tuning"):
        started = {cell.experiment for cell in results.cells if results.count_done(cell)}
        missing = {cell.experiment for cell in results.cells if not results.count_done(cell)}
        done = started if table == "tuning" else started - missing  # a curve is shown whole
        names = [name for name, experiment in plan.experiments.items() if experiment.vary or table == "tuning"]
        lines = [line for name in names if name in done for line in ["", *write_experiment(results, name)]][1:]
        leads = table == "tuning" and "contrast" in done
        return [*lines, "", *write_leads(results, "contrast", "three-layers", "contrast")] if leads else lines
    if table == "writers":
        return write_writers(results)
    if table == "leads":
        lines = []
        for experiment, encoder in dict.fromkeys((c.experiment, c.encoder) for c in results.cells):
            ours = system or ("fit" if experiment == "aligned" else plan.primary)
            cells = [c for c in results.cells if (c.experiment, c.encoder, c.system) == (experiment, encoder, ours)]
            if experiment in ("main", "aligned", "held-out") and any(map(results.count_done, cells)):
                lines += [*[""] * bool(lines), *write_leads(results, experiment, encoder, ours)]
        if not lines:
            raise GradretError(f"--system {system}: has no row; it is one of {', '.join(plan.systems)}")
        return lines
    return write_transfer(results) if table == "transfer" else write_quality(results, measure)


if __name__ == "__main__":
    main()
