"""Mining of hard negatives: passages that rank high for a query, added to its list at a grade of choice."""

import hashlib
import os
import pickle
import re
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from gradret.console import BAR_DELAY_S, GradretError, needing, show_bar
from gradret.data.collections import (
    Collection,
    Document,
    is_self_retrieving,
    iterate_documents,
    load_dataset,
    read_records,
    read_text,
)
from gradret.data.lists import GRADE_LIMIT, Passage, RankingList, hash64, query_words
from gradret.data.sources import (
    MixedLists,
    Source,
    find_path,
    parse_count,
    parse_name,
    parse_number,
    parse_options,
    parse_source,
)
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder
from gradret.evaluation.search import embed_corpus, embed_texts, order_ranking, top_k

ENCODER, BM25 = "encoder", "bm25"


@dataclass(frozen=True)
class Mining:
    """`k=2,grade=1[,from=SOURCE][,by=encoder|bm25][,skip=S][,every=EPOCHS]`, parsed.

    Attributes:
        k: passages added to a list.
        grade: theirs.
        source: where the documents come from, see open_pool; None: the passages of the training lists.
        by: "encoder" or "bm25", what ranks them.
        skip: how many of the best ranked are left out: they may be relevant and merely not labelled.
        every: epochs after which they are mined again with the encoder as it then is; None: once, before the first
            step.
    """

    k: int
    grade: float
    source: str | None = None
    by: str = ENCODER
    skip: int = 0
    every: float | None = None

    def count_rounds(self, epoch: float) -> int:
        """How many times the passages have been mined again when so many epochs are done: 0 at the start."""
        return 0 if self.every is None else int(epoch / self.every + 1e-9)


def _parse_grade(text: str) -> float:
    grade = float(text)
    if not abs(grade) < GRADE_LIMIT:
        raise ValueError
    return grade


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "k": (partial(parse_count, low=1), "a whole number above 0"),
    "grade": (_parse_grade, f"a finite number below {GRADE_LIMIT}"),
    "from": (parse_name, "a file, a BEIR directory or an ir_datasets id"),
    "by": ({ENCODER: ENCODER, BM25: BM25}.__getitem__, f"one of {ENCODER}, {BM25}"),
    "skip": (parse_count, "a whole number of 0 or above"),
    # Each round ranks for all lists.
    "every": (partial(parse_number, low=0.001, high=sys.float_info.max), "a number of epochs from 0.001 on"),
}
USAGE = "k=K,grade=GRADE and, if wanted, from=SOURCE, by=encoder|bm25, skip=S, every=EPOCHS"


def parse_mining(text: str) -> Mining:
    """A Mining from its spelling, e.g. `k=2,grade=1,from=beir/scifact,skip=5`. Raises: GradretError."""
    here = f"mine '{text}'"
    # SOURCE may hold commas itself, as in lists.jsonl?grades=1,0: only one before a word and = ends it.
    given = parse_options(here, re.split(r",\s*(?=[a-z]+=)", text.strip()), OPTIONS, USAGE)
    for key in ("k", "grade"):
        if key not in given:
            raise GradretError(f"{here}: {key} is missing; give at least k=K,grade=GRADE, such as k=2,grade=1")
    if given.get("by") == BM25 and "every" in given:
        raise GradretError(f"{here}: every is for by={ENCODER}; BM25 would rank as before: leave it out")
    source = given.pop("from", None)
    if source is not None:
        parse_source(source)
    return Mining(source=source, **given)


# A function of B queries and a depth: for each the positions of its best documents, best first, at most `depth`, and
# their scores.
Ranker = Callable[[list[str], int], Iterable[tuple[np.ndarray, np.ndarray]]]


def import_bm25s() -> Any:
    """The package bm25s. Raises: GradretError when it is not installed."""
    # Where JAX is installed, bm25s loads it and runs it once, and JAX would take most of a GPU's memory at once. This
    # is its own switch against that.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with needing("BM25", "bm25s", "bm25"):
        import bm25s
    return bm25s


def index_bm25(collection: Collection) -> Ranker:
    """A ranker by BM25 as bm25s computes it by default: Lucene's variant, without English stop words.

    Documents that share no word with the query are not ranked; of equal scores the earlier document comes first. Its
    index stands in memory, 8 bytes for each distinct word of each document.
    """
    bm25s = import_bm25s()
    tokenizer = bm25s.tokenization.Tokenizer()
    bar: dict[str, Any] = {"total": collection.document_count, "unit": "doc", "delay": BAR_DELAY_S}
    contents = (document.content for document in show_bar(collection.documents(), desc="indexing for BM25", **bar))
    tokens = [np.array(t, np.int32) for t in tokenizer.streaming_tokenize(contents, allow_empty=False)]
    vocabulary = tokenizer.get_vocab_dict()
    index = bm25s.BM25(backend="numpy")
    if vocabulary:
        index.index((tokens, vocabulary), create_empty_token=False, show_progress=False)

    def rank(queries: list[str], depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rankings = []
        tokenized = tokenizer.streaming_tokenize(queries, update_vocab=False, allow_empty=False)
        for words in show_bar(tokenized, total=len(queries), desc="ranking by BM25", unit="query", delay=BAR_DELAY_S):
            scores = index.get_scores_from_ids(words) if words else np.zeros(0, np.float32)
            found = np.flatnonzero(scores)
            if len(found) > depth:  # those that are as good as the last of the best, too: the earlier ones win
                found = found[scores[found] >= np.partition(scores[found], -depth)[-depth]]
            best = found[np.argsort(-scores[found], kind="stable")][:depth]
            rankings.append((best, scores[best]))
        return rankings

    return rank


def search_bm25(collection: Collection, *, depth: int) -> dict[str, list[tuple[str, float]]]:
    """Rank the documents for every query: query id -> [(doc id, score)], best first, at most `depth`.

    Ties, and documents with the query's id, are treated as evaluation/search.search does.
    """
    rank = index_bm25(collection)
    doc_ids = [document.doc_id for document in collection.documents()]
    rankings = rank(list(collection.queries.values()), depth + collection.drop_self)
    run = {}
    for query_id, (positions, scores) in zip(collection.queries, rankings, strict=True):
        ranking = zip((doc_ids[p] for p in positions), scores.tolist(), strict=True)
        run[query_id] = order_ranking(ranking, query_id if collection.drop_self else None)[:depth]
    return run


def content_key(text: str) -> int:
    """What makes two contents one: the same words, whatever their case and the space between them."""
    return hash64(query_words(text))


class Pool(Collection):
    """Documents to mine from, as a collection without queries whose document ids are positions.

    Of equal contents only the first is there, and none without words. In memory stand 9 bytes per document, no text.

    Args:
        read: gives all documents, in the same order at every call.
    Attributes:
        keys: (documents,) uint64, content_key of each.
        fingerprint: hex digest of all ids and contents in their order.
    Raises: GradretError when there is no document.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[Passage]], *, drop_self: bool = False):
        self.name, self.drop_self, self.queries, self.qrels = name, drop_self, {}, {}
        self._read = read
        keys, has_words, ids = array("Q"), bytearray(), array("Q")
        digest = hashlib.blake2b(digest_size=16)
        for passage in show_bar(read(), desc="reading documents to mine from", unit="doc", delay=BAR_DELAY_S):
            doc_id, content = passage.doc_id or "", passage.content
            digest.update(f"{doc_id}\0{content}\0".encode())
            keys.append(content_key(content))
            has_words.append(bool(content.strip()))
            if drop_self:
                ids.append(hash64(doc_id))
        self.fingerprint = digest.hexdigest()
        all_keys, with_words = np.array(keys, np.uint64), np.flatnonzero(has_words)
        if not len(with_words):
            raise GradretError(f"{name}: holds no document with words to mine from")
        first = with_words[np.sort(np.unique(all_keys[with_words], return_index=True)[1])]
        self._is_first = np.zeros(len(keys), bool)
        self._is_first[first] = True
        self.keys, self.document_count = all_keys[first], len(first)
        # Of a document that is another's double, too: its content is what must be left out.
        self._own_keys = dict(zip(ids, keys, strict=True)) if drop_self else {}

    def passages(self) -> Iterator[Passage]:
        """The documents by position, as passages of grade 0."""
        return compress(self._read(), self._is_first)

    def documents(self, start: int = 0, characters: int | None = None) -> Iterator[Document]:
        for position, passage in islice(enumerate(self.passages()), start, None):
            yield Document(str(position), passage.content)

    def find_own_keys(self, query_id: str) -> set[int]:
        """With drop_self, the key of the document that has the query's id; else none."""
        found = self._own_keys.get(hash64(query_id))
        return set() if found is None else {found}


def read_passages(lists: Sequence[RankingList], rows: Iterable[int]) -> Iterator[Passage]:
    """The passages of the lists at some positions."""
    return (replace(passage, grade=0) for row in rows for passage in lists[int(row)].passages)


def open_pool(text: str) -> Pool:
    """The documents of a source: a BEIR directory, an ir_datasets id, or a file of ranking lists (or `sample`).

    Queries and qrels are not used, and need not exist. Of a file of ranking lists, the options after the '?' choose
    passages as they do for training lists; of the others all documents are taken.

    Raises: GradretError.
    """
    source = parse_source(text)
    path = find_path(source.name)
    if path is not None and path.is_file():
        lists = MixedLists([replace(source, drop_self=None)])
        return Pool(text, partial(read_passages, lists, range(len(lists))), drop_self=bool(source.drop_self))
    if source != Source(source.name, drop_self=source.drop_self):
        raise GradretError(
            f"{text}: grades, sample, queries and labels choose among judged documents, but all documents of "
            f"{source.name} are mined from; leave these options out"
        )
    names = source.name.split("/") if path is None else [path.resolve().name]
    drop_self = is_self_retrieving(*names) if source.drop_self is None else source.drop_self
    return Pool(source.name, partial(_read_corpus, source.name, path), drop_self=drop_self)


def _read_corpus(name: str, directory: Path | None) -> Iterator[Passage]:
    """The documents of a BEIR directory or of an ir_datasets id, which need have neither queries nor qrels."""
    if directory is not None:
        for record, _ in read_records(directory / "corpus.jsonl"):
            yield Passage(0, record["text"], record.get("title") or None, record["_id"])
        return
    dataset = load_dataset(name)
    if not dataset.has_docs():
        raise GradretError(f"{name}: this ir_datasets id has no documents; name one that has")
    for document in iterate_documents(dataset):
        yield Passage(0, read_text(dataset, document), None, document.doc_id)


QUERY_BLOCK = 1024  # lists read, encoded and searched at once


class Miner:
    """Ranks a pool of documents for the query of every list and picks k that the list does not have.

    Left out are: the list's own passages, also those that its sources' options (grades=, sample=) keep from training;
    the passages of other lists with the same query; the query itself; with drop_self the document with the query's
    id. Passages are one when their words are, see content_key, whatever their ids.

    Args:
        mining: see Mining.
        lists: the training lists by position.
        kept: (lists trained on,) positions in `lists`; by default their passages are the pool.
        rows: those of them that are mined for; None for all.
    Raises: GradretError when the source cannot be read, or bm25s is asked for and not installed.
    """

    def __init__(self, mining: Mining, lists: Sequence[RankingList], kept: np.ndarray, rows: np.ndarray | None = None):
        self.mining, self._lists, self._kept = mining, lists, kept
        self.rows = kept if rows is None else rows
        if mining.by == BM25:
            import_bm25s()  # before the work
        if mining.source is None:
            self.pool = Pool("the training lists", partial(read_passages, lists, kept))
        else:
            self.pool = open_pool(mining.source)

    def mine(
        self,
        encoder: Encoder,
        *,
        precision: str = "float32",
        processes: Processes = ALONE,
        progress: bool = True,
    ) -> np.ndarray:
        """Positions in the pool of the passages mined for each of the lists, best first: (lists mined for, k) int64.

        -1 stands where there are fewer; k is at most the number of documents. The processes share the embedding of the
        pool; the first searches and tells the others. Of equal scores the earlier document comes first. Raises:
        GradretError.
        """
        corpus = None
        if self.mining.by == ENCODER:  # these embeddings serve no one else: the encoder is still in training
            corpus = embed_corpus(encoder, self.pool, None, precision=precision, progress=progress, processes=processes)

        def rank_by_encoder(queries: list[str], depth: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
            assert corpus is not None
            vectors = embed_texts(encoder, queries, "query", precision=precision)  # (B, D)
            scores, positions = top_k(vectors, corpus.vectors, depth, device=encoder.device)
            return zip(positions, scores, strict=True)

        found = None
        with processes.agree():
            if processes.is_first:
                rank = rank_by_encoder if self.mining.by == ENCODER else index_bm25(self.pool)
                found = self._choose(rank, progress)
        return processes.broadcast(found)

    def _choose(self, rank: Ranker, progress: bool) -> np.ndarray:
        mining, twins = self.mining, self._find_twins()
        result = np.full((len(self.rows), min(mining.k, self.pool.document_count)), -1, np.int64)
        with show_bar(shown=progress, total=len(result), desc="mining", unit="list") as bar:
            for start in range(0, len(result), QUERY_BLOCK):
                rows = self.rows[start : start + QUERY_BLOCK].tolist()
                known = [self._find_known(row, twins.get(row, [row])) for row in rows]
                # The pool holds every content once: no more than the known ones are passed over.
                depth = min(mining.k + mining.skip + max(map(len, known)), self.pool.document_count)
                rankings = rank([self._lists[row].query for row in rows], depth)
                for place, ((ranking, _), left_out) in enumerate(zip(rankings, known, strict=True), start):
                    keys = self.pool.keys[ranking].tolist()
                    unknown = [p for p, key in zip(ranking, keys, strict=True) if key not in left_out]
                    chosen = unknown[mining.skip : mining.skip + mining.k]
                    result[place, : len(chosen)] = chosen
                bar.update(len(rows))
        return result

    def _find_twins(self) -> dict[int, list[int]]:
        """For each kept list whose query's words are another's, too: the positions of all that have them."""
        words = np.array([hash64(query_words(self._lists[row].query)) for row in self._kept.tolist()], np.uint64)
        _, group, count = np.unique(words, return_inverse=True, return_counts=True)
        groups: dict[int, list[int]] = {}
        for at in np.flatnonzero(count[group] > 1).tolist():
            groups.setdefault(int(group[at]), []).append(int(self._kept[at]))
        return {row: rows for rows in groups.values() for row in rows}

    def _read_all(self, row: int) -> list[Passage]:
        # Of a mix also what its options leave out: a positive that sample= did not draw must not become a negative.
        return self._lists.read_all(row) if isinstance(self._lists, MixedLists) else self._lists[row].passages

    def _find_known(self, row: int, twins: list[int]) -> set[int]:
        """The keys of what must not be mined for a list."""
        ranking_list = self._lists[row]
        known = {content_key(p.content) for twin in twins for p in self._read_all(twin)}
        known.add(content_key(ranking_list.query))
        return known | self.pool.find_own_keys(ranking_list.query_id)


class MinedLists(Sequence):
    """Ranking lists with the mined passages behind their own, read when asked for; the wrapped lists stay as they are.

    The mined passages are copied to a temporary file, in one pass over the pool.

    Args:
        rows: (lists mined for,) their positions in `lists`; the others get nothing.
        positions: (lists mined for, k) int64 as Miner.mine gives them.
        grade: of the mined passages.
    """

    def __init__(self, lists: Sequence[RankingList], rows: np.ndarray, pool: Pool, positions: np.ndarray, grade: float):
        self._lists, self._positions, self._grade = lists, positions, grade
        self._row_of = {row: number for number, row in enumerate(rows.tolist())}
        self._file, self._places = tempfile.TemporaryFile(), dict.fromkeys(positions[positions >= 0].tolist(), 0)
        for position, passage in enumerate(pool.passages()):
            if position in self._places:
                self._places[position] = self._file.tell()
                pickle.dump(passage, self._file)

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, index: int) -> RankingList:
        ranking_list, row = self._lists[index], self._row_of.get(index)
        mined = []
        for position in self._positions[row].tolist() if row is not None else ():
            if position >= 0:
                self._file.seek(self._places[position])
                mined.append(replace(pickle.load(self._file), grade=self._grade))
        return replace(ranking_list, passages=[*ranking_list.passages, *mined])
