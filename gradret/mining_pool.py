"""The documents that hard negatives are mined from: each content once, read by position."""

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

import numpy as np

from gradret.collection import Collection, Document, is_self_retrieving, read_records
from gradret.console import PATIENCE_S, show_bar
from gradret.errors import GradretError
from gradret.ir_home import iterate_documents, load_dataset, open_store, reading
from gradret.lists import Passage, RankingList, decode_json, hash64, open_file, query_words
from gradret.mix import MixedLists
from gradret.sources import Source, find_path, parse_source

CORPUS_KEYS = ("_id", "text")
PLACE_BITS = 24  # of a place in ranking lists, for the passage's number in its list
ID_BLOCK = 65536  # ids turned into one array at a time


def content_key(text: str) -> int:
    """What makes two contents one: the same words, whatever their case and the space between them."""
    return hash64(query_words(text))


class Pool(Collection):
    """Documents to mine from, as a collection without queries whose document ids are positions.

    Of equal contents only the first is there, and none without words. In memory stand 16 bytes a document, no text.

    Attributes:
        keys: (documents,) uint64, content_key of each.
        fingerprint: hex digest of all ids and contents in their order.
    Raises: GradretError when there is no document.
    """

    def __init__(self, name: str, *, drop_self: bool = False):
        self.name, self.drop_self, self.queries, self.qrels = name, drop_self, {}, {}
        keys, places, ids = array("Q"), array("q"), array("Q")
        digest = hashlib.blake2b(digest_size=16)
        for place, doc_id, content in show_bar(
            self._scan(), desc="reading documents to mine from", unit="doc", delay=PATIENCE_S
        ):
            digest.update(f"{doc_id}\0{content}\0".encode())
            if content.strip():
                keys.append(content_key(content))
                places.append(place)
                if drop_self:
                    ids.append(hash64(doc_id))
        if not keys:
            raise GradretError(f"{name}: holds no document with words to mine from")
        self.fingerprint = digest.hexdigest()
        all_keys = np.frombuffer(keys, np.uint64)
        first = np.sort(np.unique(all_keys, return_index=True)[1])
        self.keys, self._places = all_keys[first], np.frombuffer(places, np.int64)[first]
        self.document_count = len(first)
        # Of a document that is another's double, too: its content is what must be left out.
        order = np.argsort(np.array(ids, np.uint64), kind="stable")
        self._id_hashes, self._id_keys = np.array(ids, np.uint64)[order], all_keys[order]

    @abstractmethod
    def _scan(self) -> Iterator[tuple[int, str, str]]:
        """Every document once: its place (what `read` needs to find it), its id and its content."""

    @abstractmethod
    def read(self, position: int) -> Passage:
        """The document at a position as a new passage of grade 0."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        for position in range(start, self.document_count):
            yield Document(str(position), self.read(position).content)

    def read_documents(self, doc_ids: Iterable[str]) -> dict[str, Passage]:
        return {i: self.read(int(i)) for i in doc_ids if i.isdecimal() and int(i) < self.document_count}

    def find_own_keys(self, query_id: str) -> set[int]:
        """With drop_self, the key of the document that has the query's id; else none."""
        found = np.uint64(hash64(query_id))
        at = np.searchsorted(self._id_hashes, found)
        return {int(self._id_keys[at])} if at < len(self._id_hashes) and self._id_hashes[at] == found else set()


class ListPool(Pool):
    """The passages of ranking lists.

    Args:
        lists: by position.
        rows: positions in `lists` of those whose passages are taken.
    """

    def __init__(self, name: str, lists: Sequence[RankingList], rows: Iterable[int], *, drop_self: bool = False):
        self._lists, self._rows = lists, rows
        self._last: tuple[int, list[Passage]] = (-1, [])
        super().__init__(name, drop_self=drop_self)

    def _scan(self) -> Iterator[tuple[int, str, str]]:
        for row in self._rows:
            for number, passage in enumerate(self._lists[int(row)].passages):
                yield int(row) << PLACE_BITS | number, passage.doc_id or "", passage.content

    def read(self, position: int) -> Passage:
        row, number = divmod(int(self._places[position]), 1 << PLACE_BITS)
        if self._last[0] != row:  # documents() asks for all passages of a list in turn
            self._last = row, self._lists[row].passages
        return replace(self._last[1][number], grade=0)


class CorpusPool(Pool):
    """The corpus.jsonl of a BEIR directory; queries and qrels need not be there."""

    def __init__(self, directory: Path, *, drop_self: bool = False):
        self._path = directory / "corpus.jsonl"
        self._file = open_file(self._path)
        super().__init__(str(directory), drop_self=drop_self)

    def _scan(self) -> Iterator[tuple[int, str, str]]:
        for record, offset in read_records(self._path, CORPUS_KEYS):
            yield offset, record["_id"], _make_passage(record).content

    def read(self, position: int) -> Passage:
        self._file.seek(int(self._places[position]))
        return _make_passage(decode_json(self._file.readline(), str(self._path)))


class IrDatasetsPool(Pool):
    """The documents of any ir_datasets id, with or without queries and qrels; memory grows by their ids."""

    def __init__(self, dataset_id: str, *, drop_self: bool = False):
        self._dataset = load_dataset(dataset_id)
        if not self._dataset.has_docs():
            raise GradretError(f"{dataset_id}: this ir_datasets id has no documents; name one that has")
        self._store, self._id_blocks = None, [[]]
        super().__init__(dataset_id, drop_self=drop_self)
        self._ids = np.concatenate([np.array(block, "S") for block in self._id_blocks])[self._places]
        del self._id_blocks

    def _scan(self) -> Iterator[tuple[int, str, str]]:
        for number, document in enumerate(iterate_documents(self._dataset)):
            if len(self._id_blocks[-1]) == ID_BLOCK:
                self._id_blocks[-1:] = [np.array(self._id_blocks[-1], "S"), []]
            self._id_blocks[-1].append(document.doc_id.encode())
            yield number, document.doc_id, document.default_text()

    def documents(self, start: int = 0) -> Iterator[Document]:
        # In the collection's order, which its store reads much slower one by one.
        chosen = np.zeros(self._places[-1] + 1, bool)
        chosen[self._places[start:]] = True
        for position, document in enumerate(compress(iterate_documents(self._dataset), chosen), start):
            yield Document(str(position), document.default_text())

    def read(self, position: int) -> Passage:
        if self._store is None:
            self._store = open_store(self._dataset)
        doc_id = self._ids[position].decode()
        with reading(self._dataset):
            return Passage(0, self._store.get(doc_id).default_text(), None, doc_id)


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
        return ListPool(text, lists, range(len(lists)), drop_self=bool(source.drop_self))
    if source != Source(source.name, drop_self=source.drop_self):
        raise GradretError(
            f"{text}: grades, sample, queries and labels choose among judged documents, but all documents of "
            f"{source.name} are mined from; leave these options out"
        )
    names = source.name.split("/") if path is None else [path.resolve().name]
    drop_self = is_self_retrieving(*names) if source.drop_self is None else source.drop_self
    return IrDatasetsPool(source.name, drop_self=drop_self) if path is None else CorpusPool(path, drop_self=drop_self)


def _make_passage(record: dict) -> Passage:
    return Passage(0, record["text"], record.get("title") or None, record["_id"])
