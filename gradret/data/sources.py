"""Several sources merged into one ranking list per query, with grade selection, remapping and sampling."""

import os
import random
import re
from array import array
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gradret.console import BAR_DELAY_S, GradretError, count_of, show_bar
from gradret.data.collections import BeirCollection, IrDatasetsCollection, ListCollection, choose_split
from gradret.data.lists import (
    GRADE_LIMIT,
    JUDGED,
    TEXT_CHARACTERS,
    Line,
    ListFile,
    Passage,
    RankingList,
    decode_json,
    grades_agree,
    hash64,
    is_grade,
    parse_id,
    query_key,
    query_words,
    read_lines,
)
from gradret.settings import MEDQUAD, SAMPLE

COUNT_DIGITS = 18  # what an int64 holds
LABELS = ("intended", "judged", "agreed")
BUNDLED = {SAMPLE: "sample.jsonl", MEDQUAD: "medquad"}  # what the package carries, by its name as a source


@dataclass(frozen=True)
class Source:
    """`NAME[?grades=...&sample=K&queries=...&labels=...]`, parsed.

    Attributes:
        name: a path, `DIR:SPLIT`, an ir_datasets id, `sample` or `medquad`. `DIR` alone is its only split, or of
            several `test`.
        grades: pairs (old, new): as training data only these grades are used, each under its new value;
            as a collection to evaluate on, the others keep theirs. None uses all as they are.
        sample: as training data, at most this many passages per query, drawn with the run's seed.
        shuffle: as training data, the share of lists whose grades change places among their passages, drawn with the
            run's seed: label noise, to see what a loss makes of it.
        queries: `even`, `odd` (by the number the query id ends in) or a file of query ids, one per line; or of ranking
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


def parse_options(
    place: str, items: Iterable[str], forms: Mapping[str, tuple[Callable[[str], Any], str]], usage: str
) -> dict[str, Any]:
    """The values of items KEY=VALUE.

    Args:
        place: opens every message.
        forms: by key, what reads a value, and what it should have been where that raises a KeyError or a ValueError.
        usage: says what there is, for a key that is not known.
    Raises: GradretError.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if key not in forms or not equals:
            raise GradretError(f"{place}: option '{item}' is not known; use {usage}")
        if key in found:
            raise GradretError(f"{place}: {key} stands there twice; give it once")
        parse, expected = forms[key]
        try:
            found[key] = parse(value)
        except (KeyError, ValueError):
            raise GradretError(f"{place}: {key} '{value}' is not {expected}") from None
    return found


def parse_source(text: str) -> Source:
    """A Source from its spelling, e.g. `beir/scifact/train?grades=1:3&sample=2`. Raises: GradretError."""
    name, _, query = text.partition("?")
    if not name:
        raise GradretError(f"source '{text}': expected a file, a BEIR directory or an ir_datasets id before the '?'")
    options = parse_options(text, filter(None, query.split("&")), OPTIONS, USAGE)
    if options.get("labels") == "judged" and "grades" in options:
        raise GradretError(
            f"{text}: judged grades are any real numbers, which grades= cannot list; "
            "leave out one of the two, or use labels=agreed"
        )
    return Source(name, **options)


def parse_grade_map(text: str) -> tuple[tuple[float, float], ...]:
    """Pairs (old, new) from `1:3,2` (1 becomes 3, 2 stays); `=` may stand for `:`. Raises: GradretError."""
    pairs: list[tuple[float, float]] = []
    for item in text.split(","):
        old, _, new = item.replace("=", ":").partition(":")
        try:
            pair = float(old), float(new or old)
            if not all(map(is_grade, pair)):
                raise ValueError
        except ValueError:
            raise GradretError(
                f"grade map '{text}': expected OLD:NEW or GRADE, numbers between -{GRADE_LIMIT} and {GRADE_LIMIT}, "
                f"separated by commas, got '{item}'"
            ) from None
        if pair[0] in dict(pairs):
            raise GradretError(f"grade map '{text}': grade {pair[0]:g} stands there twice; give it once")
        pairs.append(pair)
    return tuple(pairs)


def parse_count(text: str, low: int = 0) -> int:
    """A whole number from `low` on. Raises: ValueError where the text is none, or does not fit an int64."""
    if not (text.isascii() and text.isdecimal() and len(text) <= COUNT_DIGITS and int(text) >= low):
        raise ValueError
    return int(text)


def parse_number(text: str, low: float, high: float) -> float:
    """A number from low to high. Raises: ValueError."""
    if not low <= float(text) <= high:
        raise ValueError
    return float(text)


def parse_name(text: str) -> str:
    """The text. Raises: ValueError for none."""
    if not text:
        raise ValueError
    return text


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {  # of a source
    "grades": (parse_grade_map, "a grade map"),
    "sample": (partial(parse_count, low=1), "a whole number above 0"),
    "shuffle": (partial(parse_number, low=0, high=1), "a number from 0 to 1"),  # noise for benchmarks, not in USAGE
    "queries": (parse_name, "even, odd or a file"),
    "query_file": (parse_name, "a file"),
    "labels": ({label: label for label in LABELS}.__getitem__, "intended, judged or agreed"),
    "drop_self": ({"yes": True, "no": False}.__getitem__, "yes or no"),
}
USAGE = (
    "grades=OLD:NEW,..., sample=K, queries=even|odd|FILE, query_file=FILE, labels=intended|judged|agreed or "
    "drop_self=yes|no"
)


def find_path(name: str) -> Path | None:
    """The file or directory a source's name stands for; None when it can only be an ir_datasets id."""
    if name in BUNDLED:
        return _find_bundled(name)
    directory, _ = _split_directory(name)
    if directory.is_dir():
        return directory
    if os.path.exists(name):
        return Path(name)
    if name.endswith((".jsonl", ".json", ".tsv", ".csv", ".txt")) or name.startswith((".", "/", "~")):
        raise GradretError(f"{name}: no such file")
    return None


def _find_bundled(name: str) -> Path:
    return Path(str(resources.files("gradret") / "data" / BUNDLED[name]))


def _split_directory(name: str) -> tuple[Path, str]:
    if name in BUNDLED:
        name = str(_find_bundled(name))
    head, colon, split = name.rpartition(":")
    return (Path(head), split) if colon and Path(head).is_dir() else (Path(name), choose_split(Path(name)))


def open_collection(source: Source) -> BeirCollection | IrDatasetsCollection | ListCollection:
    """The collection to evaluate on, its queries selected and its grades mapped. Raises: GradretError."""
    for name, default in (("sample", None), ("shuffle", 0.0), ("labels", "intended")):
        if (value := getattr(source, name)) != default:
            raise GradretError(f"{source.name}: {name}={value} is for training lists, not for a collection to measure")
    path = find_path(source.name)
    if source.query_file is not None and not (path and path.is_dir()):
        raise GradretError(f"{source.name}: query_file is for a directory without queries.jsonl; leave it out")
    collection: BeirCollection | IrDatasetsCollection | ListCollection
    if path is None:
        collection = IrDatasetsCollection(source.name)
    elif path.is_dir():
        queries = None if source.query_file is None else Path(source.query_file)
        collection = BeirCollection(*_split_directory(source.name), queries)
    else:
        collection = ListCollection(str(path), ListFile(path))
    if source.queries is not None:
        select = query_selector(source.queries)
        collection.queries = {q: text for q, text in collection.queries.items() if select(q)}
        if not collection.queries:
            raise GradretError(f"{source.name}: queries={source.queries} selects none of its queries")
    there = {grade for grades in collection.qrels.values() for grade in grades.values()}
    if source.grades is not None:
        mapping = dict(source.grades)
        if not mapping.keys() & there:
            raise GradretError(
                f"{source.name}: has none of the grades {_list_grades(mapping)} to map; it has {_list_grades(there)}"
            )
        there = {mapping.get(grade, grade) for grade in there}
        for query_id, grades in collection.qrels.items():
            collection.qrels[query_id] = {d: mapping.get(grade, grade) for d, grade in grades.items()}
    if there and max(there) <= 0:
        raise GradretError(
            f"{source.name}: no document is relevant, as the highest grade is {max(there):g}; "
            "give grades above 0 to those that are (grades=OLD:NEW)"
        )
    if source.drop_self is not None:
        collection.drop_self = source.drop_self
    return collection


def _list_grades(grades: Iterable[float]) -> str:
    return ", ".join(f"{grade:g}" for grade in sorted(grades))


def query_selector(selection: str) -> Callable[[str], bool]:
    """A function of a query id: whether `even`, `odd` or the ids in a file hold it. Raises: GradretError."""
    if selection not in ("even", "odd"):
        return {query_id for line in read_lines(selection) for query_id in _read_ids(line)}.__contains__

    def has_parity(query_id: str) -> bool:
        number = re.search(r"\d+$", query_id)
        if number is None:
            raise GradretError(
                f"queries={selection}: query id '{query_id}' does not end in a number; name a file of ids"
            )
        return int(number.group()) % 2 == (selection == "odd")

    return has_parity


def _read_ids(line: Line) -> set[str]:
    """The query ids that a line of a file that selects queries may mean: the line, or what its JSON object says."""
    if not line.text.lstrip().startswith("{"):
        return {line.text, line.text.strip()}  # hardly any id ends in a space, but some may
    record = decode_json(line.text, line.where)
    query_id = record.get("query_id", record.get("_id"))
    if query_id is None:
        raise GradretError(
            f"{line.where}: has neither query_id nor _id; expected one query id per line, lists or BEIR queries"
        )
    return {parse_id(query_id, f"{line.where}: query id")}


def open_lists(source: Source, characters: int | None = None) -> "ListFile | JudgedLists":
    """A source's lists by position, before its options; `characters`: see lists.read_lines. Raises: GradretError."""
    if source.drop_self is not None:
        raise GradretError(f"{source.name}: drop_self is for a collection to measure, not for training lists")
    path = find_path(source.name)
    if path is not None and path.is_file() and source.query_file is None:
        return ListFile(path, characters)
    if source.labels != "intended":
        raise GradretError(
            f"{source.name}: labels={source.labels} is for the ranking-list files of gradret gen --judge; leave it out"
        )
    collection = open_collection(Source(source.name, query_file=source.query_file))
    assert not isinstance(collection, ListCollection)  # which open_collection refuses together with query_file
    return JudgedLists(collection, characters)


class JudgedLists(Sequence[RankingList]):
    """A collection's judgments as ranking lists: each query with its judged documents, read when asked for.

    Attributes:
        absent: (lists,) int32, of the lists read so far, how many judged documents the collection lacks.
    """

    def __init__(self, collection: BeirCollection | IrDatasetsCollection, characters: int | None = None):
        self._collection, self._characters = collection, characters
        self._query_ids = list(collection.queries)
        self.absent = np.zeros(len(self._query_ids), np.int32)
        self.ids = np.array([hash64(q) for q in self._query_ids], np.uint64)
        self.keys = np.array([query_key(q, t) for q, t in collection.queries.items()], np.uint64)
        judgments = (f"{q} {d} {g}" for q in self._query_ids for d, g in collection.qrels[q].items())
        self.fingerprint = f"{hash64(collection.name, *collection.queries.values(), *judgments):016x}"

    def __len__(self) -> int:
        return len(self._query_ids)

    def __getitem__(self, index: int) -> RankingList:  # type: ignore[override]  # no slices
        query_id = self._query_ids[index]
        grades = self._collection.qrels[query_id]
        documents = self._collection.read_documents(grades, self._characters)
        passages = []
        for doc_id, grade in grades.items():
            if doc_id in documents:
                documents[doc_id].grade = grade
                passages.append(documents[doc_id])
        self.absent[index] = len(grades) - len(passages)
        where = f"{self._collection.name} query {query_id}"
        return RankingList(query_id, self._collection.queries[query_id], passages, where=where)


SOFTMAX_ADVICE = "use --targets softmax"


class MixedLists(Sequence[RankingList]):
    """The ranking lists of one or more sources by position, one for each query, read when asked for.

    They are there to be encoded: the middle of a text of more than 2 x TEXT_CHARACTERS may be missing.

    Queries with the same id and the same words are one; an id that stands for other words elsewhere is
    another query. A passage that comes twice counts once, with the grade of the source named first.

    Args:
        sources: in the order of precedence.
        seed: draws the `sample=K` passages; the draw depends on it, the source and the query alone.
    Attributes:
        colliding_ids: how many query ids stand for different queries in different sources.
        fingerprint: of the sources' content and options.
        disagreeing: (lists,) bool, of the lists read so far, those that labels=agreed took passages from.
    Raises: GradretError.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int = 0):
        self._sources, self._seed = list(sources), seed
        self._parts = [open_lists(source, TEXT_CHARACTERS) for source in sources]
        self._select = [query_selector(s.queries) if s.queries is not None else None for s in sources]
        self.fingerprint = "+".join(part.fingerprint for part in self._parts)
        self._rows = self._merge_rows()  # (lists, sources) int32, -1 where a source lacks the query
        self.disagreeing = np.zeros(len(self._rows), bool)
        ids = np.concatenate([part.ids for part in self._parts])
        keys = np.concatenate([part.keys for part in self._parts])
        # Distinct keys under one id: the same id for different queries.
        ids = np.unique(np.stack([ids, keys], axis=1), axis=0)[:, 0]
        self.colliding_ids = int((np.unique(ids, return_counts=True)[1] > 1).sum())

    def _merge_rows(self) -> np.ndarray:
        """Where each query stands in each source; queries in the order in which they come first."""
        row_of: dict[int, int] = {}
        for part in self._parts:
            for key in part.keys.tolist():
                row_of.setdefault(key, len(row_of))
        rows = np.full((len(row_of), len(self._parts)), -1, np.int32)
        for column, part in enumerate(self._parts):
            rows[[row_of[key] for key in part.keys.tolist()], column] = np.arange(len(part))
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RankingList:  # type: ignore[override]  # no slices
        merged: RankingList | None = None
        seen: set[tuple[str | None, str]] = set()
        for column, row in enumerate(self._rows[index]):
            if row < 0:
                continue
            part = self._parts[column][row]
            passages = self._choose(index, part, self._sources[column], self._select[column])
            if merged is None:
                merged = RankingList(part.query_id, part.query, [], part.meta, part.extra, part.where)
            for passage in passages:
                if (passage.title, passage.text) not in seen:
                    seen.add((passage.title, passage.text))
                    merged.passages.append(passage)
        assert merged is not None  # every row is of some source
        return merged

    def count_absent(self) -> int:
        """Judgments of the lists read so far whose documents are missing."""
        return sum(int(part.absent.sum()) for part in self._parts if isinstance(part, JudgedLists))

    def read_all(self, index: int) -> list[Passage]:
        """The passages that the sources have for a list's query, whatever their options select."""
        parts = zip(self._parts, self._rows[index].tolist(), strict=True)
        return [passage for part, row in parts if row >= 0 for passage in part[row].passages]

    def _choose(
        self, index: int, part: RankingList, source: Source, select: Callable[[str], bool] | None
    ) -> list[Passage]:
        if select is not None and not select(part.query_id):
            return []
        grades = [p.grade for p in part.passages]
        if source.labels == "judged":
            grades = _read_judged(part, source)
        elif source.labels == "agreed" and not grades_agree(grades, _read_judged(part, source)):
            self.disagreeing[index] = True
            return []
        if source.shuffle:
            draw = random.Random(f"shuffle/{self._seed}/{source.name}/{part.query_id}")
            if draw.random() < source.shuffle:
                draw.shuffle(grades)
        passages = part.passages
        for passage, grade in zip(passages, grades, strict=True):
            passage.grade = grade
        if source.grades is not None:
            mapping = dict(source.grades)
            passages = [replace(p, grade=mapping[p.grade]) for p in passages if p.grade in mapping]
        if source.sample is not None and len(passages) > source.sample:
            draw = random.Random(f"{self._seed}/{source.name}/{part.query_id}")
            chosen = sorted(draw.sample(range(len(passages)), source.sample))
            passages = [passages[i] for i in chosen]
        return passages


def _read_judged(part: RankingList, source: Source) -> list[float]:
    grades = []
    for position, passage in enumerate(part.passages, 1):
        grade = passage.extra.get(JUDGED)
        if not is_grade(grade):
            what = "has no judged grade" if grade is None else f"its judged grade '{grade}' is not a finite number"
            raise GradretError(
                f"{part.where}: passage {position}: {what}, which labels={source.labels} needs; "
                "write the lists with gradret gen --judge, or leave labels out"
            )
        grades.append(grade)
    return grades


LEAST_LISTS, LEAST_HELD, MOST_HELD = 50, 10, 256  # from so many lists on a tenth is held out, within these bounds


@dataclass(frozen=True)
class ListsSummary:
    """What a check of all lists found.

    kept: positions of the lists to train on; best and worst: (kept,) the highest and the lowest grade of each;
    longest: the longest passage; the numbers of lists and judgments are of those left out; held_out: positions of the
    lists that are not trained on but asked how far to go.
    """

    kept: np.ndarray
    best: np.ndarray
    worst: np.ndarray
    passages: int
    longest: str
    empty: int
    disagreeing: int
    absent: int
    excluded: int
    held_out: np.ndarray

    @property
    def lowest(self) -> float:
        return float(self.worst.min())

    @property
    def highest(self) -> float:
        return float(self.best.max())

    def __str__(self) -> str:
        text = f"{count_of(len(self.kept), 'list')}, {count_of(self.passages, 'passage')}"
        text += f", grades {self.lowest:g} to {self.highest:g}"
        notes = (
            (int((self.best == self.worst).sum()), "list", "whose grades are all equal, kept"),
            (self.empty, "list", "left out: no passage is selected"),
            (self.disagreeing, "list", "left out: judged and intended grades are not in one order"),
            (self.absent, "judgment", "left out, whose documents are missing"),
            (self.excluded, "list", "left out, whose query is one to be measured"),
            (len(self.held_out), "list", "held out, to choose the share of the way that is saved"),
        )
        return text + "".join(f"; {count_of(number, noun)} {what}" for number, noun, what in notes if number)


def check_lists(
    lists: MixedLists, *, refuse_negative: bool, exclude: Container[str] = (), hold_out: bool = False
) -> ListsSummary:
    """Read every list once: all are well formed, and no grade is negative where targets begin at grade 0.

    Args:
        exclude: words of queries (see lists.query_words) whose lists are left out, as those without passages are.
        hold_out: from LEAST_LISTS lists on hold out a tenth, from LEAST_HELD to MOST_HELD, and all lists of a query or
            none; which they are depends on the words of the queries alone.
    Raises: GradretError naming the first list at fault, or when no list is left.
    """
    rows, best, worst, counts, words = array("q"), array("d"), array("d"), array("q"), array("Q")
    longest, empty, disagreeing, excluded = "", 0, 0, 0
    for index in show_bar(range(len(lists)), desc="checking lists", unit="list", delay=BAR_DELAY_S):
        ranking_list = lists[index]
        grades = [p.grade for p in ranking_list.passages]
        if not grades:
            disagreeing += int(lists.disagreeing[index])
            empty += not lists.disagreeing[index]
            continue
        query = query_words(ranking_list.query)
        if query in exclude:
            excluded += 1
            continue
        low = min(grades)
        if refuse_negative and low < 0:
            raise GradretError(
                f"{ranking_list.place} has the negative grade {low:g}, to which "
                f"targets of 2^grade - 1 or sqrt(grade) give nothing; map it (SOURCE?grades={low:g}:0,...) or "
                f"{SOFTMAX_ADVICE}"
            )
        rows.append(index)
        best.append(max(grades))
        worst.append(low)
        counts.append(len(grades))
        words.append(hash64("held out", query))
        longest = max(longest, *(p.content for p in ranking_list.passages), key=len)
    absent = lists.count_absent()
    if not rows:
        raise GradretError(
            "no ranking list is left: the chosen queries, grades and labels match none, or all are to be measured"
            + (f"; of the judged documents {absent} are missing" if absent else "")
        )
    held_out = _draw_held_out(np.array(words)) if hold_out else np.zeros(len(rows), bool)
    return ListsSummary(
        kept=np.array(rows)[~held_out],
        best=np.array(best)[~held_out],
        worst=np.array(worst)[~held_out],
        passages=int(np.array(counts)[~held_out].sum()),
        longest=longest,
        empty=empty,
        disagreeing=disagreeing,
        absent=absent,
        excluded=excluded,
        held_out=np.array(rows)[held_out],
    )


def _draw_held_out(queries: np.ndarray) -> np.ndarray:
    """(lists,) bool: the lists of the queries with the lowest hashes, as many as are to be held out, or fewer."""
    if len(queries) < LEAST_LISTS:
        return np.zeros(len(queries), bool)
    _, query, counts = np.unique(queries, return_inverse=True, return_counts=True)
    taken: np.ndarray = np.cumsum(counts) <= np.clip(len(queries) // 10, LEAST_HELD, MOST_HELD)
    return taken[query]
