"""What the runs of a grid read, opened and checked before the first of them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain

import torch

from gradret.bench.grid import BM25, FIT, Cell, Grid, Run
from gradret.console import GradretError
from gradret.data.collections import Collection, IrDatasetsCollection
from gradret.data.lists import query_words
from gradret.data.sources import ListsSummary, MixedLists, check_lists, open_collection, parse_source
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import parse_measures
from gradret.settings import FitSettings
from gradret.train.loop import check_grades
from gradret.train.mining import BM25 as BY_BM25
from gradret.train.mining import BM25_SPELLING, Mining, import_bm25s, open_pool, parse_mining


class GridInputs:
    """Everything that the runs of a grid read, each thing opened once.

    Args:
        grid: its collections are opened, also those that no run is measured on: their queries are not trained on.
    Attributes:
        collections: source -> collection.
    Raises: GradretError when anything can not be read, or a package is not installed, that a run would need.
    """

    def __init__(self, grid: Grid):
        self._grid = grid
        self.collections: dict[str, Collection] = {}
        self._lists: dict[tuple, tuple[str, ListsSummary]] = {}
        self._others: dict[object, str] = {}  # fingerprints of encoders and of what is mined from
        self._content: dict[str, dict] = {}
        self._measured: dict[str, str] = {}
        for name, source in grid.collections.items():
            with self._placed(f"[collections] {name}"):
                self._open(source)
        for source in grid.settings.exclude:
            with self._placed("[settings] exclude"):
                self._open(source)
        for cell in grid.cells():
            for run in cell.runs:
                if run.key not in self._content:
                    self._content[run.key] = self._check(cell, run)

    def find_content(self, run: Run) -> dict:
        """Fingerprints of what the run's settings name: a row of other content is not this run's."""
        return self._content[run.key]

    def find_collection_content(self, source: str) -> str:
        """A fingerprint of a collection's queries, judgments and documents; of ir_datasets', of how many there are."""
        if source not in self._measured:
            collection = self.collections[source]
            told = [collection.queries, collection.qrels, collection.document_count]
            known = isinstance(collection, IrDatasetsCollection)  # its files have one content for all
            documents = () if known else (f"\0{d.doc_id}\0{d.content}".encode() for d in collection.documents())
            self._measured[source] = _digest(chain([json.dumps(told).encode()], documents))
        return self._measured[source]

    def count_lists(self, run: Run) -> int | None:
        """The lists a run is trained on; None for what is not trained."""
        return len(self._lists[_name_lists(run.settings)][1].kept) if run.ranker == FIT else None

    def _open(self, source: str) -> Collection:
        if source not in self.collections:
            self.collections[source] = open_collection(parse_source(source))
        return self.collections[source]

    def _check(self, cell: Cell, run: Run) -> dict:
        system = f"[systems.{cell.system}]"
        if run.ranker == BM25:
            with self._placed(system):
                import_bm25s("ranker = 'bm25'")
            return {}
        with self._placed(f"[encoders.{cell.encoder}]"):
            content = {"encoder": self._fingerprint_encoder(run.settings)}
        if run.ranker == FIT:
            with self._placed(system):
                if run.settings.dev:
                    self._open(run.settings.dev)
                mining = parse_mining(run.settings.mine) if run.settings.mine else None
                if mining is not None:
                    content["pool"] = self._check_mining(mining)
                parse_measures([run.settings.dev_measure])
                if run.settings.lora and find_spec("peft") is None:
                    raise GradretError("lora needs the package peft: pip install 'gradret[lora]'")
            with self._placed(f"[data] {cell.data}"):
                content["data"], summary = self._check_lists(run.settings)
            with self._placed(system):
                check_grades(run.settings, summary, mining)
        return content

    @contextmanager
    def _placed(self, place: str) -> Iterator[None]:
        """What is wrong in here is told with its place in the grid's file."""
        try:
            yield
        except GradretError as error:
            raise GradretError(self._grid.tell(place, str(error))) from None

    def _fingerprint_encoder(self, settings: FitSettings) -> str:
        options = settings.encoder_options
        name = (settings.model, *options.values())
        if name not in self._others:
            self._others[name] = _digest_weights(load_encoder(settings.model, device="cpu", **options))
        return self._others[name]

    def _check_lists(self, settings: FitSettings) -> tuple[str, ListsSummary]:
        name = _name_lists(settings)
        if name not in self._lists:
            lists = MixedLists([parse_source(source) for source in settings.data], seed=settings.seed)
            measured = [self._open(s) for s in (*settings.exclude, settings.dev) if s is not None]
            queries = {query_words(text) for collection in measured for text in collection.queries.values()}
            summary = check_lists(lists, refuse_negative=settings.weighs_from_zero, exclude=queries)
            # A file of queries that selects others changes what is kept, and no source.
            self._lists[name] = _digest([lists.fingerprint.encode(), summary.kept.tobytes()]), summary
        return self._lists[name]

    def _check_mining(self, mining: Mining) -> str:
        if mining.by == BY_BM25:
            import_bm25s(BM25_SPELLING)
        if mining.source is None:
            return ""
        if mining.source not in self._others:
            self._others[mining.source] = open_pool(mining.source).fingerprint
        return self._others[mining.source]


def _digest_weights(encoder: Encoder) -> str:
    # Not Encoder.fingerprint: its configuration differs between versions of transformers, and rows may be joined.
    parts = []
    for name, tensor in sorted(encoder.state_dict().items()):
        parts.append(f"{name} {tuple(tensor.shape)}".encode())
        parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return _digest(parts)


def _digest(parts: Iterable) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _name_lists(settings: FitSettings) -> tuple:
    return settings.data, settings.exclude, settings.dev, settings.weighs_from_zero
