"""Retrieval quality: the runs of a grid, each trained and measured once and kept as a row."""

import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradret.bench.grid import BM25, FIT, Cell, Grid, Run
from gradret.bench.grid_file import make_grid
from gradret.bench.grid_inputs import GridInputs
from gradret.bench.grid_rows import GridRows, list_defaults
from gradret.bench.quality_report import draw_quality, format_quality, make_document  # noqa: F401
from gradret.console import GradretError, Interrupted, StopRequest, command_line, say
from gradret.data.collections import Collection
from gradret.data.sources import open_collection, parse_source
from gradret.encoder.load import choose_precision, load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import DEFAULT_DEPTH, Evaluation, evaluate, measure_run
from gradret.files import replace_json, versions
from gradret.settings import FitSettings
from gradret.train.loop import fit
from gradret.train.mining import search_bm25

ROWS_FILE = "rows.jsonl"
PER_QUERY_DIGITS = 4
NOT_TRAINED = {"fit_seconds": None, "steps": None, "lists": None}


@dataclass(frozen=True)
class Outcome:
    """What is there after a call of run_grid.

    Attributes:
        rows: key of a run -> its row, of all runs of the grid that are done, by whomever.
        collections: name shown -> source, queries, documents.
        planned: runs of the grid.
        error: a signal that ended it before its last run, or which runs failed; None where all are done.
    """

    rows: dict[str, dict]
    collections: dict[str, dict]
    planned: int
    error: str | None = None


def run_grid(
    grid: Grid,
    out: str | Path,
    *,
    device: str | None = None,
    shard: tuple[int, int] = (1, 1),
    max_runs: int | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Outcome:
    """Do the runs of a grid that have no row in `out`/rows.jsonl yet, and add one for each as it ends.

    Args:
        out: a folder; several processes may share it.
        device: as of fit.
        shard: (i, n): only every n-th run, from the i-th.
        max_runs: end after so many runs; with 0 nothing is opened but the rows, which are taken as they are, whatever
            version of gradret wrote them.
        fresh: do runs again that are done already, after removing the rows of those alone.
        progress: show bars on a terminal.
    Returns: all rows there are; also when a signal ended a run or runs failed, see Outcome.error.
    Raises: GradretError, before the first run, when anything that a run needs is not there; or when a row can not be
        written.
    """
    rows, wanted = GridRows(Path(out, ROWS_FILE)), grid.wanted()
    own = list(wanted)[shard[0] - 1 :: shard[1]]
    stopped, failures, inputs = False, [], None
    if max_runs != 0:
        with StopRequest() as stop:
            with stop.at_once():
                inputs = GridInputs(grid)
            if inputs is None:
                raise GradretError("stopped before the first run; the same command starts again")
            if fresh:
                rows.drop({run.key for run in own[:max_runs]})
            found = choose_rows(rows.read(), wanted, grid.measures, inputs, tell=True)
            todo = [run for run in own if run.key not in found]
            if len(todo) < len(own):
                part = f" of shard {shard[0]}/{shard[1]}" if shard[1] > 1 else ""
                done = f"{len(own) - len(todo)} of {len(own)} runs{part} are done already in {rows.path}"
                say(f"{done}; --fresh measures again")
            stopped, failures = Worker(grid, inputs, device, progress).work(todo[:max_runs], own, wanted, rows, stop)
    found = choose_rows(rows.read(all_versions=max_runs == 0, tell=False), wanted, grid.measures, inputs)
    again = "the same command without --fresh" if fresh else "the same command"
    if len(failures) > 1:
        failures = [f"{len(failures)} runs failed, which {again} tries again: {'; '.join(failures)}"]
    if stopped:
        failures.append(f"stopped when {len(found)} of {len(wanted)} runs were done; {again} does the rest")
    return Outcome(found, describe_collections(grid, found, inputs), len(wanted), "; ".join(failures) or None)


def measure_quality(
    rows: Mapping[str, FitSettings],
    *,
    datasets: Sequence[str],
    seeds: int,
    measures: Sequence[str],
    out: str | Path,
    device: str | None = None,
    fresh: bool = False,
) -> tuple[dict, str | None]:
    """The document of `gradret bench quality`, and what was left undone and why; None where nothing was.

    Args:
        rows: what is compared, beside the untrained encoder: name -> settings.
    """
    grid = make_grid(rows, seeds=seeds, datasets=datasets, measures=measures)
    outcome = run_grid(grid, out, device=device, fresh=fresh)
    document = make_document(grid, outcome.rows, {"command": command_line(), "collections": outcome.collections})
    with GridRows(Path(out, ROWS_FILE)).locked():  # processes that share a folder may end at the same time
        replace_json(Path(out, "quality.json"), document)
        draw_quality(document, Path(out, "quality.png"))
    return document, outcome.error


class Worker:
    """Does runs, one after the other."""

    def __init__(self, grid: Grid, inputs: GridInputs, device: str | None, progress: bool):
        self._grid, self._inputs, self._device, self._progress = grid, inputs, device, progress
        self._names = {source: name for name, source in reversed(grid.collections.items())}
        self._titles: dict[str, str] = {}
        self._versions = versions()  # of the code that runs, whatever the checkout becomes meanwhile
        for cell in grid.cells():
            for run in cell.runs:
                self._titles.setdefault(run.key, _describe_run(grid, cell, run))

    def work(
        self,
        todo: Sequence[Run],
        plan: Sequence[Run],
        wanted: Mapping[Run, Sequence[str]],
        rows: GridRows,
        stop: StopRequest,
    ) -> tuple[bool, list[str]]:
        """Do the runs in `todo`, a part of `plan`.

        Returns: whether a signal ended it; and which runs failed, and why.
        Raises: GradretError when a row can not be written.
        """
        failures: list[str] = []
        numbers = {run: number for number, run in enumerate(plan, 1)}
        began = time.monotonic()
        for done, run in enumerate(todo, 1):
            if stop.signal is not None:
                return True, failures
            title, row = f"run {numbers[run]} of {len(plan)}: {self._titles[run.key]}", None
            say(title)
            try:
                with stop.at_once():
                    row = self.measure(run, wanted[run])
            except (Interrupted, KeyboardInterrupt):  # fit itself heard the signal, or a second one
                return True, failures
            except Exception as error:
                reason = str(error)
                if not isinstance(error, GradretError):  # a fault of a run's own must not cost the others
                    traceback.print_exception(error)
                    reason = f"{type(error).__name__}: {error}"
                failures.append(f"{title}: {reason}")
                say(f"{failures[-1]}; going on with the others")
                continue
            if row is None:
                return True, failures
            with stop.uninterrupted():
                rows.append(row)
            if left := len(todo) - done:
                mean_s = (time.monotonic() - began) / done
                say(f"{left} run{'s' if left > 1 else ''} to go, about {_show_time(left * mean_s)}")
        return False, failures

    def measure(self, run: Run, sources: Sequence[str]) -> dict:
        """The row of a run. Raises: GradretError; Interrupted."""
        collections = {source: self._inputs.collections[source] for source in sources}
        if run.ranker == BM25:
            facts, where, precision = NOT_TRAINED, "cpu", None
            found = {
                s: measure_run(search_bm25(c, depth=DEFAULT_DEPTH), c, self._grid.measures)
                for s, c in collections.items()
            }
        else:
            with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
                encoder, facts = self._make_encoder(run, Path(temporary))
                precision = choose_precision(run.settings.precision, encoder.device)
                options = {"measures": self._grid.measures, "precision": precision, "progress": self._progress}
                found = {s: evaluate(encoder, c, **options) for s, c in collections.items()}
            where = encoder.device.type
        return {
            "run": run.record(),
            "defaults": list_defaults() if run.ranker == FIT else {},
            "content": self._inputs.find_content(run),
            "collections": {source: self._keep(source, result) for source, result in found.items()},
            **facts,
            "versions": self._versions,
            "device": where,
            "precision": precision,
        }

    def _make_encoder(self, run: Run, folder: Path) -> tuple[Encoder, dict]:
        """The encoder to measure, trained in a folder below `folder`, and what a row says of the training."""
        settings = run.settings
        if run.ranker != FIT:
            encoder = load_encoder(settings.model, device=self._device, **settings.encoder_options)
            return encoder, NOT_TRAINED
        result = fit(settings, folder / "run", device=self._device, progress=self._progress)
        facts = {"fit_seconds": round(result.seconds, 1), "steps": result.steps, "lists": self._inputs.count_lists(run)}
        return load_encoder(str(result.out), device=self._device, trust_remote_code=settings.trust_remote_code), facts

    def _keep(self, source: str, result: Evaluation) -> dict:
        """What a row keeps of a measurement, which is shown."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.measures.items())
        say(f"{self._names[source]}: {shown}")
        first, collection = self._grid.measures[0], self._inputs.collections[source]
        per_query = {query: round(value, PER_QUERY_DIGITS) for query, value in result.per_query[first].items()}
        content = self._inputs.find_collection_content(source)
        return {"measures": result.measures, "per_query": {first: per_query}, "content": content, **_count(collection)}


def choose_rows(
    stored: Mapping[str, Sequence[dict]],
    wanted: Mapping[Run, Sequence[str]],
    measures: Sequence[str],
    inputs: GridInputs | None = None,
    *,
    tell: bool = False,
) -> dict[str, dict]:
    """Key of a run -> its latest row that has all collections and measures wanted, for the runs that have one.

    Args:
        stored: see GridRows.read.
        wanted: see Grid.wanted.
        inputs: rows of other data, encoders or collections than these are left out; None takes them as they are.
        tell: say how many rows are not used, and why.
    """
    found, others = {}, Counter()
    for run, sources in wanted.items():
        there = stored.get(run.key, ())
        rows = [row for row in there if _is_whole(row, sources, measures)]
        same = [row for row in rows if inputs is None or _has_content(row, run, sources, inputs)]
        if same:
            found[run.key] = same[0]
        elif rows:
            others["done with data, an encoder or a collection that changed since: again"] += 1
        elif there:
            others["done without a measure or a collection that is wanted now: again"] += 1
    others["done with other settings or collections than are planned now: kept, not used"] = len(
        stored.keys() - {run.key for run in wanted}
    )
    for what, count in others.items() if tell else ():
        if count:
            say(f"{count} run{'s were' if count > 1 else ' was'} {what}")
    return found


def describe_collections(grid: Grid, rows: Mapping[str, dict], inputs: GridInputs | None) -> dict[str, dict]:
    """Name shown -> source, queries and documents, without opening what a row tells."""
    told = {s: c for row in rows.values() for s, c in row["collections"].items() if "documents" in c}
    sizes = {}
    for name, source in grid.collections.items():
        if inputs is not None:
            size = _count(inputs.collections[source])
        elif source in told:
            size = {key: told[source][key] for key in ("queries", "documents")}
        else:
            size = _count(open_collection(parse_source(source)))
        sizes[name] = {"source": source, **size}
    return sizes


def _count(collection: Collection) -> dict:
    return {"queries": len(collection.queries), "documents": collection.document_count}


def _is_whole(row: dict, sources: Sequence[str], measures: Sequence[str]) -> bool:
    there = [row["collections"].get(source, {}) for source in sources]
    return all(set(measures) <= c.get("measures", {}).keys() and measures[0] in c.get("per_query", {}) for c in there)


def _has_content(row: dict, run: Run, sources: Sequence[str], inputs: GridInputs) -> bool:
    there = row["collections"]
    measured = all(there[s].get("content") == inputs.find_collection_content(s) for s in sources)
    return measured and row.get("content") == inputs.find_content(run)


def _describe_run(grid: Grid, cell: Cell, run: Run) -> str:
    experiment = next(e for e in grid.experiments if e.name == cell.experiment)
    if run.ranker == BM25:
        return cell.system
    if run.ranker != FIT:
        return f"{cell.system} ({cell.encoder})"
    varied = f", {experiment.vary} {cell.value}" if experiment.vary else ""
    return f"{cell.system}, seed {run.settings.seed} ({cell.encoder}, {cell.data}{varied})"


def _show_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
