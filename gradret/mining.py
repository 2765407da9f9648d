"""Mining of hard negatives: passages that rank high for a query, added to its list at a grade of choice."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gradret.bm25 import import_bm25s, index_bm25
from gradret.console import show_bar
from gradret.encoder import Encoder
from gradret.errors import GradretError
from gradret.lists import Passage, RankingList, hash64, query_words
from gradret.mining_pool import ListPool, Pool, content_key, open_pool
from gradret.mining_spec import BM25, Mining
from gradret.mix import MixedLists
from gradret.processes import ALONE, Processes
from gradret.retrieve import default_cache, embed_corpus, top_k

QUERY_BLOCK = 1024  # lists read, encoded and searched at once
BM25_SPELLING = f"mine by={BM25}"  # in messages

# A function of B queries and a depth: for each the positions of its best documents, best first, at most `depth`.
Ranker = Callable[[list[str], int], Sequence[np.ndarray]]


class Miner:
    """Ranks a pool of documents for the query of every list and picks k that the list does not have.

    Left out are: the list's own passages, also those that its sources' options (grades=, sample=) keep from training;
    the passages of other lists with the same query; the query itself; with drop_self the document with the query's
    id. Passages are one when their words are, see mining_pool.content_key, whatever their ids.

    Of the collections to be measured nothing enters but what a user names as from=SOURCE, and of that only documents,
    never queries or qrels. Lists that `fit --exclude` leaves out are not in `kept`: nothing is mined for their
    queries, nor, by default, from their passages.

    Args:
        mining: see Mining.
        lists: the training lists by position.
        kept: (lists trained on,) positions in `lists`.
        rows: those of them that are mined for; None for all.
    Attributes:
        rows: as above.
        pool: the documents, see Pool; by default the passages of the kept lists.
        fingerprint: of the pool's content: positions mined from another one mean nothing.
    Raises: GradretError when the source can not be read, or bm25s is asked for and not installed.
    """

    def __init__(self, mining: Mining, lists: Sequence[RankingList], kept: np.ndarray, rows: np.ndarray | None = None):
        self.mining, self._lists, self._kept = mining, lists, kept
        self.rows = kept if rows is None else rows
        if mining.by == BM25:
            import_bm25s(BM25_SPELLING)  # before the work
        self.pool: Pool = (
            ListPool("the training lists", lists, kept) if mining.source is None else open_pool(mining.source)
        )
        self.fingerprint = self.pool.fingerprint

    def mine(
        self,
        encoder: Encoder,
        *,
        precision: str = "float32",
        batch_size: int = 32,
        processes: Processes = ALONE,
        progress: bool = True,
        check: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Positions in the pool of the passages mined for each of the lists, best first.

        The processes share the embedding of the pool; the first searches and tells the others. Of equal scores the
        earlier document comes first. BM25 ranks only documents that share a word with the query.

        Args:
            encoder: as it is now; of no use to BM25.
            precision: "float32" or "bfloat16" (autocast).
            batch_size: texts encoded at once.
            processes: all of them must call.
            progress: show bars on a terminal.
            check: called now and then; what it raises ends the work. By default whether the other processes are there.
        Returns: (lists mined for, k) int64, -1 where there are fewer; k is at most the number of documents.
        Raises: GradretError.
        """
        check = check or processes.check
        if self.mining.by == BM25:
            return self._choose_for_all(processes, lambda: rank_by_bm25(self.pool, check), progress, check)
        with _working_folder(processes) as folder:
            options = {"batch_size": batch_size, "precision": precision}
            shared = {"progress": progress, "processes": processes, "check": check}
            corpus = embed_corpus(encoder, self.pool, folder, **shared, **options)

            def rank(queries: list[str], depth: int) -> np.ndarray:
                vectors = encoder.encode(queries, "query", **options)
                vectors = encoder.search_vectors(torch.from_numpy(vectors)).numpy()  # (B, D)
                return top_k(vectors, corpus.vectors, depth, device=encoder.device, check=check)[1]

            return self._choose_for_all(processes, lambda: rank, progress, check)

    def _choose_for_all(
        self, processes: Processes, make_ranker: Callable[[], Ranker], progress: bool, check: Callable[[], None]
    ) -> np.ndarray:
        found = None
        with processes.agree():
            if processes.is_first:
                found = self._choose(make_ranker(), progress, check)
        return processes.broadcast(found)

    def _choose(self, rank: Ranker, progress: bool, check: Callable[[], None]) -> np.ndarray:
        mining, twins = self.mining, self._find_twins()
        result = np.full((len(self.rows), min(mining.k, self.pool.document_count)), -1, np.int64)
        with show_bar(shown=progress, total=len(result), desc="mining", unit="list") as bar:
            for start in range(0, len(result), QUERY_BLOCK):
                check()
                rows = self.rows[start : start + QUERY_BLOCK].tolist()
                known = [self._find_known(row, twins.get(row, [row])) for row in rows]
                # The pool holds every content once: no more than the known ones are passed over.
                depth = min(mining.k + mining.skip + max(map(len, known)), self.pool.document_count)
                rankings = rank([self._lists[row].query for row in rows], depth)
                for place, (ranking, left_out) in enumerate(zip(rankings, known, strict=True), start):
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

    def _find_known(self, row: int, twins: list[int]) -> set[int]:
        """The keys of what must not be mined for a list."""
        ranking_list = self._lists[row]
        known = {content_key(p.content) for twin in twins for p in read_known(self._lists, twin)}
        known.add(content_key(ranking_list.query))
        return known | self.pool.find_own_keys(ranking_list.query_id)


class MinedLists(Sequence):
    """Ranking lists with the mined passages behind their own, read when asked for; the wrapped lists stay as they are.

    Args:
        lists: by position.
        rows: (lists mined for,) their positions in `lists`; the others get nothing.
        pool: that was mined from.
        positions: (lists mined for, k) int64 as Miner.mine gives them.
        grade: of the mined passages.
    Raises: GradretError when the positions do not belong to these lists and this pool.
    """

    def __init__(self, lists: Sequence[RankingList], rows: np.ndarray, pool: Pool, positions: np.ndarray, grade: float):
        last = positions.max(initial=-1) + 1
        if len(positions) != len(rows) or last > pool.document_count:
            raise GradretError(
                f"{pool.name}: passages were mined for {len(positions)} lists, the last of them document {last}, but "
                f"there are {len(rows)} lists and {pool.document_count} documents: the data changed; start a new run"
            )
        self._lists, self._pool, self._positions, self._grade = lists, pool, positions, grade
        self._rows = np.full(len(lists), -1, np.int64)
        self._rows[rows] = np.arange(len(rows))

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, index: int) -> RankingList:
        ranking_list, row = self._lists[index], self._rows[index]
        chosen = [int(p) for p in self._positions[row] if p >= 0] if row >= 0 else []
        mined = [replace(self._pool.read(p), grade=self._grade) for p in chosen]
        return replace(ranking_list, passages=[*ranking_list.passages, *mined])


def read_known(lists: Sequence[RankingList], row: int) -> list[Passage]:
    """A list's passages; of a mix all that its sources have for the query, whatever their options select.

    A positive that `sample=` did not draw must not come back as a negative.
    """
    return lists.read_all(row) if isinstance(lists, MixedLists) else lists[row].passages


def rank_by_bm25(pool: Pool, check: Callable[[], None] = lambda: None) -> Ranker:
    """A ranker by BM25, see bm25.index_bm25: documents that share no word with the query are not ranked."""
    rank = index_bm25(pool, BM25_SPELLING, check)
    return lambda queries, depth: [positions for positions, _ in rank(queries, depth)]


@contextmanager
def _working_folder(processes: Processes):
    """A folder on the cache's disk for the time being, in the first process, which alone writes; "." in the others."""
    folder = None
    with processes.agree():
        if processes.is_first:
            folder = _make_folder()
    try:
        yield Path(folder or ".")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> str:
    # Beside the cache, not in /tmp, which may be memory. The embeddings of an encoder in training serve no one else.
    cache = default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="mining-", dir=cache)
    except OSError as error:
        raise GradretError(
            f"{cache}: can not be written ({error.strerror}); set GRADRET_CACHE to a folder that can"
        ) from None
