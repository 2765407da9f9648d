"""How a grid is spelled: a TOML file, or the options of `gradret bench quality`."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradret.bench.grid import ENCODER_FIELDS, FIT, MEAN, RANKERS, SOURCE_OPTIONS, UNTRAINED, Experiment, Grid, System
from gradret.bench.grid_place import HINTS, NOT_HERE, Place
from gradret.console import GradretError
from gradret.data.lists import open_file
from gradret.data.sources import parse_source
from gradret.settings import DEFAULT_MEASURES, FitSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


TOP_KEYS = ("title", "measures", "seeds", "baselines", "primary")
TABLES = ("settings", "encoders", "data", "collections", "systems", "experiments")
SYSTEM_KEYS = ("label", "ranker", "data", "seeds")
EXPERIMENT_KEYS = ("name", "title", "data", "encoders", "systems", "collections", "seeds", "vary", "values")
DEFAULT_SEEDS = 3
BASELINE = "infonce"


def read_grid(path: str | Path) -> Grid:
    """The grid of a TOML file. Raises: GradretError `FILE: [where]: ...` for whatever is wrong in it."""
    with open_file(path) as file:
        try:
            content = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise GradretError(f"{path}: not valid TOML ({error})") from None
    top = Place(path, "", content)
    top.know(*TOP_KEYS, *TABLES)

    def table(name: str, kind: type = dict):
        found = content.get(name, kind())
        if not isinstance(found, kind):
            raise Place(path, f"[{name}]", {}).error(f"expected {'[[experiments]]' if kind is list else 'a table'}")
        return found

    place = Place(path, "[settings]", table("settings"))
    fields = [name for name in HINTS if name not in NOT_HERE]
    given = place.read_settings([*fields, "exclude"])
    collections = {k: _read_source(Place(path, "[collections]", {}), k, v) for k, v in table("collections").items()}
    if not collections:
        raise top.error("[collections] names nothing to measure on")
    if MEAN in collections:
        raise Place(path, "[collections]", {}).error(f"'{MEAN}' is the name of the collections' mean; choose another")
    given["exclude"] = tuple(sorted({*given.get("exclude", ()), *collections.values()}))
    try:
        settings = FitSettings(**given)
    except ValueError as error:
        raise place.error(str(error)) from None
    data = {k: _read_data(Place(path, "[data]", {}), k, v) for k, v in table("data").items()}
    encoders = {
        name: {"model": settings.model} | Place(path, f"[encoders.{name}]", found).read_settings(fields, ("systems",))
        for name, found in table("encoders").items()
    } or {_short_name(settings.model): {"model": settings.model}}
    systems = {
        name: _read_system(Place(path, f"[systems.{name}]", found), name, data, fields)
        for name, found in table("systems").items()
    }
    tuned = {
        name: _read_tuned(Place(path, f"[encoders.{name}.systems]", found.get("systems", {})), systems, fields)
        for name, found in table("encoders").items()
    }
    if not systems:
        raise top.error("[systems.NAME]: none is there; name one at least")
    experiments = []
    known = {"data": data, "encoders": encoders, "systems": systems, "collections": collections}
    for number, found in enumerate(table("experiments", list), 1):
        where = found.get("name", number) if isinstance(found, dict) else number
        experiments.append(_read_experiment(Place(path, f"[[experiments]] {where}", found), **known))
        if [e.name for e in experiments].count(experiments[-1].name) > 1:
            raise top.error(f"[[experiments]] {where}: another experiment has this name")
    if not experiments:
        raise top.error("[[experiments]]: none is there; write one at least")
    grid = Grid(
        title=top.read("title", str, Path(path).stem),
        measures=canonical_measures(top.read("measures", tuple[str, ...], DEFAULT_MEASURES), top.error),
        seeds=top.read_count("seeds", DEFAULT_SEEDS),
        baselines=top.read_names("baselines", systems),
        primary=top.find("primary", top.read("primary", str), systems),
        settings=settings,
        encoders=encoders,
        data=data,
        collections=collections,
        systems=systems,
        experiments=tuple(experiments),
        tuned={name: found for name, found in tuned.items() if found},
        where=str(path),
    )
    grid.cells()  # whatever does not go together shows here
    return grid


def _read_source(place: Place, key: str, value: object) -> str:
    source = place.convert(key, value, str)
    try:
        parse_source(source)
    except GradretError as error:
        raise place.error(f"{key}: {error}") from None
    return source


def _read_data(place: Place, key: str, value: object) -> tuple[str, ...]:
    sources = place.convert(key, value, tuple[str, ...])
    if not sources:
        raise place.error(f"{key}: names no source")
    return tuple(_read_source(place, key, source) for source in sources)


def _read_system(place: Place, name: str, data: Mapping, fields: Sequence[str]) -> System:
    ranker = place.read("ranker", str, FIT)
    if ranker not in RANKERS:
        raise place.error(f"ranker: expected one of {', '.join(RANKERS)}, got '{ranker}'")
    if ranker != FIT:
        place.know("label", "ranker")
    label = place.read("label", str, name)
    settings = place.read_settings(fields, SYSTEM_KEYS)
    own_data = place.find("data", place.read("data", str), data)
    return System(name, label, ranker, settings, own_data, place.read_count("seeds"))


def _read_tuned(place: Place, systems: Mapping[str, System], fields: Sequence[str]) -> dict[str, dict]:
    place.know(*systems)
    found = {}
    for name, content in place.content.items():
        own = Place(place.path, f"{place.where[:-1]}.{name}]", content)
        if systems[name].ranker != FIT:
            raise own.error(f"'{name}' is not trained, so it has no settings")
        found[name] = own.read_settings(fields)
    return found


def _read_experiment(place: Place, *, data: Mapping, encoders: Mapping, systems: Mapping, collections: Mapping):
    place.know(*EXPERIMENT_KEYS)
    name = place.read("name", str, "")
    if not re.fullmatch("[a-z0-9-]+", name):
        raise place.error(f"name: expected letters a to z, digits and hyphens, got '{name}'")
    vary, values = place.read("vary", str), place.content.get("values")
    if (vary is None) != (values is None):
        raise place.error("vary and values belong together; give both or none")
    if vary is not None:
        values = _read_values(place, vary, values)
    return Experiment(
        name=name,
        title=place.read("title", str, name),
        data=place.find("data", place.read("data", str), data),
        encoders=place.read_names("encoders", encoders, encoders),
        systems=place.read_names("systems", systems, systems),
        collections=place.read_names("collections", collections, collections),
        seeds=place.read_count("seeds"),
        vary=vary,
        values=values,
    )


def _read_values(place: Place, vary: str, values: object) -> tuple:
    if (vary not in HINTS or vary in NOT_HERE) and vary not in SOURCE_OPTIONS:
        raise place.error(
            f"vary: '{vary}' is neither a setting of fit nor one of {', '.join(SOURCE_OPTIONS)}, options of a source"
        )
    if not isinstance(values, list) or not values:
        raise place.error(f"values: expected a list of values of {vary}, got {values!r}")
    hint = HINTS.get(vary, int | float | str)
    found = tuple(place.convert("values", value, hint) for value in values)
    if len(set(found)) < len(found):
        raise place.error(f"values: one stands there twice in {values!r}")
    return found


def canonical_measures(names: Sequence[str], error: Callable[[str], Exception] = GradretError) -> tuple[str, ...]:
    """ir_measures' names as it writes them, each once. Raises: what `error` makes of a name that is not known."""
    from gradret.evaluation.measures import DEFAULT_DEPTH, parse_measures

    try:
        found = tuple(parse_measures(names, DEFAULT_DEPTH))
    except GradretError as reason:
        raise error(str(reason)) from None
    if not found:
        raise error("measures: names none")
    return found


def make_grid(
    rows: Mapping[str, FitSettings], *, seeds: int, datasets: Sequence[str], measures: Sequence[str] = DEFAULT_MEASURES
) -> Grid:
    """The grid of the command's options: each loss on the same lists and budget, and the untrained encoder.

    Args:
        rows: name -> settings, alike but for what the row is about; seed and exclude are replaced.
        seeds: runs a loss.
        datasets: collections, see sources.parse_source.
    Raises: GradretError when two rows are one.
    """
    first = next(iter(rows.values()))
    encoder, data = _short_name(first.model), "+".join(first.data)
    if len(set(rows.values())) < len(rows):
        raise GradretError(f"--losses {','.join(rows)}: the same loss stands there twice")
    encoder_fields = {name: getattr(first, name) for name in ENCODER_FIELDS}
    systems = {UNTRAINED: System(UNTRAINED, UNTRAINED, UNTRAINED, {})}
    for name, settings in rows.items():
        own = {k: v for k, v in vars(settings).items() if k not in (*ENCODER_FIELDS, "data", "seed", "exclude")}
        systems[name] = System(name, name, FIT, own)
    collections = tuple(dict.fromkeys(datasets))
    experiment = Experiment("quality", f"Trained on {data}", data, (encoder,), tuple(systems), collections)
    return Grid(
        title="Retrieval quality",
        measures=canonical_measures(measures),
        seeds=seeds,
        baselines=(BASELINE,) if BASELINE in systems else (),
        primary=None,
        settings=FitSettings(
            exclude=tuple(sorted({*first.exclude, *datasets})), precision=first.precision, data=first.data
        ),
        encoders={encoder: encoder_fields},
        data={data: first.data},
        collections={name: name for name in collections},
        systems=systems,
        experiments=(experiment,),
    )


def _short_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model
