"""A small grid, and rows as its runs would have left them: nothing is trained."""

from gradret.bench.grid import Experiment, Grid, System
from gradret.settings import FitSettings

SYSTEMS = {
    "bm25": System("bm25", "BM25", "bm25", {}),
    "untrained": System("untrained", "Untrained", "untrained", {}),
    "infonce": System("infonce", "InfoNCE", "fit", {"loss": "infonce"}),
    "wasserstein": System("wasserstein", "W2", "fit", {"loss": "wasserstein", "order": 2}),
}
COLLECTIONS = {"A": "beir/a/test", "B": "cranfield?queries=even"}
QUERIES = {"A": 4, "B": 2}
VERSIONS = {"gradret": "0.6.0", "commit": "abc", "torch": "2.13", "device": "A CPU", "threads": 2}


def make_experiment(name="main", **changes) -> Experiment:
    values = {
        "title": "All systems",
        "data": "lists",
        "encoders": ("small",),
        "systems": tuple(SYSTEMS),
        "collections": tuple(COLLECTIONS),
    }
    return Experiment(name, **(values | changes))


def make_grid(*experiments: Experiment, **changes) -> Grid:
    values = {
        "title": "A benchmark",
        "measures": ("nDCG@10", "RR@10"),
        "seeds": 2,
        "baselines": ("infonce", "untrained"),
        "primary": "wasserstein",
        "settings": FitSettings(data=(), epochs=1.0, exclude=("beir/a/test",), loss="wasserstein"),
        "encoders": {"small": {"model": "M"}, "large": {"model": "L"}},
        "data": {"lists": ("lists.jsonl",)},
        "collections": COLLECTIONS,
        "systems": SYSTEMS,
        "experiments": experiments or (make_experiment(),),
    }
    return Grid(**(values | changes))


def make_row(run, per_query: dict[str, list[float]], **changes) -> dict:
    """The row of a run; per_query: name of the collection -> nDCG@10 of each query. RR@10 is half of it."""
    collections = {}
    for name, values in per_query.items():
        mean = sum(values) / len(values)
        collections[COLLECTIONS[name]] = {
            "measures": {"nDCG@10": mean, "RR@10": mean / 2},
            "per_query": {"nDCG@10": {f"q{i}": value for i, value in enumerate(values)}},
        }
    seconds = 10.0 + run.settings.seed if run.ranker == "fit" else None
    row = {"run": run.record(), "collections": collections, "fit_seconds": seconds, "versions": VERSIONS}
    precision = None if run.ranker == "bm25" else "float32"
    return row | {"steps": 5, "lists": 80, "device": "cpu", "precision": precision} | changes


def find_cell(grid: Grid, system: str, experiment: str = "main", value=None, encoder: str = "small"):
    (cell,) = (
        c for c in grid.cells() if (c.system, c.experiment, c.value, c.encoder) == (system, experiment, value, encoder)
    )
    return cell


def make_facts(grid: Grid) -> dict:
    """What the command knows besides the rows."""
    return {
        "command": "gradret bench quality --config 'g.toml'",
        "collections": {
            name: {"source": source, "queries": QUERIES[name], "documents": 9}
            for name, source in grid.collections.items()
        },
    }


def fill_rows(grid: Grid, levels: dict[str, float], systems=None) -> dict[str, dict]:
    """Rows of all runs, or of some systems': seed 1 is .02 above seed 0, queries differ, B is .1 below A.

    levels: system -> nDCG@10; a value that is varied, where it is a number, is taken off it.
    """
    rows = {}
    for cell in grid.cells():
        for run in cell.runs if systems is None or cell.system in systems else ():
            noise = cell.value if isinstance(cell.value, float) and run.ranker == "fit" else 0.0
            level = levels[cell.system] - noise + 0.02 * run.settings.seed
            per_query = {"A": [level + d for d in (0.1, -0.1, 0.05, -0.05)], "B": [level - 0.15, level - 0.05]}
            rows[run.key] = make_row(run, {name: per_query[name] for name in COLLECTIONS})
    return rows
