"""Sources as the user names them: a file, a BEIR directory or an ir_datasets id, with options after a '?'."""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gradret.collection import BeirCollection, Collection, IrDatasetsCollection, ListCollection
from gradret.errors import GradretError
from gradret.lists import ListFile, RankingList, decode_json, hash64, open_file, query_key
from gradret.settings import SAMPLE

LABELS = ("intended", "judged", "agreed")


@dataclass(frozen=True)
class Source:
    """`NAME[?grades=...&sample=K&queries=...&labels=...]`, parsed.

    Attributes:
        name: a path, `DIR:SPLIT`, an ir_datasets id, or `sample`.
        grades: pairs (old, new): as training data only these grades are used, each under its new value;
            as a collection to evaluate on, the others keep theirs. None uses all as they are.
        sample: as training data, at most this many passages a query, drawn with the run's seed.
        shuffle: as training data, the share of lists whose grades change places among their passages, drawn with the
            run's seed: label noise, to see what a loss makes of it.
        queries: `even`, `odd` (by the number the query id ends in) or a file of query ids, one a line; or of ranking
            lists or BEIR queries, for theirs.
        drop_self: as a collection, whether a document with the query's id is left out; None: by its name.
        labels: which of the grades of generated lists to train on: `intended`, those asked for; `judged`, those the
            model gave afterwards, real numbers; `agreed`, those asked for, of lists where both are in one order.
        query_file: the texts of a directory's queries, in the form of BEIR's queries.jsonl, where it has none itself:
            SyCL's published lists have MS MARCO's.
    """

    name: str
    grades: tuple[tuple[float, float], ...] | None = None
    sample: int | None = None
    shuffle: float = 0.0
    queries: str | None = None
    drop_self: bool | None = None
    labels: str = "intended"
    query_file: str | None = None


def parse_source(text: str) -> Source:
    """A Source from its spelling, e.g. `beir/scifact/train?grades=1:3&sample=2`. Raises: GradretError."""
    name, _, query = text.partition("?")
    if not name:
        raise GradretError(f"source '{text}': expected a file, a BEIR directory or an ir_datasets id before the '?'")
    options: dict[str, Any] = {}
    for option in filter(None, query.split("&")):
        key, _, value = option.partition("=")
        if key in options:
            raise GradretError(f"{text}: {key} stands there twice; give it once")
        if key == "grades":
            options[key] = parse_grade_map(value)
        elif key == "sample":
            if not value.isdecimal() or int(value) == 0:
                raise GradretError(f"{text}: sample '{value}' is not a whole number above 0")
            options[key] = int(value)
        elif key == "shuffle":
            options[key] = _parse_share(value, text)
        elif key in ("queries", "query_file") and value:
            options[key] = value
        elif key == "drop_self" and value in ("yes", "no"):
            options[key] = value == "yes"
        elif key == "labels" and value in LABELS:
            options[key] = value
        else:
            raise GradretError(
                f"{text}: option '{option}' is not known; "
                "use grades=OLD:NEW,..., sample=K, shuffle=SHARE, queries=even|odd|FILE, query_file=FILE, "
                "labels=intended|judged|agreed or drop_self=yes|no"
            )
    if options.get("labels") == "judged" and "grades" in options:
        raise GradretError(
            f"{text}: judged grades are any real numbers, which grades= can not list; "
            "leave out one of the two, or use labels=agreed"
        )
    return Source(name, **options)


def _parse_share(value: str, text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(value) <= 1:
            return float(value)
    raise GradretError(f"{text}: shuffle '{value}' is not a number from 0 to 1")


def parse_grade_map(text: str) -> tuple[tuple[float, float], ...]:
    """Pairs (old, new) from `1:3,2` (1 becomes 3, 2 stays); `=` may stand for `:`. Raises: GradretError."""
    pairs = []
    for item in text.split(","):
        old, _, new = item.replace("=", ":").partition(":")
        try:
            pair = float(old), float(new or old)
            if not all(map(math.isfinite, pair)):
                raise ValueError
            pairs.append(pair)
        except ValueError:
            raise GradretError(
                f"grade map '{text}': expected OLD:NEW or GRADE, separated by commas, got '{item}'"
            ) from None
    return tuple(pairs)


def find_path(name: str) -> Path | None:
    """The file or directory a source's name stands for; None when it can only be an ir_datasets id."""
    if name == SAMPLE:
        return Path(str(resources.files("gradret") / "data" / "sample.jsonl"))
    directory, _ = _split_directory(name)
    if directory.is_dir():
        return directory
    if os.path.exists(name):
        return Path(name)
    if name.endswith((".jsonl", ".json", ".tsv")) or name.startswith((".", "/", "~")):
        raise GradretError(f"{name}: no such file")
    return None


def _split_directory(name: str) -> tuple[Path, str]:
    head, colon, split = name.rpartition(":")
    return (Path(head), split) if colon and Path(head).is_dir() else (Path(name), "test")


def open_collection(source: Source) -> Collection:
    """The collection to evaluate on, its queries selected and its grades mapped. Raises: GradretError."""
    for name, default in (("sample", None), ("shuffle", 0.0), ("labels", "intended")):
        if (value := getattr(source, name)) != default:
            raise GradretError(f"{source.name}: {name}={value} is for training lists, not for a collection to measure")
    path = find_path(source.name)
    if source.query_file is not None and not (path and path.is_dir()):
        raise GradretError(f"{source.name}: query_file is for a directory without queries.jsonl; leave it out")
    collection: Collection
    if path is None:
        collection = IrDatasetsCollection(source.name)
    elif path.is_dir():
        queries = None if source.query_file is None else Path(source.query_file)
        collection = BeirCollection(*_split_directory(source.name), queries)
    else:
        collection = ListCollection(path)
    if source.queries is not None:
        select = query_selector(source.queries)
        collection.queries = {q: text for q, text in collection.queries.items() if select(q)}
        if not collection.queries:
            raise GradretError(f"{source.name}: queries={source.queries} selects none of its queries")
    if source.grades is not None:
        mapping = dict(source.grades)
        for query_id, grades in collection.qrels.items():
            collection.qrels[query_id] = {d: mapping.get(grade, grade) for d, grade in grades.items()}
    if source.drop_self is not None:
        collection.drop_self = source.drop_self
    return collection


def query_selector(selection: str) -> Callable[[str], bool]:
    """A function of a query id: whether `even`, `odd` or the ids in a file hold it. Raises: GradretError."""
    if selection not in ("even", "odd"):
        with open_file(selection) as file:
            chosen = {_read_id(line, f"{selection}:{number}") for number, line in enumerate(file, 1)}
        return chosen.__contains__

    def has_parity(query_id: str) -> bool:
        number = re.search(r"\d+$", query_id)
        if number is None:
            raise GradretError(
                f"queries={selection}: query id '{query_id}' does not end in a number; name a file of ids"
            )
        return int(number.group()) % 2 == (selection == "odd")

    return has_parity


def _read_id(line: bytes, where: str) -> str:
    """The query id in a line of a file that selects queries: the line, or what its JSON object says."""
    if not line.startswith(b"{"):
        return line.decode("utf-8", "replace").strip()
    record = decode_json(line, where)
    query_id = record.get("query_id", record.get("_id"))
    if query_id is None:
        raise GradretError(f"{where}: has neither query_id nor _id; expected a query id a line, lists or BEIR queries")
    return str(query_id)


def open_lists(source: Source) -> Sequence[RankingList]:
    """A source's ranking lists by position, before its options; see mix.MixedLists. Raises: GradretError."""
    if source.drop_self is not None:
        raise GradretError(f"{source.name}: drop_self is for a collection to measure, not for training lists")
    path = find_path(source.name)
    if path is not None and path.is_file() and source.query_file is None:
        return ListFile(path)
    if source.labels != "intended":
        raise GradretError(
            f"{source.name}: labels={source.labels} is for the ranking-list files of gradret gen --judge; leave it out"
        )
    return JudgedLists(open_collection(Source(source.name, query_file=source.query_file)))


class JudgedLists(Sequence[RankingList]):
    """A collection's judgments as ranking lists: each query with its judged documents, read when asked for."""

    def __init__(self, collection: Collection):
        self._collection = collection
        self._query_ids = list(collection.queries)
        self.ids = np.array([hash64(q) for q in self._query_ids], np.uint64)
        self.keys = np.array([query_key(q, t) for q, t in collection.queries.items()], np.uint64)
        judgments = (f"{q} {d} {g}" for q in self._query_ids for d, g in collection.qrels[q].items())
        self.fingerprint = f"{hash64(collection.name, *collection.queries.values(), *judgments):016x}"

    def __len__(self) -> int:
        return len(self._query_ids)

    def __getitem__(self, index: int) -> RankingList:  # type: ignore[override]  # no slices
        query_id = self._query_ids[index]
        grades = self._collection.qrels[query_id]
        documents = self._collection.read_documents(grades)
        passages = []
        for doc_id, grade in grades.items():
            if doc_id in documents:
                documents[doc_id].grade = grade
                passages.append(documents[doc_id])
        where = f"{self._collection.name} query {query_id}"
        return RankingList(query_id, self._collection.queries[query_id], passages, where=where)
