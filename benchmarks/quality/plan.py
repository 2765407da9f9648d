"""What is measured: encoders, systems, data, collections, and the experiments that join them into runs.

This module says what a plan is and which runs it needs; the plans themselves are in modules of their own, see PLANS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.quality.losses import register
from gradret.bench.quality import BM25, FIT, UNTRAINED, Run
from gradret.settings import FitSettings


@dataclass(frozen=True)
class System:
    """A row of the tables.

    Attributes:
        label: its name for people; systems of one label stand for one another in tables of several experiments.
        settings: fields of FitSettings in which it differs from the plan's.
        data: a name in Plan.data, instead of the experiment's.
        ranker: FIT, UNTRAINED or BM25.
    """

    label: str
    settings: Mapping = field(default_factory=dict)
    data: str | None = None
    ranker: str = FIT


@dataclass(frozen=True)
class Experiment:
    """A table: systems trained on one data set and measured on some collections.

    Attributes:
        title: of the table.
        data: a name in Plan.data.
        encoders, systems, collections: names in the plan, in the order shown; () for all there are.
        seeds: runs of a system that is trained.
        vary: what differs between the table's columns, for people; "" where nothing does.
        values: of what is varied -> fields of FitSettings, or {"source": options added to every source of the data}.
    """

    title: str
    data: str = "lists"
    encoders: Sequence[str] = ()
    systems: Sequence[str] = ()
    collections: Sequence[str] = ()
    seeds: int = 3
    vary: str = ""
    values: Mapping = field(default_factory=lambda: {None: {}})


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured.

    Attributes:
        measures: canonical names of ir_measures; the first is the one tested.
        primary: the system set off in charts, which tables compare with the others.
        settings: of every run, before the encoder's, the system's, the two together and the varied value.
        encoders: name -> fields of FitSettings: the encoder's own, and others that suit it, such as a learning rate.
        tuned: encoder -> system -> fields of FitSettings for the two together.
        data: name -> sources.
        collections: name shown -> source. No run trains on a query of any of them.
        systems, experiments: name -> what it is.
    """

    measures: Sequence[str]
    primary: str
    settings: Mapping
    encoders: Mapping[str, Mapping]
    tuned: Mapping[str, Mapping[str, Mapping]]
    data: Mapping[str, Sequence[str]]
    collections: Mapping[str, str]
    systems: Mapping[str, System]
    experiments: Mapping[str, Experiment]


@dataclass(frozen=True)
class Cell:
    """One system with one encoder at one value of an experiment, and its runs, one per seed."""

    experiment: str
    encoder: str
    system: str
    value: object
    runs: tuple[Run, ...]


def list_cells(plan: Plan) -> list[Cell]:
    """All cells: experiment by experiment, in each encoder by encoder, value by value."""
    return [
        Cell(name, encoder, system, value, _make_runs(plan, experiment, encoder, system, value))
        for name, experiment in plan.experiments.items()
        for encoder in experiment.encoders or plan.encoders
        for value in experiment.values
        for system in experiment.systems or plan.systems
    ]


def list_runs(plan: Plan) -> list[Run]:
    """Every run once, with the collections of all cells that show it.

    Experiment by experiment, but the first seed of everything first, so that what is done is a table at any time.
    """
    found: dict[str, Run] = {}
    for run in (run for cell in list_cells(plan) for run in cell.runs):
        before = found.get(run.key)
        sources = (*before.sources, *run.sources) if before else run.sources
        found[run.key] = replace(before or run, sources=tuple(dict.fromkeys(sources)))
    return sorted(found.values(), key=lambda run: run.settings.seed)


def list_sources(plan: Plan, experiment: str) -> list[str]:
    """The collections of an experiment, by their sources."""
    return [plan.collections[name] for name in plan.experiments[experiment].collections or plan.collections]


def _make_runs(plan: Plan, experiment: Experiment, encoder: str, name: str, value: object) -> tuple[Run, ...]:
    system, varied = plan.systems[name], dict(experiment.values[value])
    sources = tuple(plan.collections[shown] for shown in experiment.collections or plan.collections)
    option = varied.pop("source", "")
    data = system.data or experiment.data
    register()  # losses that only these plans have
    settings = FitSettings(
        **plan.settings
        | plan.encoders[encoder]
        | system.settings
        | plan.tuned.get(encoder, {}).get(name, {})
        | varied
        | {"data": tuple(_add_option(source, option) for source in plan.data[data])}
        | {"exclude": tuple(sorted(set(plan.collections.values())))}
    )
    if system.ranker != FIT:
        return (Run(system.ranker, settings, sources, name if system.ranker == BM25 else f"{name} ({encoder})"),)
    at = f", {experiment.vary} {value}" if experiment.vary else ""
    return tuple(
        Run(FIT, replace(settings, seed=seed), sources, f"{name}, seed {seed} ({encoder}, {data}{at})")
        for seed in range(experiment.seeds)
    )


def _add_option(source: str, option: str) -> str:
    return f"{source}{'&' if '?' in source else '?'}{option}" if option else source


# What several plans have.
MINILM = {"model": "sentence-transformers/all-MiniLM-L6-v2", "document_max_length": 128}
THREE_LAYERS = MINILM | {"layers": 3}
PARAPHRASE = {"model": "encoders/paraphrase-MiniLM-L3-v2", "document_max_length": 128}
CRANFIELD_CODES = "grades=-1:4,1:4,2:3,3:2,4:1"  # from 1, a complete answer, to 4; -1 is the source paper
DEV_SCIFACT = "beir/scifact/train?queries=benchmarks/queries/dev-scifact.txt"
DEV_CRANFIELD = f"cranfield?queries=benchmarks/queries/dev-cranfield.txt&{CRANFIELD_CODES}"
LARGE_MODELS = {"scifact": "graded/scifact.jsonl", "cranfield": "graded/cranfield.jsonl"}  # lists: who wrote them
LISTS = {  # of gradret gen, for the same queries and others
    name: f"benchmarks/results/lists/{name}:train?query_file={queries}"
    for name, queries in (
        *LARGE_MODELS.items(),
        ("npl", "beir/npl/queries.jsonl"),
        ("medquad", "queries/medquad-train.jsonl"),
    )
}
LABELS = {
    "scifact": f"beir/scifact/train?queries={LARGE_MODELS['scifact']}&grades=1:3",
    "cranfield": f"cranfield?queries={LARGE_MODELS['cranfield']}&{CRANFIELD_CODES}&sample=4",
}
MEASURES = ("nDCG@10", "R@100", "RR@10")
SETTINGS = {"epochs": 2.0, "temperature": 0.02, "targets": "sqrt", "ground": "sqrt", "interpolate": 1.0}
DEFAULT = "wasserstein:.15+contrast:.85"


def each(name: str, *values: object) -> dict[object, dict]:
    """A setting that takes each of the values, as Experiment.values."""
    return {value: {name: value} for value in values}


SYSTEMS = {  # of all plans
    "untrained": System("untrained", ranker=UNTRAINED),
    "infonce": System("InfoNCE, highest grade positive", {"loss": "infonce"}),
    "infonce-2": System("InfoNCE, grades 2 and 3 positive", {"loss": "infonce", "positive_from": 2.0}),
    "infonce-1": System("InfoNCE, grades 1 to 3 positive", {"loss": "infonce", "positive_from": 1.0}),
    "kl": System("listwise cross-entropy (kl)", {"loss": "kl"}),
    "gaussian-sqrt": System("Gaussian Wasserstein, root targets", {"loss": "gaussian"}),
    "contrast": System("contrast", {"loss": "contrast"}),
    "wasserstein-1": System("Wasserstein, order 1", {"loss": "wasserstein", "order": 1}),
    "wasserstein-2": System("Wasserstein, order 2", {"loss": "wasserstein", "order": 2}),
}
