"""A grid of runs: which encoders, systems, data and collections meet, and which runs they need."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property

from gradret.console import GradretError
from gradret.data.sources import parse_source
from gradret.settings import FitSettings

FIT, UNTRAINED, BM25 = RANKERS = ("fit", "untrained", "bm25")
SOURCE_OPTIONS = ("shuffle", "grades", "sample", "labels")  # that an experiment may vary, on every source of its data
DEFAULTS = {f.name: f.default for f in fields(FitSettings) if f.default is not MISSING}
ENCODER_FIELDS = ("model", *FitSettings().encoder_options)
OWN_FIELDS = ("data", "seed")  # of a run's record, beside its settings
MEAN = "mean"  # of the collections, a column of its own in every table


@dataclass(frozen=True)
class System:
    """A row of the tables.

    Attributes:
        label: its name for people.
        ranker: "fit" (trained), "untrained" (the encoder as it is) or "bm25".
        settings: fields of FitSettings in which it differs from the grid's.
        data: a name in Grid.data, instead of the experiment's.
        seeds: number of runs, instead of the experiment's.
    """

    name: str
    label: str
    ranker: str
    settings: Mapping
    data: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A table, or a chart: systems trained on one data set and measured on some collections.

    Attributes:
        name: of the letters a to z, digits and hyphens.
        data: a name in Grid.data; None where every system trained has its own.
        encoders, systems, collections: names in the grid, in the order shown.
        seeds: runs of a system that is trained; None for the grid's.
        vary: a field of FitSettings, or one of SOURCE_OPTIONS, that takes each of `values`; None for none.
    """

    name: str
    title: str
    data: str | None
    encoders: tuple[str, ...]
    systems: tuple[str, ...]
    collections: tuple[str, ...]
    seeds: int | None = None
    vary: str | None = None
    values: tuple | None = None


@dataclass(frozen=True)
class Run:
    """One training, untrained encoder or BM25, with all that decides its outcome; equal runs are one.

    Attributes:
        ranker: see System.
        settings: what fit gets. Of an untrained encoder only its encoder's fields and its precision can differ from
            the defaults, of BM25 none do.
    """

    ranker: str
    settings: FitSettings

    def record(self) -> dict:
        """JSON-serialisable: the settings that differ from the defaults, those of the encoder and the data apart."""
        changed = {k: as_json(v) for k, v in vars(self.settings).items() if v != DEFAULTS[k]}
        fitted = self.ranker == FIT
        encoder = {k: changed[k] for k in ENCODER_FIELDS if k in changed}
        return {
            "ranker": self.ranker,
            "encoder": {} if self.ranker == BM25 else {"model": self.settings.model, **encoder},
            "settings": {k: v for k, v in sorted(changed.items()) if k not in (*ENCODER_FIELDS, *OWN_FIELDS)},
            "data": list(self.settings.data) if fitted else [],
            "seed": self.settings.seed if fitted else None,
        }

    @cached_property
    def key(self) -> str:
        """A hash of the record."""
        return hash_record(self.record())


@dataclass(frozen=True)
class Cell:
    """A row of an experiment's table: one system with one encoder, and one value where the experiment varies one.

    Attributes:
        data: what it is trained on, a name in Grid.data; None for what is not trained.
        value: of what the experiment varies; None where it varies nothing.
        collections: names of its columns.
        runs: one a seed; a single one for what is not trained.
    """

    experiment: str
    encoder: str
    system: str
    data: str | None
    value: object
    collections: tuple[str, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Grid:
    """A benchmark's plan.

    Attributes:
        measures: canonical ir_measures names; the first is the one tested.
        seeds: runs of a system that is trained, with seeds 0, 1, ...
        baselines: systems that the others are tested against.
        primary: the system set off in charts, or None.
        settings: of every run, before the encoder's, the system's and the varied one; its `exclude` holds all
            collections, sorted, so that no run trains on a query that any experiment measures.
        encoders: name -> fields of FitSettings: the encoder's own, and others that suit it, such as a learning rate.
        data: name -> sources.
        collections: name shown -> source.
        tuned: encoder -> system -> fields of FitSettings for the two together, over those of either.
        where: the file it was read from, which opens messages; "" for none.
    Raises: GradretError where settings do not go together.
    """

    title: str
    measures: tuple[str, ...]
    seeds: int
    baselines: tuple[str, ...]
    primary: str | None
    settings: FitSettings
    encoders: Mapping[str, Mapping]
    data: Mapping[str, tuple[str, ...]]
    collections: Mapping[str, str]
    systems: Mapping[str, System]
    experiments: tuple[Experiment, ...]
    tuned: Mapping[str, Mapping[str, Mapping]] = field(default_factory=dict)
    where: str = ""

    def cells(self) -> list[Cell]:
        """All rows of all tables: experiment by experiment, in each encoder by encoder, value by value."""
        return [
            self._make_cell(experiment, encoder, self.systems[system], value)
            for experiment in self.experiments
            for encoder in experiment.encoders
            for value in (experiment.values if experiment.vary else (None,))
            for system in experiment.systems
        ]

    def wanted(self) -> dict[Run, tuple[str, ...]]:
        """Every run once, in the order of the cells, with the sources of all collections it is to be measured on."""
        found: dict[Run, dict[str, None]] = {}
        for cell in self.cells():
            for run in cell.runs:
                found.setdefault(run, {}).update(dict.fromkeys(self.collections[name] for name in cell.collections))
        return {run: tuple(sources) for run, sources in found.items()}

    def tell(self, place: str, message: str) -> str:
        """A message that opens with the file and a place in it, if the grid was read from one."""
        return f"{self.where}: {place}: {message}" if self.where else message

    def _make_cell(self, experiment: Experiment, encoder: str, system: System, value) -> Cell:
        fitted, vary = system.ranker == FIT, experiment.vary
        name = (system.data or experiment.data) if fitted else None
        varied = {vary: value} if vary and vary not in SOURCE_OPTIONS else {}
        layers = [
            (f"[encoders.{encoder}]", self.encoders[encoder]),
            (f"[systems.{system.name}]", system.settings),
            (f"[encoders.{encoder}.systems.{system.name}]", self.tuned.get(encoder, {}).get(system.name, {})),
            (f"[[experiments]] {experiment.name}", varied),
        ]
        settings = self._merge(layers)
        if not fitted:
            runs = (self._leave_untrained(system.ranker, settings),)
            return Cell(experiment.name, encoder, system.name, None, value, experiment.collections, runs)
        if name is None:
            raise GradretError(
                self.tell(f"[[experiments]] {experiment.name}", f"names no data, which '{system.name}' is trained on")
            )
        sources = self.data[name]
        if vary in SOURCE_OPTIONS:
            sources = tuple(add_source_option(source, vary, value) for source in sources)
            try:
                for source in sources:
                    parse_source(source)
            except GradretError as error:
                raise GradretError(self.tell(f"[[experiments]] {experiment.name}", str(error))) from None
        settings = replace(settings, data=sources)
        seeds = next(s for s in (system.seeds, experiment.seeds, self.seeds) if s is not None)
        runs = tuple(Run(FIT, replace(settings, seed=seed)) for seed in range(seeds))
        return Cell(experiment.name, encoder, system.name, name, value, experiment.collections, runs)

    def _merge(self, layers: list[tuple[str, Mapping]]) -> FitSettings:
        """The grid's settings with each layer's over them; what is wrong is told of the layer that brought it."""
        changed, places, message = {}, {}, ""
        for place, layer in layers:
            changed |= layer
            try:
                settings, message = replace(self.settings, **changed), ""
            except ValueError as error:  # what a later layer mends is no mistake
                message = str(error)
                places.setdefault(message, place)
        if message:
            raise GradretError(self.tell(places[message], message))
        return settings

    def _leave_untrained(self, ranker: str, settings: FitSettings) -> Run:
        if ranker == BM25:
            return Run(BM25, FitSettings(data=()))
        kept = {name: getattr(settings, name) for name in ENCODER_FIELDS}
        return Run(UNTRAINED, FitSettings(data=(), precision=settings.precision, **kept))


def add_source_option(source: str, name: str, value) -> str:
    """A source's spelling with one more option; none for shuffle=0, which is the source as it is."""
    if name == "shuffle" and value == 0:
        return source
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{source}{'&' if '?' in source else '?'}{name}={shown}"


def hash_record(record: dict) -> str:
    """The key of a Run.record."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def as_json(value):
    """A setting's value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
