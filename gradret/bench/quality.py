"""Retrieval quality of losses: each is trained on the same lists with several seeds, measured, and compared.

From top to bottom: the command (measure_quality), a run and its record (Run), the file of rows (Rows), what runs read
(OpenedInputs), the runs themselves (do_runs), and what is made of their rows: means, p-values, a table and a chart.
benchmarks/quality does a larger plan of runs with the same parts.
"""

import hashlib
import json
import math
import os
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from gradret.bench import format_table
from gradret.console import GivenUp, GradretError, Interrupted, StopRequest, command_line, count_of, say
from gradret.data.collections import Collection, IrDatasetsCollection
from gradret.data.lists import decode_json, open_file
from gradret.data.sources import ListsSummary, open_collection, parse_source
from gradret.encoder.load import choose_precision, load_encoder
from gradret.evaluation.measures import DEFAULT_DEPTH, evaluate, measure_run, parse_measures, split_measures
from gradret.evaluation.significance import compare_systems, find_differences
from gradret.files import replacing, versions, write_json, writing
from gradret.settings import AUTO, FitSettings
from gradret.train.loop import check_loss_suits, fit, open_lists
from gradret.train.mining import import_bm25s, open_pool, parse_mining, search_bm25

FIT, UNTRAINED, BM25 = "fit", "untrained", "bm25"
BASELINE = "infonce"  # the row that the others are tested against, if it is there
MEAN = "mean"  # of the collections, a column of its own
ROWS_FILE = "rows.jsonl"
PER_QUERY_DIGITS = 4
# What of the package decides a run's outcome. A row made by other code than this is not taken for the run's. The
# compiled kernels are not among it: tests hold every path to the same loss, and a machine's build is its own.
DECIDING = ("settings.py", "distributed.py", "data", "loss", "encoder", "evaluation", "train")
RECORDED = {  # fields of FitSettings that make two runs differ
    FIT: tuple(field.name for field in fields(FitSettings)),
    UNTRAINED: ("model", *FitSettings().encoder_options, "precision"),
    BM25: (),
}
PLAIN, EDGE = "#a9b4c0", "#3c4650"


def measure_quality(
    settings: Mapping[str, Mapping[str, FitSettings]],
    *,
    datasets: Sequence[str],
    seeds: int,
    measures: str,
    out: str | Path,
    device: str | None,
    fresh: bool,
) -> tuple[dict, str | None]:
    """Train and measure every row with every seed, beside the untrained encoders; write quality.json and quality.png.

    Runs that have a row in `out`/rows.jsonl are not done again.

    Args:
        settings: encoder -> name of a row -> its settings, alike but for what the rows are about; seed and exclude are
            replaced.
        datasets: collections to measure on, see sources.parse_source.
        measures: names of ir_measures, separated by commas; the first is the one tested.
        out: an existing folder; several processes may share it.
        device, fresh: see do_runs.
    Returns: the document of quality.json, see make_document, and what was left undone and why, None if nothing was.
    Raises: GradretError, before the first run, when anything that a run needs is not there.
    """
    names, sources = tuple(parse_measures(split_measures(measures), DEFAULT_DEPTH)), tuple(dict.fromkeys(datasets))
    runs = {encoder: _plan_runs(encoder, rows, sources, seeds) for encoder, rows in settings.items()}
    rows, error = do_runs(_list_planned(runs), out, measures=names, device=device, fresh=fresh)
    document = make_document(runs, rows, names, sources)
    with Rows(Path(out, ROWS_FILE)).locked():  # processes that share a folder may end at the same time
        write_json(Path(out, "quality.json"), document)
        draw_quality(document, Path(out, "quality.png"))
    return document, error


def _list_planned(runs: Mapping[str, Mapping[str, Sequence["Run"]]]) -> list["Run"]:
    return [run for of_encoder in runs.values() for of_name in of_encoder.values() for run in of_name]


def _plan_runs(
    encoder: str, settings: Mapping[str, FitSettings], sources: tuple[str, ...], seeds: int
) -> dict[str, list["Run"]]:
    """Name of a row -> its runs, the untrained encoder's first."""
    first = next(iter(settings.values()))
    exclude, data = tuple(sorted({*first.exclude, *sources})), "+".join(first.data)
    runs = {UNTRAINED: [Run(UNTRAINED, replace(first, exclude=exclude), sources, f"{UNTRAINED} ({encoder})")]}
    for name, chosen in settings.items():
        runs[name] = [
            Run(FIT, replace(chosen, exclude=exclude, seed=seed), sources, f"{name}, seed {seed} ({encoder}, {data})")
            for seed in range(seeds)
        ]
    return runs


# --- a run and its row


@dataclass(frozen=True)
class Run:
    """One encoder, trained or not, or BM25, to be measured on collections.

    Attributes:
        ranker: FIT, UNTRAINED or BM25.
        settings: what fit gets; of an untrained encoder its encoder and precision count, of BM25 nothing.
        sources: collections to measure on.
        title: what it is, for people.
    """

    ranker: str
    settings: FitSettings
    sources: tuple[str, ...]
    title: str

    def record(self) -> dict:
        """All that decides its outcome, JSON-serialisable."""
        return {
            "ranker": self.ranker,
            "settings": {name: getattr(self.settings, name) for name in RECORDED[self.ranker]},
        }

    @cached_property
    def key(self) -> str:
        """A hash of the record: runs of one key are one."""
        return find_key(self.record())


def find_key(record: Mapping) -> str:
    """The key of a run's record. A setting that it lacks, as there was none yet, counts as the default."""
    defaults = {f.name: f.default for f in fields(FitSettings) if f.name in RECORDED.get(record["ranker"], ())}
    whole = {**record, "settings": {**defaults, **record["settings"]}}
    return _digest([json.dumps(whole, sort_keys=True).encode()])


def digest_code(others: Iterable[Path] = ()) -> str:
    """A digest of the files of the package that decide a run's outcome, see DECIDING, and of others that do."""
    root = Path(__file__).parents[1]
    files = sorted(path for name in DECIDING for path in (root / name, *(root / name).rglob("*.py")) if path.is_file())
    named = [*((str(path.relative_to(root)), path) for path in files), *((path.name, path) for path in others)]
    return _digest(part for name, path in named for part in (name.encode(), path.read_bytes()))


class Rows:
    """rows.jsonl: a line holds the record of a run (Run.record) and what came of it, and stays as it was written.

    A last line that a kill has cut short is dropped.

    Args:
        path: need not exist.
    Raises: GradretError when the file cannot be read or written, or a line is no row.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def locked(self) -> filelock.BaseFileLock:
        """Entered while no other process that shares the folder writes."""
        return filelock.FileLock(f"{self.path}.lock")

    def read(self) -> dict[str, list[dict]]:
        """Key of a run -> its rows, the latest first."""
        found: dict[str, list[dict]] = {}
        for _, row in self._read_lines():
            found.setdefault(find_key(row["run"]), []).insert(0, row)
        return found

    def append(self, row: dict) -> None:
        """Write a row at the end and wait until it is on the disk."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with writing(self.path), self.locked(), open(self.path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a kill, or a full disk, has cut short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def drop(self, keys: set[str]) -> None:
        """Remove the rows of these runs."""
        with writing(self.path), self.locked():
            kept = [line for line, row in self._read_lines() if find_key(row["run"]) not in keys]
            with replacing(self.path) as file:
                file.write(b"".join(kept))

    def _read_lines(self) -> Iterator[tuple[bytes, dict]]:
        """Every whole line with its newline, and what it holds."""
        if not self.path.exists():
            return
        with open_file(self.path) as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            where = f"{self.path}:{number}"
            try:
                row = decode_json(line, where)
            except GradretError as error:
                raise GradretError(f"{error}; remove the line, and its run is done again") from None
            if not _is_row(row):
                raise GradretError(f"{where}: is no row of gradret bench; remove the line, or name another --out")
            yield line + b"\n", row


def _is_row(row: object) -> bool:
    """Whether it has what the tables are made of, numbers where numbers belong."""
    try:
        measured = [c["measures"].values() for c in row["collections"].values()]
        measured += [q.values() for c in row["collections"].values() for q in c["per_query"].values()]
        there = {"versions", "device", "fit_seconds", "steps", "lists"} <= row.keys()
        row["run"]["settings"].keys(), row["run"]["ranker"]
        return there and all(math.isfinite(value) for values in measured for value in values)
    except (AttributeError, KeyError, TypeError):
        return False


# --- what runs read


class OpenedInputs:
    """Everything that runs read, each thing opened once and checked before the first run.

    Attributes:
        code, versions: of the code that runs, whatever the checkout becomes meanwhile; see digest_code.
        content: key of a run -> fingerprints of what its settings name: a row of other content is not the run's.
        lists: key of a run that trains -> how many lists it trains on.
    Raises: GradretError when anything cannot be read, or a package is not installed, that a run would need.
    """

    def __init__(self, runs: Sequence[Run], code: Iterable[Path] = ()):
        self.code, self.versions = digest_code(code), versions()
        self.content: dict[str, dict[str, str]] = {}
        self.lists: dict[str, int] = {}
        self._found: dict[tuple, Any] = {}
        for run in runs:
            self._check(run)

    def open(self, source: str) -> Collection:
        return self._once(("opened", source), lambda: open_collection(parse_source(source)))

    def digest_collection(self, source: str) -> str:
        """A fingerprint of a collection's queries, judgments and documents; of ir_datasets', of how many there are."""

        def digest() -> str:
            collection = self.open(source)
            told = [collection.queries, collection.qrels, collection.document_count]
            known = isinstance(collection, IrDatasetsCollection)  # its files have one content for all
            documents = () if known else (f"\0{d.doc_id}\0{d.content}".encode() for d in collection.documents())
            return _digest(chain([json.dumps(told).encode()], documents))

        return self._once(("collection", source), digest)

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def _check(self, run: Run) -> None:
        """Fill in content and lists. What needs no reading, such as a measure's name, fit itself checks at once."""
        settings, content = run.settings, self.content.setdefault(run.key, {})
        for source in run.sources:
            self.open(source)
        if run.ranker == BM25:
            import_bm25s()
            return
        options = settings.encoder_options
        content["encoder"] = self._once(
            ("encoder", settings.model, *options.values()),
            lambda: load_encoder(settings.model, device="cpu", **options).fingerprint(),
        )
        if run.ranker == FIT:
            mining = parse_mining(settings.mine) if settings.mine else None
            if mining is not None and mining.source is not None:
                pool = mining.source
                content["pool"] = self._once(("pool", pool), lambda: open_pool(pool).fingerprint)
            key = ("lists", settings.data, settings.exclude, settings.dev, settings.weighs_from_zero, settings.seed)
            key = (*key, settings.interpolate == AUTO)
            content["data"], summary = self._once(key, lambda: self._check_lists(settings))
            self.lists[run.key] = len(summary.kept)
            check_loss_suits(settings, summary, mining)

    def _check_lists(self, settings: FitSettings) -> tuple[str, ListsSummary]:
        measured = [self.open(source) for source in (*settings.exclude, settings.dev) if source is not None]
        lists, summary = open_lists(settings, measured)
        # A file of queries that selects others changes what is kept, and no source.
        return _digest([lists.fingerprint.encode(), summary.kept.tobytes()]), summary


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# --- the runs


def do_runs(
    runs: Sequence[Run],
    out: str | Path,
    *,
    measures: Sequence[str],
    device: str | None = None,
    fresh: bool = False,
    code: Iterable[Path] = (),
) -> tuple[dict[str, dict], str | None]:
    """Do the runs that have no row in `out`/rows.jsonl yet, and add one for each as it ends.

    A row is a run's when its record is the same, it was made by the same code from the same data, encoder and
    collections, and has all that is wanted now.

    Args:
        device: as of fit.
        fresh: do runs again that are done already, after removing their rows.
        code: files outside the package that decide a run's outcome, too.
    Returns: key of a run -> its row, of those done by whomever; and a line on what was left undone by a signal or by
        runs that failed, None where all are done.
    Raises: GradretError, before the first run, when anything that a run needs is not there; or when a row cannot be
        written.
    """
    stored, failures, stopped = Rows(Path(out, ROWS_FILE)), [], False
    with StopRequest() as stop:
        inputs = None
        with suppress(GivenUp), stop.give_up(0):
            inputs = OpenedInputs(runs, code)
        if inputs is None:
            raise GradretError("stopped before the first run; the same command starts again")
        if fresh:
            stored.drop({run.key for run in runs})
        there = stored.read()
        done = choose_rows(there, runs, measures, inputs)
        if done:
            say(f"{len(done)} of {len(runs)} runs are done already in {stored.path}; --fresh measures again")
        if stale := sum(run.key in there and run.key not in done for run in runs):
            what = "other code, data, encoders, collections or measures than there are now"
            say(f"{stale} run{'s were' if stale > 1 else ' was'} done with {what}: again")
        todo = [(number, run) for number, run in enumerate(runs, 1) if run.key not in done]
        began = time.monotonic()
        for count, (number, run) in enumerate(todo, 1):
            title, row = f"run {number} of {len(runs)}: {run.title}", None
            try:
                with suppress(GivenUp), stop.give_up(0):
                    say(title)
                    row = measure_row(run, inputs, measures, device)
            except (Interrupted, KeyboardInterrupt):  # fit itself heard the signal, or a second one
                pass
            except Exception as error:
                reason = str(error)
                if not isinstance(error, GradretError):  # a fault of a run's own must not cost the others
                    traceback.print_exception(error)
                    reason = f"{type(error).__name__}: {error}"
                failures.append(f"{title}: {reason}")
                say(f"{failures[-1]}; going on with the others")
                continue
            if row is None:
                stopped = True
                break
            with stop.uninterrupted():
                stored.append(row)
            if left := len(todo) - count:
                rest = tqdm.format_interval((time.monotonic() - began) / count * left)
                say(f"{left} run{'s' if left > 1 else ''} to go, about {rest}")
    found = choose_rows(stored.read(), runs, measures, inputs)
    again = "the same command without --fresh" if fresh else "the same command"
    if len(failures) > 1:
        failures = [f"{len(failures)} runs failed, which {again} tries again: {'; '.join(failures)}"]
    if stopped:
        failures.append(f"stopped when {len(found)} of {len(runs)} runs were done; {again} does the rest")
    return found, "; ".join(failures) or None


def measure_row(run: Run, inputs: OpenedInputs, measures: Sequence[str], device: str | None) -> dict:
    """Train what a run trains, measure it on its collections: its row.

    Raises: GradretError; Interrupted.
    """
    collections = {source: inputs.open(source) for source in run.sources}
    facts: dict = {"fit_seconds": None, "steps": None, "share": None, "lists": inputs.lists.get(run.key)}
    if run.ranker == BM25:
        where, precision = "cpu", None
        found = {s: measure_run(search_bm25(c, depth=DEFAULT_DEPTH), c, measures) for s, c in collections.items()}
    else:
        with tempfile.TemporaryDirectory(prefix="gradret-") as folder:
            name, options = run.settings.model, run.settings.encoder_options
            if run.ranker == FIT:
                result = fit(run.settings, Path(folder, "run"), device=device)
                facts |= {"fit_seconds": round(result.seconds, 1), "steps": result.steps, "share": result.share}
                name, options = str(result.out), {"trust_remote_code": run.settings.trust_remote_code}
            encoder = load_encoder(name, device=device, **options)
            where, precision = encoder.device.type, choose_precision(run.settings.precision, encoder.device)
            found = {s: evaluate(encoder, c, measures=measures, precision=precision) for s, c in collections.items()}
    kept = {}
    for source, result in found.items():
        say(f"{source}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.measures.items()))
        per_query = {query: round(v, PER_QUERY_DIGITS) for query, v in result.per_query[measures[0]].items()}
        kept[source] = {
            "measures": result.measures,
            "per_query": {measures[0]: per_query},
            "content": inputs.digest_collection(source),
            "queries": len(collections[source].queries),
            "documents": collections[source].document_count,
        }
    return {
        "run": run.record(),
        "content": inputs.content[run.key],
        "collections": kept,
        **facts,
        "device": where,
        "precision": precision,
        "code": inputs.code,
        "versions": inputs.versions,
    }


def choose_rows(
    stored: Mapping[str, Sequence[dict]],
    runs: Sequence[Run],
    measures: Sequence[str],
    inputs: OpenedInputs | None = None,
) -> dict[str, dict]:
    """Key of a run -> its latest row that has all collections and measures wanted, for the runs that have one.

    Args:
        stored: see Rows.read.
        inputs: rows of other code, data, encoders or collections than these are left out; None takes them as they are.
    """
    found = {}
    for run in runs:
        for row in stored.get(run.key, ()):
            there = [row["collections"].get(source, {}) for source in run.sources]
            wanted = all({*measures} <= c.get("measures", {}).keys() and measures[0] in c["per_query"] for c in there)
            if wanted and (inputs is None or _is_of(row, run, inputs)):
                found.setdefault(run.key, row)
    return found


def _is_of(row: dict, run: Run, inputs: OpenedInputs) -> bool:
    if row.get("code") != inputs.code or row.get("content") != inputs.content[run.key]:
        return False
    return all(row["collections"][s].get("content") == inputs.digest_collection(s) for s in run.sources)


# --- what is made of rows


def make_document(
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    rows: Mapping[str, dict],
    measures: Sequence[str],
    sources: Sequence[str],
) -> dict:
    """Everything measured so far, JSON-serialisable: what the tables and the chart are made of.

    Args:
        runs: encoder -> name of a row -> its runs.
        rows: key of a run -> its row of rows.jsonl.
    """
    planned = _list_planned(runs)
    used = [rows[run.key] for run in planned if run.key in rows]
    sizes = {s: {k: c[k] for k in ("queries", "documents")} for r in used for s, c in r["collections"].items()}
    return {
        "command": command_line(),
        "measures": list(measures),
        "baseline": BASELINE if BASELINE in next(iter(runs.values())) else None,
        "done": len(used),
        "planned": len(planned),
        "collections": {source: sizes[source] for source in sources if source in sizes},
        "versions": collect_versions(used),
        "encoders": [
            {
                "encoder": encoder,
                "settings": {name: _record_settings(of_name[0]) for name, of_name in of_encoder.items()},
                "rows": tabulate(of_encoder, rows, measures, sources, [BASELINE]),
            }
            for encoder, of_encoder in runs.items()
        ],
    }


def _record_settings(run: Run) -> dict:
    return {name: value for name, value in run.record()["settings"].items() if name != "seed"}


def tabulate(
    runs: Mapping[str, Sequence[Run]],
    rows: Mapping[str, dict],
    measures: Sequence[str],
    sources: Sequence[str],
    baselines: Sequence[str],
) -> list[dict]:
    """The rows of a table, JSON-serialisable: "system", its name, how many "runs" are done and "wanted", and "columns".

    "columns" hold, for each collection and (if there are several) MEAN, the "mean" over seeds of every measure, "sd"
    (None for a single run), each seed's "values", and "p": for each baseline the p-values of the first measure, each
    query's mean over seeds against the baseline's. They are there where all runs of both are done, with several seeds
    of what is trained, as seeds move a mean like queries do; and corrected (Holm) for the rows of the column.

    Args:
        runs, rows: see make_document.
    Raises: GradretError when two runs were measured on different queries of the same collection.
    """
    done = {name: [rows[run.key] for run in planned if run.key in rows] for name, planned in runs.items()}
    found = {name: summarise(done[name], sources, measures) for name in runs}
    complete = [name for name, planned in runs.items() if len(done[name]) == len(planned)]
    tested = [name for name in complete if runs[name][0].ranker != FIT or len(runs[name]) > 1]
    for source in sources:
        queries = [row["collections"][source]["per_query"][measures[0]].keys() for name in tested for row in done[name]]
        if any(found_there != queries[0] for found_there in queries):
            raise GradretError(f"{source}: rows differ in their queries, so it has changed since; measure with --fresh")
    per_query = {name: {s: mean_per_query(done[name], s, measures[0]) for s in sources} for name in tested}
    for (baseline, column), p_values in compare_columns(per_query, baselines, sources).items():
        for name, p in p_values.items():
            found[name][column]["p"][baseline] = p
    return [
        {"system": name, "runs": len(done[name]), "wanted": len(planned), "columns": found[name]}
        for name, planned in runs.items()
    ]


def collect_versions(rows: Sequence[dict]) -> list[dict]:
    """What made the rows, each once; the versions name a GPU where there is one, also of runs that did without it."""
    found: list[dict] = []
    for row in rows:
        there = row["versions"] | {"ran_on": row["device"], "precision": row.get("precision")}  # BM25 has none
        if there not in found:
            found.append(there)
    return found


def summarise(rows: Sequence[dict], sources: Sequence[str], measures: Sequence[str]) -> dict[str, dict]:
    """Collection, and with several their mean -> "mean" over rows, "sd" and "values" of each measure; {} of no rows."""
    if not rows:
        return {}
    by_seed = {source: [row["collections"][source]["measures"] for row in rows] for source in sources}
    if len(sources) > 1:
        seeds = zip(*by_seed.values(), strict=True)
        by_seed[MEAN] = [{m: float(np.mean([values[m] for values in seed])) for m in measures} for seed in seeds]
    columns = {}
    for name, seeds in by_seed.items():
        values = {m: [seed[m] for seed in seeds] for m in measures}
        columns[name] = {
            "mean": {m: float(np.mean(v)) for m, v in values.items()},
            "sd": {m: float(np.std(v, ddof=1)) if len(v) > 1 else None for m, v in values.items()},
            "values": values,
            "p": {},
        }
    return columns


def mean_per_query(rows: Sequence[dict], source: str, measure: str) -> dict[str, float]:
    """Each query's mean over rows of the same queries."""
    runs = [row["collections"][source]["per_query"][measure] for row in rows]
    return {query: sum(run[query] for run in runs) / len(runs) for query in runs[0]}


def compare_columns(
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]], baselines: Sequence[str], sources: Sequence[str]
) -> dict[tuple[str, str], dict[str, dict]]:
    """(baseline, collection), and with several (baseline, MEAN) -> name -> p-values, see compare_systems.

    Args:
        per_query: name -> collection -> query -> value, of the same queries for all names.
    """
    families = {}
    for baseline in (name for name in baselines if name in per_query):
        differences = {
            name: [find_differences(values[s], per_query[baseline][s]) for s in sources]
            for name, values in per_query.items()
            if name != baseline
        }
        for number, source in enumerate(sources):
            families[baseline, source] = {name: [samples[number]] for name, samples in differences.items()}
        if len(sources) > 1:
            families[baseline, MEAN] = differences
    return compare_systems(families)


# --- the table and the chart

DASH = "–"
LINE, COLUMN = 110, 15  # characters of a line and of a column's name


def format_quality(document: dict) -> str:
    """Tables for a terminal, by encoder: with several collections one of the first measure, then one per collection."""
    measures, columns = document["measures"], _list_columns(document)
    rows = [row for found in document["encoders"] for row in found["rows"]]
    seeds = count_of(max(row["wanted"] for row in rows), "seed")
    blocks = []
    for found in document["encoders"]:
        if len(columns) != 1:
            cells = {name_column(column): (column, measures[0]) for column in columns}
            blocks.append(_format_block(document, found, f"{measures[0]}, {seeds}", cells, "p"))
        for column in columns:
            title = name_column(column)
            if size := document["collections"].get(column):
                queries = count_of(size["queries"], "query", "queries")
                title += f": {queries}, {count_of(size['documents'], 'document')}"
            cells = {measure: (column, measure) for measure in measures}
            blocks.append(_format_block(document, found, f"{title}, {seeds}", cells, f"p ({measures[0]})"))
    if any(column.get("p") for row in rows for column in row["columns"].values()):
        note = f"p: paired randomisation test over queries against {document['baseline']}, Holm-corrected for the "
        blocks.append(textwrap.fill(note + "systems compared", LINE))
    if document["done"] < document["planned"]:
        blocks.append(f"{document['done']} of {document['planned']} runs are done")
    return "\n\n".join(blocks)


def _list_columns(document: dict) -> list[str]:
    """The collections, and with several MEAN, as far as anything is done."""
    rows = (row for found in document["encoders"] for row in found["rows"])
    return next((list(row["columns"]) for row in rows if row["columns"]), [])


def _format_block(document: dict, found: dict, title: str, cells: Mapping[str, tuple[str, str]], p_name: str) -> str:
    """An encoder's table under its title; without the spreads where it would be too wide.

    Args:
        cells: header -> column and measure. The p-values of the last one's column follow, where something is tested.
    """
    rows, baseline = found["rows"], document["baseline"]
    last = next(reversed(cells.values()), ("",))[0]
    p_values = [row["columns"].get(last, {}).get("p", {}).get(baseline) for row in rows]
    names = [*cells, *([p_name] * any(p_values))]
    header = [found["encoder"], *("\n".join(textwrap.wrap(name, COLUMN)) for name in names)]
    for spreads in (True, False):
        lines = []
        for row, p in zip(rows, p_values, strict=True):
            missing = f" ({row['runs']}/{row['wanted']})" if 0 < row["runs"] < row["wanted"] else ""
            line = [row["system"] + missing]
            for column, measure in cells.values():
                there = row["columns"].get(column)
                sd = there["sd"][measure] if there and spreads else None
                line.append(show_value(there["mean"][measure], sd) if there else DASH)
            if any(p_values):
                line.append("" if row["system"] == baseline else show_p(p and p["randomisation_holm"]))
            lines.append(line)
        text = format_table(header, lines)
        if max(map(len, text.splitlines())) <= LINE:
            break
    return f"{textwrap.fill(title, LINE)}\n{text}"


def name_column(column: str) -> str:
    """The column's name in a header."""
    return "mean of collections" if column == MEAN else column


def show_value(mean: float, sd: float | None = None) -> str:
    """`0.6479 ± 0.0015`, or `0.6479` of a single run."""
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def show_p(p: float | None) -> str:
    """`0.012`, `<0.001`, or a dash where nothing was tested."""
    return DASH if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def draw_quality(document: dict, path: Path) -> None:
    """A PNG of the first measure: a line of panels per encoder, one per collection and for their mean.

    A panel has a bar per row, with whiskers of one sd.
    """
    import matplotlib
    from matplotlib.figure import Figure

    encoders, measure = document["encoders"], document["measures"][0]
    columns = _list_columns(document) or [""]
    height = sum(1.2 + 0.27 * len(found["rows"]) for found in encoders)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a user's dollar sign opens no formula
        figure = Figure(figsize=(2.4 + 2.3 * len(columns), height), layout="constrained")
        panels = figure.subplots(len(encoders), len(columns), squeeze=False, sharex=True, sharey="row")
        for line, found in zip(panels, encoders, strict=True):
            for axes, column in zip(line, columns, strict=True):
                draw_bars(axes, {row["system"]: row["columns"].get(column) for row in found["rows"]}, measure)
                axes.set_title(f"{found['encoder']}\n{name_column(column)}", fontsize=9, loc="left")
        figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_bars(axes, columns: Mapping[str, dict | None], measure: str) -> None:
    """Horizontal bars from top to bottom: name -> what summarise gives of a column, None without a bar."""
    places = range(len(columns))
    means = [column["mean"][measure] if column else 0.0 for column in columns.values()]
    spread = [(column["sd"][measure] or 0.0) if column else 0.0 for column in columns.values()]
    axes.barh(places, means, 0.72, color=PLAIN)
    for place, column, mean, sd in zip(places, columns.values(), means, spread, strict=True):
        if sd:
            axes.errorbar(mean, place, xerr=sd, color=EDGE, capsize=2, linewidth=1)
        text = f"{mean:.4f}" if column else DASH
        axes.annotate(text, (mean + sd, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(places, list(columns))
    axes.set_ylim(len(columns) - 0.5, -0.5)  # the first row on top
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.3 * max(map(sum, zip(means, spread, strict=True)), default=1.0) or 1.0))
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(measure)
