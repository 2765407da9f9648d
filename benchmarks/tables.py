"""Which tables do the committed results make? Markdown, as it stands in benchmarks/README.md and HISTORY.md.

    python -m benchmarks.tables quality [--measure R@100]    systems by collection
    python -m benchmarks.tables leads [--system contrast]    how far the default loss, or another, is ahead
    python -m benchmarks.tables writers                      lists of a small model against those of a large one
    python -m benchmarks.tables transfer                     systems on the collection that they had no lists for
    python -m benchmarks.tables curves                       fewer lists, and lists whose grades are shuffled
    python -m benchmarks.tables tuning                       which settings of the losses were chosen, and why
    python -m benchmarks.tables loss|fit|step|gen [FILE.json]  speed of losses, of training, of writing lists
    python -m benchmarks.tables defaults                     learning rates and shares of the way, by encoder
    python -m benchmarks.tables look                         whether grades of written lists follow an encoder's order
    python -m benchmarks.tables earlier [--measure R@100]    the earlier plan's main tables
    python -m benchmarks.tables ablations                    what each setting did there
    python -m benchmarks.tables apart                        SciFact's claims that no list was near to there

Those of quality read rows.jsonl of results/reported, results/development or results/earlier (or --rows), defaults
results/development/defaults.jsonl, look results/lists/*/look.json, the others results/NAME-cpu.json. Needs no data.
"""

import json
from pathlib import Path

import click
import numpy as np

from benchmarks.quality import PLANS
from benchmarks.quality.plan import MEASURES, list_sources
from benchmarks.quality.report import Results, show_cell, show_setting, write_experiment, write_table
from benchmarks.quality.reported import FOUR
from benchmarks.script import RESULTS, Script
from gradret.bench.quality import DASH, FIT, MEAN, ROWS_FILE, show_p, show_value
from gradret.bench.significance import compare_systems, find_differences
from gradret.console import GradretError
from gradret.files import read_object

RESAMPLES = 10_000
COLUMNS = {  # experiment, its column -> shown
    **{
        (experiment, column): "mean of the four" if column == MEAN else column
        for experiment in ("main", "aligned")
        for column in (*FOUR, MEAN)
    },
    ("held-out", "held-out lists"): "held-out lists",
}
TRANSFER_COLUMNS = {(f"without-{name}", name): f"{name}, without its lists" for name in FOUR}
EARLIER_COLUMNS = {
    ("main", "SciFact test"): "SciFact",
    ("main", "Cranfield, even"): "Cranfield",
    ("main", MEAN): "mean of both",
    ("scifact-to-cranfield", "Cranfield, even"): "SciFact to Cranfield",
    ("cranfield-to-scifact", "SciFact test"): "Cranfield to SciFact",
    ("in-domain", MEAN): "held-out lists",
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


def write_quality(results: Results, measure: str, shown_columns: dict, leads: bool = False) -> list[str]:
    """For each encoder its systems' means and spreads; of the measure tested also how far the primary one is ahead.

    Systems of one label stand for one another: each has its experiment's data.

    Args:
        shown_columns: experiment and column -> what the table calls it.
        leads: whether a second table says how far the primary system is ahead, of the measure that is tested.
    """
    plan, lines = results.plan, []
    for encoder in plan.encoders:
        found = {
            (line["experiment"], line["column"], line["system"]): line
            for _, line in results.find(encoder=encoder).iterrows()
            if line["experiment"] in {experiment for experiment, _ in shown_columns}
        }
        columns = [column for column in shown_columns if (*column, plan.primary) in found]
        if not columns:
            continue
        labels: dict[str, list[str]] = {}
        for experiment in dict.fromkeys(experiment for experiment, _ in columns):
            for system in plan.experiments[experiment].systems:
                labels.setdefault(plan.systems[system].label, []).append(system)
        rows = {}
        for label, systems in labels.items():
            cells = [next((line for s in systems if (line := found.get((*c, s))) is not None), None) for c in columns]
            done = [line for line in cells if line is not None and line["runs"]]
            missing = next((f" ({x['runs']} of {x['wanted']} seeds)" for x in done if x["runs"] < x["wanted"]), "")
            if done:
                rows[label + missing] = [
                    DASH if line is None else show_value(line["mean"][measure], line["sd"][measure]) for line in cells
                ]
        shown = [shown_columns[column] for column in columns]
        lines += [*[""] * bool(lines), *write_table(f"{measure}, {encoder}", shown, rows)]
        if leads and measure == plan.measures[0]:
            rows = {}
            for baseline in plan.baselines:
                cells = [_show_lead(plan, found, column, baseline, measure) for column in columns]
                before = rows.setdefault(plan.systems[baseline].label, [DASH] * len(cells))
                rows[plan.systems[baseline].label] = [b if c == DASH else c for b, c in zip(before, cells, strict=True)]
            lines += ["", *write_table(f"{plan.systems[plan.primary].label} against", shown, rows)]
    return lines


def _show_lead(plan, found: dict, column: tuple[str, str], baseline: str, measure: str) -> str:
    """The primary system's mean less a baseline's, the p-value of that, and in how many seeds it is above 0."""
    ours, theirs = found.get((*column, plan.primary)), found.get((*column, baseline))
    if ours is None or theirs is None or baseline not in ours["p"]:
        return DASH
    values, others = ours["values"][measure], theirs["values"][measure]
    ahead = sum(a > b for a, b in zip(values, others * len(values) if len(others) == 1 else others, strict=True))
    difference = ours["mean"][measure] - theirs["mean"][measure]
    return f"{difference:+.4f} ({show_p(ours['p'][baseline]['randomisation_holm'])}; {ahead}/{len(values)})"


def write_leads(results: Results, experiment: str, encoder: str, system: str) -> list[str]:
    """How far a system is ahead of each other one, by collection and on their mean.

    Of the seeds that are done. The interval is a bootstrap's over queries, 95 %; p the paired randomisation test's,
    corrected (Holm) for the rows.
    """
    plan, sources = results.plan, list_sources(results.plan, experiment)
    cells = {c.system: c for c in results.cells if (c.experiment, c.encoder) == (experiment, encoder)}
    per_query = {name: results.per_query(cell) for name, cell in cells.items() if results.count_done(cell)}
    ours = per_query.pop(system)
    samples = {name: [find_differences(ours[s], theirs[s]) for s in sources] for name, theirs in per_query.items()}
    return _write_differences(plan, f"{plan.systems[system].label} ahead of, {encoder}", sources, samples)


def write_writers(results: Results) -> list[str]:
    """By system, lists of a small model against a large one's for the same queries; interval and p as write_leads'."""
    sources = list_sources(results.plan, "small-model")
    done = {(c.experiment, c.system): results.per_query(c) for c in results.cells if results.count_done(c)}
    samples = {
        system: [find_differences(done["small-model", system][s], done["large-model", system][s]) for s in sources]
        for system in results.plan.experiments["small-model"].systems
        if system != "untrained" and {("small-model", system), ("large-model", system)} <= done.keys()
    }
    return _write_differences(results.plan, "small model ahead of the large one", sources, samples)


def _write_differences(plan, title: str, sources: list[str], samples: dict[str, list[np.ndarray]]) -> list[str]:
    """System -> each collection's differences by query: their means, the mean of those, its interval and p."""
    names = [name for name, source in plan.collections.items() if source in sources]
    tested, rows = compare_systems({MEAN: samples})[MEAN], {}
    for system, sample in samples.items():
        means = [float(differences.mean()) for differences in sample]
        means += [float(np.mean(means))] * (len(means) > 1)
        low, high = find_interval(sample)
        p = show_p(tested[system]["randomisation_holm"])
        rows[plan.systems[system].label] = [*(f"{mean:+.3f}" for mean in means), f"{low:+.3f} to {high:+.3f}", p]
    return write_table(title, [*names, *["mean"] * (len(names) > 1), "95 %", "p"], rows)


def find_interval(sample: list[np.ndarray]) -> tuple[float, float]:
    """95 % of the mean over collections of their mean differences, queries drawn anew within each."""
    random = np.random.default_rng(0)
    drawn = [d[random.integers(0, len(d), (RESAMPLES, len(d)))].mean(1) for d in sample]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)


def write_ablations(results: Results) -> list[str]:
    """For each experiment that varies a setting, its systems' means over collections by value."""
    lines = []
    for name, experiment in results.plan.experiments.items():
        if not experiment.vary:
            continue
        frame = results.find(experiment=name, column=MEAN)
        at = {(line["system"], line["value"]): line for _, line in frame.iterrows()}
        rows = {
            results.plan.systems[system].label: [
                show_cell(at.get((system, value)), results.plan.measures[0]) for value in experiment.values
            ]
            for system in experiment.systems
        }
        table = write_table(experiment.title, [*map(show_setting, experiment.values)], rows)
        lines += [*[""] * bool(lines), *table]
    return lines


def write_apart(results: Results, chosen: set[str]) -> list[str]:
    """The main table on all of SciFact's test claims, on the chosen ones, and on the others."""
    source, rows = list_sources(results.plan, "main")[0], {}
    for cell in results.cells:
        if cell.experiment == "main" and results.is_done(cell):
            per_query = results.per_query(cell)[source]
            groups = [
                per_query.values(),
                [value for query, value in per_query.items() if query in chosen],
                [value for query, value in per_query.items() if query not in chosen],
            ]
            name = f"{results.plan.systems[cell.system].label}, {cell.encoder}"
            rows[name] = [f"{np.mean(list(group)):.4f}" for group in groups]
    return write_table(f"{results.plan.measures[0]}, SciFact test", ["all", "apart", "near"], rows)


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
    """By encoder and learning rate, rows of benchmarks.defaults: the collections' mean at each share of the way."""
    shares = list(results[0]["shares"])
    rows = {
        f"{result['encoder']}, {result['learning_rate']:g}": [
            f"{np.mean([*result['shares'][share].values()]):.3f}".lstrip("0") for share in shares
        ]
        for result in results
    }
    return write_table("encoder, learning rate", ["untrained", *shares[1:]], rows)


SPEED = {"loss": write_loss, "fit": write_fit, "step": write_step, "gen": write_gen}


QUALITY, EARLIER = ("quality", "leads", "writers", "transfer", "curves", "tuning"), ("earlier", "ablations", "apart")


@click.command(cls=Script)
@click.argument("table", type=click.Choice((*QUALITY, "defaults", "look", *SPEED, *EARLIER)))
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rows", type=click.Path(path_type=Path), help="Of tables of quality: a rows.jsonl.")
@click.option("--measure", default=MEASURES[0], show_default=True, type=click.Choice(MEASURES), help="Of quality.")
@click.option("--system", help="Of leads: whose. [default: the default loss]")
def main(table, file, rows, measure, system):
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
        lines = write_rows(table, rows, measure, system)
    click.echo("\n".join(lines))


def write_rows(table: str, path: Path | None, measure: str, system: str | None) -> list[str]:
    """A table of quality."""
    name = "earlier" if table in EARLIER else "development" if table == "tuning" else "reported"
    plan, path = PLANS[name], path or RESULTS / name / ROWS_FILE
    columns = {"earlier": EARLIER_COLUMNS, "transfer": TRANSFER_COLUMNS}.get(table, COLUMNS)
    varied = [experiment for experiment, chosen in plan.experiments.items() if chosen.vary]
    shown = {
        **{"ablations": varied, "curves": varied, "tuning": [*plan.experiments]},
        **{"apart": ["main"], "writers": ["small-model", "large-model"]},
    }.get(table, {experiment for experiment, _ in columns})
    results = Results(plan, path, shown)
    if table in ("ablations", "curves"):
        return write_ablations(results)
    if table == "tuning":
        done = {
            c.experiment for c in results.cells if c.value is None and c.runs[0].ranker == FIT and results.is_done(c)
        }
        plain = [line for name in plan.experiments if name in done for line in [*write_experiment(results, name), ""]]
        return [*plain, *write_leads(results, "graded", "three-layers", "graded"), "", *write_ablations(results)]
    if table == "apart":
        return write_apart(results, set((RESULTS.parent / "queries" / "apart-scifact.txt").read_text().split()))
    if table == "writers":
        return write_writers(results)
    if table == "leads":
        system = system or plan.primary
        done = dict.fromkeys(
            (c.experiment, c.encoder) for c in results.cells if c.system == system and results.count_done(c)
        )
        if not done:
            raise GradretError(f"--system {system}: has no row; it is one of {', '.join(plan.systems)}")
        return [line for place in done for line in ["", *write_leads(results, *place, system)]][1:]
    return write_quality(results, measure, columns, leads=table == "earlier")


if __name__ == "__main__":
    main()
