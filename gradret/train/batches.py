"""From ranking lists to the tensors of a step: which lists, which distinct documents, which grades."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradret.data.lists import RankingList, query_words
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder


def draw_positions(step: int, *, count: int, size: int, seed: int) -> list[int]:
    """Positions of the `size` lists of a step, out of `count`.

    Epochs are seeded permutations laid end to end, and step s takes places s * size onwards: every list comes
    once an epoch, every step is full, and a step's lists depend on the seed and the step alone.
    """
    places = range(step * size, (step + 1) * size)
    return [int(_epoch_order(count, seed, place // count)[place % count]) for place in places]


@lru_cache(maxsize=2)  # a step touches one epoch, or two where they meet
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass
class Batch:
    """B lists with their N distinct documents; up to n are graded for each list.

    Attributes:
        query_ids, queries: B strings.
        documents: N texts, every one once however many lists share it.
        columns: (B, n) int64, the documents graded for a list as positions in `documents`.
        grades: (B, n) float32.
        mask: (B, n) bool, True where the list has a document.
    """

    query_ids: list[str]
    queries: list[str]
    documents: list[str]
    columns: Tensor
    grades: Tensor
    mask: Tensor

    def list_pairs(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The graded pairs of some lists: M list numbers, counted from the first of them, M columns, M grades."""
        mask = self.mask[rows]
        return mask.nonzero()[:, 0], self.columns[rows][mask], self.grades[rows][mask]

    def spread_grades(self, default_grade: float, rows: slice = slice(None)) -> Tensor:
        """(B, N) grades of every document for every list, or for some; those of other lists have the default grade."""
        row, column, grade = self.list_pairs(rows)
        grades = torch.full((len(self.mask[rows]), len(self.documents)), default_grade, dtype=torch.float32)
        grades[row, column] = grade
        return grades


def collate(lists: Sequence[RankingList], *, in_batch: bool = True) -> Batch:
    """A Batch of ranking lists, in which documents are one where their words are, see query_words.

    A document that stands twice in one list keeps its first grade. With `in_batch`, where lists are scored against each
    other's documents, those whose queries are the same words grade each other's documents as these are graded there.
    """
    position: dict[str, int] = {}
    documents: list[str] = []
    rows: list[dict[int, float]] = []
    rows_of: dict[str, list[dict[int, float]]] = {}  # by the words of the query
    for ranking_list in lists:
        own: dict[int, float] = {}
        for passage in ranking_list.passages:
            column = position.setdefault(query_words(passage.content), len(documents))
            if column == len(documents):
                documents.append(passage.content)
            own.setdefault(column, passage.grade)
        rows.append(own)
        rows_of.setdefault(query_words(ranking_list.query), []).append(own)
    for alike in rows_of.values() if in_batch else ():
        graded = [list(own.items()) for own in alike]
        for own in alike if len(alike) > 1 else ():
            for column, grade in chain.from_iterable(graded):
                own.setdefault(column, grade)
    columns = pad_sequence([torch.tensor(list(own)) for own in rows], batch_first=True)
    grades = pad_sequence([torch.tensor(list(own.values()), dtype=torch.float32) for own in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(own), dtype=torch.bool) for own in rows], batch_first=True)
    return Batch([r.query_id for r in lists], [r.query for r in lists], documents, columns, grades, mask)


def draw_batches(
    lists: Sequence[RankingList],
    kept: np.ndarray,
    step: int,
    *,
    batch_lists: int,
    accumulate: int,
    seed: int,
    in_batch: bool,
) -> Iterator[Batch]:
    """The step's micro-batches of `batch_lists` lists each, read as they are asked for; see collate.

    Each of several processes reads all of them: that costs less than to tell the others what was read.
    """
    positions = draw_positions(step, count=len(kept), size=batch_lists * accumulate, seed=seed)
    for start in range(0, len(positions), batch_lists):
        drawn = [lists[int(kept[position])] for position in positions[start : start + batch_lists]]
        yield collate(drawn, in_batch=in_batch)


def tokenize_batch(batch: Batch, encoder: Encoder, processes: Processes = ALONE) -> list[np.ndarray]:
    """Token ids of the batch's B queries and N documents, in this order; each process tokenizes its share."""
    count = len(batch.queries)
    share = processes.split(count + len(batch.documents))
    queries = batch.queries[share.start : share.stop]
    documents = batch.documents[max(share.start - count, 0) : max(share.stop - count, 0)]
    tokens = encoder.tokenize(queries, "query") + encoder.tokenize(documents, "document")
    return [text for part in processes.gather_objects(tokens) for text in part]
