"""Whether the grades of ranking lists follow the order of an encoder, and what else shows before anything is trained.

It is a report, not a filter: an encoder is no judge of a single list, but lists whose grades are upside down show.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from gradret.console import BAR_DELAY_S, show_bar
from gradret.data.lists import (
    JUDGED,
    MIN_SHINGLES,
    NEAR_DUPLICATE,
    Passage,
    RankingList,
    is_grade,
    make_shingles,
    split_words,
)
from gradret.encoder.model import Encoder
from gradret.evaluation.search import Embedder, EmbeddingFunction, as_embedder, embed_texts

LEAST_SHARE = 0.7  # of pairs in the intended order; below, the grades do not mean what they should
MANY_GRADES = 8  # more than so many are rounded to whole numbers in what is told by grade
BLOCK = 64  # lists whose texts are embedded together


@dataclass(frozen=True)
class PairOrder:
    """Of two passages of one list with different grades, how often the higher graded one scores higher.

    Equal scores are not in order; a pair without both scores does not count.

    Attributes:
        kinds: (higher grade, lower grade) -> (pairs in order, pairs), for kinds that have pairs.
    """

    kinds: dict[tuple[float, float], tuple[int, int]]

    @property
    def pairs(self) -> int:
        return sum(pairs for _, pairs in self.kinds.values())

    @property
    def share(self) -> float | None:
        """Of all pairs, those in order; None without pairs."""
        return sum(ordered for ordered, _ in self.kinds.values()) / self.pairs if self.kinds else None

    def warn(self) -> str:
        """A sentence without its full stop where too few pairs are in order; "" where enough are."""
        if self.share is None or self.share >= LEAST_SHARE:
            return ""
        return (
            f"the grades of these lists do not follow the order of the encoder: {self.share:.3f} of the pairs are in "
            f"order, expected {LEAST_SHARE:g} at least"
        )


@dataclass(frozen=True)
class GradeSummary:
    """The passages of one grade: how many, in how many lists, and means; None where there is nothing to average."""

    lists: int
    passages: int
    characters: float
    words: float
    similarity: float | None
    judged: float | None


@dataclass(frozen=True)
class Repeat:
    """Two passages of different lists that say the same.

    Attributes:
        one, other: query id and grade of each.
        share: of the shorter one's runs of three words, those that both have; 1 for the same words.
    """

    one: tuple[str, float]
    other: tuple[str, float]
    share: float


@dataclass(frozen=True)
class Order:
    """What measure_order found.

    Attributes:
        lists, passages: how many.
        complete: lists that have every grade there is.
        encoder, judge: how often pairs are in order by an encoder's similarity of query and passage, and by JUDGED.
        grades: by grade, the highest first.
        repeats: each passage that repeats another list's is in one of them; repeating: how many passages those are.
        similarities: of each list's passages in their order; NaN where the query has no text.
    """

    lists: int
    passages: int
    complete: int
    encoder: PairOrder
    judge: PairOrder
    grades: dict[float, GradeSummary]
    repeats: list[Repeat]
    repeating: int
    similarities: list[np.ndarray]


def measure_order(
    lists: Iterable[RankingList],
    encoder: Encoder | EmbeddingFunction | str | Path,
    *,
    total: int | None = None,
    batch_size: int = 32,
) -> Order:
    """Score every passage against its query, and see which of what is known of lists follows their grades.

    Args:
        lists: read once, in blocks.
        encoder: see search.as_embedder.
        total: how many lists there are, for the progress bar.
        batch_size: texts encoded at once.
    Raises: GradretError as reading the lists and loading the encoder do.
    """
    embedder = as_embedder(encoder, "a query")
    query_ids: list[str] = []
    similarities: list[np.ndarray] = []
    table = array("d")  # six columns, by passage
    repeats = RepeatFinder()
    waiting = iter(lists)
    with show_bar(total=total, desc="scoring passages", unit="list", delay=BAR_DELAY_S) as bar:
        while block := list(islice(waiting, BLOCK)):
            for ranking_list, scores in zip(block, score_lists(block, embedder, batch_size), strict=True):
                for passage, score in zip(ranking_list.passages, scores.tolist(), strict=True):
                    words = split_words(passage.content)
                    sizes = len(passage.content), len(words)
                    table.extend((len(query_ids), passage.grade, score, read_judged(passage), *sizes))
                    repeats.add(len(query_ids), words)
                query_ids.append(ranking_list.query_id)
                similarities.append(scores)
                bar.update()
    numbers, grade, similarity, judged, *of_text = np.array(table).reshape(-1, 6).T
    numbers = numbers.astype(np.int64)
    names = np.floor(grade + 0.5) if len(np.unique(grade)) > MANY_GRADES else grade
    levels, level_of = np.unique(names, return_inverse=True)
    grades = {}
    for level in levels[::-1].tolist():
        rows = names == level
        characters, words_each = (float(column[rows].mean()) for column in of_text)
        held_by = len(np.unique(numbers[rows]))
        means = mean(similarity[rows]), mean(judged[rows])
        grades[level] = GradeSummary(held_by, int(rows.sum()), characters, words_each, *means)
    held = np.unique(np.stack([numbers, level_of]), axis=1)[0]  # a list's number once for each grade it has
    found = repeats.find()
    places = list(zip((query_ids[number] for number in numbers), grade.tolist(), strict=True))
    return Order(
        len(query_ids),
        len(numbers),
        int((np.bincount(held) == len(levels)).sum()),
        count_pairs(numbers, grade, similarity, levels, level_of),
        count_pairs(numbers, grade, judged, levels, level_of),
        grades,
        [Repeat(places[one], places[other], share) for one, other, share in found],
        len({row for one, other, _ in found for row in (one, other)}),
        similarities,
    )


def score_lists(lists: list[RankingList], encoder: Embedder, batch_size: int) -> Iterator[np.ndarray]:
    """Of each list its passages' similarities to the query, in their order; NaN where the query has no text."""
    queries = list({r.query for r in lists})
    # Each text once: the same text has the same similarity then, to the last bit.
    texts = list({p.content for r in lists for p in r.passages})
    query_vectors = embed_texts(encoder, queries, "query", batch_size=batch_size, precision="float32")
    vectors = embed_texts(encoder, texts, batch_size=batch_size, precision="float32")
    query_row = {query: row for row, query in enumerate(queries)}
    text_row = {text: row for row, text in enumerate(texts)}
    for ranking_list in lists:
        rows = [text_row[p.content] for p in ranking_list.passages]
        scores = (vectors[rows] * query_vectors[query_row[ranking_list.query]]).sum(1)
        yield scores if ranking_list.query.strip() else np.full_like(scores, np.nan)


def read_judged(passage: Passage) -> float:
    """A passage's judged grade; NaN where it has none."""
    judged = passage.extra.get(JUDGED)
    return float(judged) if is_grade(judged) else math.nan


def mean(values: np.ndarray) -> float | None:
    """Of the numbers among the values; None where there are none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else None


def count_pairs(
    numbers: np.ndarray, grades: np.ndarray, scores: np.ndarray, levels: np.ndarray, level_of: np.ndarray
) -> PairOrder:
    """The pairs of each list by kind, and how many are in order.

    Args:
        numbers: (passages,) the list of each, ascending.
        grades, scores: (passages,) a pair has two grades and two scores that are numbers.
        levels: the grades that kinds are told by, ascending; level_of: (passages,) the position in it of each.
    """
    known = ~np.isnan(scores)
    numbers, grades, scores, level_of = (column[known] for column in (numbers, grades, scores, level_of))
    counts = np.zeros((2, len(levels), len(levels)), np.int64)  # in order, and all
    bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist() if len(numbers) else []
    for start, end in pairwise(bounds):
        own, level, score = grades[start:end], level_of[start:end], scores[start:end]
        higher, lower = np.nonzero(own[:, None] > own)
        kinds = level[higher], level[lower]
        np.add.at(counts[0], kinds, score[higher] > score[lower])
        np.add.at(counts[1], kinds, 1)
    present = zip(*(axis[::-1].tolist() for axis in np.nonzero(counts[1])), strict=True)  # the highest grades first
    return PairOrder(
        {
            (float(levels[high]), float(levels[low])): (int(counts[0, high, low]), int(counts[1, high, low]))
            for high, low in present
        }
    )


class RepeatFinder:
    """Passages of different lists that repeat each other, in the same words or nearly so."""

    def __init__(self) -> None:
        self._lists, self._wholes, self._counts = array("q"), array("q"), array("q")
        self._shingles = array("q")  # of one passage after the other

    def add(self, number: int, words: list[str]) -> None:
        """The next passage, of the list with this number."""
        shingles = make_shingles(words)
        self._lists.append(number)
        self._wholes.append(hash(tuple(words) or (number, len(self._lists))))  # nothing repeats nothing
        self._counts.append(len(shingles))
        self._shingles.extend(map(hash, shingles))

    def find(self) -> list[tuple[int, int, float]]:
        """Pairs of passages, by their positions, and the share that they have in common; the highest share first.

        Only neighbours are compared among the passages that have a shingle, or all words, in common. So the time is
        that of sorting, and of several copies each is found with another one, not with all.
        """
        lists, counts = np.array(self._lists), np.array(self._counts)
        rows = np.arange(len(lists))
        same, _ = self._meet(np.array(self._wholes), rows, lists)
        found = {pair: 1.0 for pair in map(tuple, same.tolist())}
        near, shared = self._meet(np.array(self._shingles), np.repeat(rows, counts), lists)
        shorter = counts[near].min(axis=1, initial=np.iinfo(np.int64).max)
        for pair, share, size in zip(near.tolist(), (shared / shorter).tolist(), shorter.tolist(), strict=True):
            if size >= MIN_SHINGLES and share >= NEAR_DUPLICATE:
                found.setdefault(tuple(pair), share)
        return sorted(((*pair, share) for pair, share in found.items()), key=lambda one: (-one[2], one))

    @staticmethod
    def _meet(keys: np.ndarray, rows: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (n, 2) of rows of different lists that are neighbours under a key, and under how many (n,)."""
        order = np.lexsort((rows, keys))
        keys, rows = keys[order], rows[order]
        meeting = (keys[1:] == keys[:-1]) & (lists[rows[1:]] != lists[rows[:-1]])
        return np.unique(np.stack([rows[:-1][meeting], rows[1:][meeting]], axis=1), axis=0, return_counts=True)
