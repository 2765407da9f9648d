"""Collections: documents, queries and qrels, from a BEIR directory, ir_datasets or a ranking-list file."""

import csv
import json
import logging
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from gradret.console import GradretError, is_first_process, say
from gradret.data.lists import (
    GRADE_LIMIT,
    TEXT_CHARACTERS,
    DocumentNames,
    Line,
    Passage,
    RankingList,
    decode_json,
    hash64,
    is_grade,
    open_file,
    parse_id,
    quote,
    read_line,
    read_lines,
)
from gradret.files import hold_lock

LOCK_FILE = "gradret.lock"


def load_dataset(dataset_id: str) -> Any:
    """The dataset of an ir_datasets id. Raises: GradretError when there is none."""
    import ir_datasets

    ir_datasets.log.easy().logger().setLevel(logging.WARNING)  # its notes on opened files would bury ours
    try:
        return ir_datasets.load(dataset_id)
    except KeyError:
        raise GradretError(
            f"{dataset_id}: no such file or directory, and not an ir_datasets id; "
            "check the path, or pick an id from https://ir-datasets.com"
        ) from None


def iterate_documents(dataset: Any) -> Iterator[Any]:
    """The documents of a dataset of ir_datasets in its order. Raises: GradretError as `reading` does."""
    with reading(dataset):
        with unpacking():
            documents = iter(dataset.docs_iter())
            first = list(islice(documents, 1))
        yield from chain(first, documents)


# What is joined where a class of records has no default_text(): of BRIGHT, clinicaltrials, codesearchnet and argsme.
TEXT_FIELDS = (
    *("title", "text", "condition", "summary", "detailed_description", "eligibility"),
    *("code", "conclusion", "premises_texts"),
)


def read_text(dataset: Any, record: Any) -> str:
    """What a query or document of ir_datasets says: its default_text(), or of a class without one its TEXT_FIELDS.

    Raises: GradretError when there is no text.
    """
    with reading(dataset):
        if hasattr(record, "default_text"):
            text = record.default_text()
        else:
            fields = [getattr(record, name) for name in TEXT_FIELDS if hasattr(record, name)]
            text = " ".join(filter(None, fields)) if fields else None
    kind = type(record).__name__
    if not isinstance(text, str):
        raise GradretError(f"{dataset.dataset_id()}: a {kind} of ir_datasets has no text; choose another collection")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GradretError(f"{dataset.dataset_id()}: a {kind} holds half of a surrogate pair: {text!a:.60}") from None
    return text


@contextmanager
def reading(dataset: Any) -> Iterator[None]:
    """Turns what ir_datasets raises in here into one line.

    That is anything: a download that failed, a licence not yet accepted, and for a damaged file what its format's
    library raises.
    """
    try:
        yield
    except Exception as error:
        import ir_datasets

        raise GradretError(
            f"{dataset.dataset_id()}: ir_datasets could not provide it ({type(error).__name__}: {error}); if a file "
            f"is damaged that it downloaded or made in {ir_datasets.util.home_path()}, remove that file"
        ) from error


def unpacking() -> AbstractContextManager[None]:
    """While no other process is in here: two that have ir_datasets make the same files at once damage them.

    Not to be nested. Without a lock where the home cannot be written to.
    """
    import ir_datasets

    return hold_lock(ir_datasets.util.home_path() / LOCK_FILE, "downloads or unpacks a collection")


BEIR_HEADER = ["query-id", "corpus-id", "score"]
TROVE_FILE = "qrels.jsonl"

Qrels = dict[str, dict[str, float]]


def list_splits(directory: Path) -> list[str]:
    """The names of the splits with qrels in the folder of a BEIR directory."""
    return sorted({path.stem for suffix in QRELS_FORMS for path in (directory / "qrels").glob(f"*{suffix}")})


def choose_split(directory: Path) -> str:
    """The split of a BEIR directory where none is named: the only one that has qrels, otherwise "test"."""
    splits = list_splits(directory)
    only = len(splits) == 1 and not (directory / TROVE_FILE).exists()  # which has qrels of every split
    return splits[0] if only else "test"


def read_qrels(directory: Path, split: str) -> Qrels:
    """Query id -> {doc id -> grade}, of the first of these files that is there.

    `qrels/SPLIT.tsv`, with the header query-id, corpus-id, score and whole numbers, quoted as Python's csv does (BEIR);
    `qrels/SPLIT.txt`, .qrels or .trec, lines of `QUERY 0 DOCUMENT GRADE` (trec_eval); `qrels/SPLIT.jsonl`, objects with
    query-id, corpus-id and score (mteb); `qrels.jsonl`, one line per query with qid, docid and score, the latter two
    lists of one length (Trove), which is the same for every split.

    Raises: GradretError when there is none, a line is not of its format, or a judgment has two grades.
    """
    folder = directory / "qrels"
    forms = [(folder / f"{split}{suffix}", form) for suffix, form in QRELS_FORMS.items()]
    forms.append((directory / TROVE_FILE, TROVE_FORM))
    path, (parse, expected) = next((form for form in forms if form[0].exists()), (None, TROVE_FORM))
    if path is None:
        there = ", ".join(list_splits(directory)) or "none"
        raise GradretError(f"{forms[0][0]}: no such file; splits with qrels here: {there}")
    qrels: Qrels = {}
    for line in read_lines(path):
        try:
            judgments = [_check_judgment(*judgment) for judgment in parse(line)]
        except (KeyError, TypeError, ValueError, csv.Error):
            raise GradretError(f"{line.where}: expected {expected}") from None
        for query_id, doc_id, grade in judgments:
            if qrels.setdefault(query_id, {}).setdefault(doc_id, grade) != grade:
                raise GradretError(
                    f"{line.where}: document '{doc_id}' has grade {grade} for query '{query_id}' here and "
                    f"{qrels[query_id][doc_id]} earlier; keep one of them"
                )
    return qrels


def _check_judgment(query_id: Any, doc_id: Any, grade: Any) -> tuple[str, str, float]:
    """The same, where it can be one. Raises: TypeError or ValueError."""
    texts = all(isinstance(name, str) and name for name in (query_id, doc_id))
    if not texts or not is_grade(grade):
        raise ValueError
    return query_id, doc_id, grade


# Each gives the judgments of a line: query id, doc id, grade. What they raise says that the line is not of its form.


def _parse_beir(line: Line) -> Iterable[tuple[Any, Any, Any]]:
    fields = next(csv.reader([line.text], delimiter="\t"))
    if line.number > 1:
        query_id, doc_id, grade = fields
        return [(query_id, doc_id, _parse_whole(grade))]
    if fields != BEIR_HEADER:
        raise GradretError(
            f"{line.where}: expected the header 'query-id<TAB>corpus-id<TAB>score', got '{line.text[:60]}'; "
            "add it as the first line"
        )
    return []


def _parse_trec(line: Line) -> Iterable[tuple[Any, Any, Any]]:
    query_id, _, doc_id, grade = re.findall(r"\S+", line.text, re.ASCII)  # other white space may be part of an id
    return [(query_id, doc_id, _parse_whole(grade))]


def _parse_whole(text: str) -> int:
    if not re.fullmatch(" *[+-]?[0-9]+ *", text):
        raise ValueError
    return int(text)


def _parse_mteb(line: Line) -> Iterable[tuple[Any, Any, Any]]:
    record = decode_json(line.text, line.where)
    return [tuple(record[key] for key in BEIR_HEADER)]


def _parse_trove(line: Line) -> Iterable[tuple[Any, Any, Any]]:
    record = decode_json(line.text, line.where)
    doc_ids, scores = record["docid"], record["score"]
    if not isinstance(doc_ids, list):
        raise TypeError
    return [(record["qid"], doc_id, score) for doc_id, score in zip(doc_ids, scores, strict=True)]


WHOLE = f"a whole number below {GRADE_LIMIT}"
BEIR_FORM = _parse_beir, f"'query-id<TAB>corpus-id<TAB>score' with {WHOLE} as score"
TREC_FORM = _parse_trec, f"'QUERY 0 DOCUMENT GRADE' with {WHOLE} as grade"
MTEB_FORM = _parse_mteb, "a JSON object with the strings query-id and corpus-id and the number score"
TROVE_FORM = (
    _parse_trove,
    "a JSON object with a string qid and two lists of one length, docid of strings and score of numbers",
)
QRELS_FORMS = {".tsv": BEIR_FORM, ".txt": TREC_FORM, ".qrels": TREC_FORM, ".trec": TREC_FORM, ".jsonl": MTEB_FORM}


def tell_absent(name: str, judged: Set[str], absent: Set[str], what: str) -> None:
    """Tell how many of the judged documents or queries of a collection are absent. Raises: GradretError if all are."""
    if not absent:
        return
    told = f"{name}: {len(absent)} of {len(judged)} judged {what} are missing from it, such as '{min(absent)}'"
    if len(absent) == len(judged):
        raise GradretError(f"{told}; check that its {what} and qrels belong together")
    if is_first_process():
        say(told)


@dataclass(slots=True)
class Document:
    """A document of a collection; `content` is what an encoder reads."""

    doc_id: str
    content: str


class Collection(ABC):
    """What one evaluation needs, or one training source with real judgments.

    Attributes:
        name: how the user named it.
        queries: query id -> text, in the collection's order; only queries with qrels.
        qrels: query id -> {doc id -> grade}.
        document_count: how many documents.
        drop_self: whether a document whose id is the query's is left out of a ranking (BEIR does so for
            ArguAna and Quora, whose queries are documents).
        documents_checked: whether the judged documents have been looked for, see check_documents.
    """

    name: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, float]]
    document_count: int
    drop_self: bool
    documents_checked: bool = False

    @abstractmethod
    def documents(self, start: int = 0, characters: int | None = None) -> Iterator[Document]:
        """The documents in the collection's order, from position `start`.

        Of texts longer than `characters` no more than so many need be there at either end; None for all.
        """

    def check_documents(self, doc_ids: Iterable[str]) -> None:
        """Tell, once, how many judged documents are not among these, the collection's. Raises: GradretError if none."""
        if not self.documents_checked:
            self.documents_checked = True
            judged = {doc_id for grades in self.qrels.values() for doc_id in grades}
            tell_absent(self.name, judged, judged.difference(doc_ids), "documents")

    def _keep_judged_queries(self, queries: dict[str, str]) -> None:
        judged = {query_id for query_id, grades in self.qrels.items() if grades}
        self.queries = {query_id: text for query_id, text in queries.items() if query_id in judged}
        tell_absent(self.name, judged, judged.difference(queries), "queries")
        if not self.queries:
            raise GradretError(f"{self.name}: no query has a judgment; check that queries and qrels belong together")


class BeirCollection(Collection):
    """A directory in BEIR's layout: corpus.jsonl, queries.jsonl or a file like it, and qrels for read_qrels."""

    def __init__(self, directory: Path, split: str, queries: Path | None = None):
        self.name = f"{directory}:{split}"
        self._corpus = directory / "corpus.jsonl"
        self.drop_self = is_self_retrieving(directory.resolve().name)
        self.qrels = read_qrels(directory, split)
        queries = directory / "queries.jsonl" if queries is None else queries
        texts: dict[str, str] = {}
        for line in read_lines(queries):
            query_id, text = parse_query(decode_json(line.text, line.where), line.where)
            if texts.setdefault(query_id, text) != text:
                raise GradretError(
                    f"{line.where}: query id '{query_id}' had another text in an earlier line; "
                    "give every query an id of its own"
                )
        self._keep_judged_queries(texts)
        judged = {doc_id for grades in self.qrels.values() for doc_id in grades}
        self._offsets: dict[str, int] = {}
        hashes = array("Q")  # 8 bytes per document, to find an id used twice
        for record, line in read_records(self._corpus, desc=f"reading {self._corpus}", characters=TEXT_CHARACTERS):
            hashes.append(hash64(record["_id"]))
            if record["_id"] in judged:
                self._offsets[record["_id"]] = line.offset
        self.document_count = len(hashes)
        found, count = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        if len(found) < len(hashes):
            self._refuse_duplicate_ids(set(found[count > 1].tolist()))
        self.check_documents(self._offsets)

    def _refuse_duplicate_ids(self, hashes: Set[int]) -> None:
        """Name the first document id used twice, which has one of these hashes, with its lines."""
        first: dict[str, int] = {}
        for record, line in read_records(self._corpus, characters=TEXT_CHARACTERS):
            if hash64(record["_id"]) in hashes and first.setdefault(record["_id"], line.number) != line.number:
                raise GradretError(
                    f"{line.where}: document id '{record['_id']}' was already used in line {first[record['_id']]}; "
                    "give every document an id of its own"
                )

    def documents(self, start: int = 0, characters: int | None = None) -> Iterator[Document]:
        for record, _ in islice(read_records(self._corpus, characters=characters), start, None):
            yield Document(record["_id"], f"{record.get('title') or ''} {record['text']}".strip())

    def read_documents(self, doc_ids: Iterable[str], characters: int | None = None) -> dict[str, Passage]:
        """The named documents as passages of grade 0; those the collection lacks are left out.

        characters: see lists.read_lines.
        """
        found = {}
        with open_file(self._corpus) as file:
            for doc_id in doc_ids:
                if doc_id in self._offsets:
                    record = decode_json(read_line(file, self._offsets[doc_id], characters), str(self._corpus))
                    found[doc_id] = Passage(0, record["text"], record.get("title") or None, doc_id)
        return found


class IrDatasetsCollection(Collection):
    """Any ir_datasets id that has documents, queries and qrels, through its API alone."""

    def __init__(self, dataset_id: str):
        import ir_datasets

        self.name, self._dataset = dataset_id, load_dataset(dataset_id)
        if not (self._dataset.has_qrels() and self._dataset.has_queries() and self._dataset.has_docs()):
            splits = [i for i in ir_datasets.registry._registered if i.startswith(f"{dataset_id}/")]
            splits = [i for i in splits if ir_datasets.load(i).has_qrels()]
            hint = f"name one that has, such as {', '.join(splits[:3])}" if splits else "name a dataset that has"
            raise GradretError(f"{dataset_id}: this ir_datasets id has no qrels; {hint}")
        self.drop_self = is_self_retrieving(*dataset_id.split("/"))
        self._store: Any = None
        with reading(self._dataset), unpacking():
            count = self._dataset.docs_count()
            qrels, queries = list(self._dataset.qrels_iter()), list(self._dataset.queries_iter())
        self.document_count = count or sum(1 for _ in iterate_documents(self._dataset))
        self.qrels = {}
        for qrel in qrels:
            grades, grade = self.qrels.setdefault(qrel.query_id, {}), qrel.relevance
            first = grades.setdefault(qrel.doc_id, grade)
            if first != grade and not hasattr(qrel, "subtopic_id"):
                raise GradretError(
                    f"{dataset_id}: in ir_datasets, document '{qrel.doc_id}' has grade {first} and grade {grade} for "
                    f"query '{qrel.query_id}'; choose another collection"
                )
            grades[qrel.doc_id] = max(first, grade)  # of its subtopics
        self._keep_judged_queries({q.query_id: read_text(self._dataset, q) for q in queries})

    def documents(self, start: int = 0, characters: int | None = None) -> Iterator[Document]:
        for document in islice(iterate_documents(self._dataset), start, None):
            yield Document(document.doc_id, read_text(self._dataset, document))

    def read_documents(self, doc_ids: Iterable[str], characters: int | None = None) -> dict[str, Passage]:
        """As BeirCollection's, but with whole documents: ir_datasets reads no others."""
        with reading(self._dataset):
            if self._store is None:
                with unpacking():
                    self._store = self._dataset.docs_store()
                    self._store.get_many([])  # which for most datasets makes its files, where they are not yet
            found = self._store.get_many(doc_ids)
        return {doc_id: Passage(0, read_text(self._dataset, d), None, doc_id) for doc_id, d in found.items()}


class ListCollection(Collection):
    """Ranking lists as a collection: their distinct passages are the documents, their grades the qrels.

    See DocumentNames for the documents' ids.

    Args:
        lists, others: of distinct query ids; of the others only the passages are there, as documents.
    """

    def __init__(self, name: str, lists: Iterable[RankingList], others: Iterable[RankingList] = ()):
        self.name = name
        self.drop_self = False
        self.queries, self.qrels = {}, {}
        self._documents: dict[str, str] = {}
        names = DocumentNames()
        for ranking_list in lists:
            judged = self._add(ranking_list, names)
            self.queries[ranking_list.query_id] = ranking_list.query
            self.qrels[ranking_list.query_id] = {doc_id: passage.grade for doc_id, passage in judged.items()}
        for ranking_list in others:
            self._add(ranking_list, names)
        self.document_count = len(self._documents)

    def _add(self, ranking_list: RankingList, names: DocumentNames) -> dict[str, Passage]:
        judged, new = names.name(ranking_list)
        self._documents.update((doc_id, judged[doc_id].content) for doc_id in new)
        return judged

    def documents(self, start: int = 0, characters: int | None = None) -> Iterator[Document]:
        for doc_id, content in islice(self._documents.items(), start, None):
            yield Document(doc_id, content)


def is_self_retrieving(*names: str) -> bool:
    """Whether one of these is a collection whose queries are among its documents: ArguAna or Quora."""
    return any(name.lower().removeprefix("beir-") in ("arguana", "quora") for name in names)


def parse_query(record: object, where: str) -> tuple[str, str]:
    """The id and the text of a query, as BEIR's files and files of lists name them; the text may be empty."""
    keys = ("_id", "text") if isinstance(record, dict) and "_id" in record else ("query_id", "query")
    query_id, text = (record.get(key) for key in keys) if isinstance(record, dict) else (None, None)
    if query_id is None or not isinstance(text, str):
        raise GradretError(
            f"{where}: expected a JSON object with the strings _id and text, or query_id and query, "
            f"got {json.dumps(record, ensure_ascii=False):.60}"
        )
    return parse_id(query_id, f"{where}: {keys[0]}"), text


def read_records(path: Path, *, desc: str = "", characters: int | None = None) -> Iterator[tuple[dict[str, Any], Line]]:
    """Each JSON object of a BEIR file with its line: _id and text are strings, and title if it is there.

    See read_lines for the options.
    """
    for line in read_lines(path, desc=desc, characters=characters):
        record = decode_json(line.text, line.where)
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("_id", "text")):
            raise GradretError(f"{line.where}: expected a JSON object with the strings _id and text")
        if not isinstance(record.get("title") or "", str):
            raise GradretError(f"{line.where}: title {quote(record['title'])} is not a string")
        parse_id(record["_id"], f"{line.where}: _id")
        yield record, line
