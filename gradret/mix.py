"""Several sources merged into one ranking list per query, with grade selection, remapping and sampling."""

import random
from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from gradret.console import PATIENCE_S, show_bar
from gradret.errors import GradretError
from gradret.lists import GRADE_LIMIT, JUDGED, Passage, RankingList, grades_agree, query_words
from gradret.sources import Source, open_lists, query_selector

SOFTMAX_ADVICE = "use --targets softmax (and, with wasserstein, --contrast-share 0)"


class MixedLists(Sequence):
    """The ranking lists of one or more sources by position, one for each query, read when asked for.

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
        self._parts = [open_lists(source) for source in sources]
        self._select = [query_selector(s.queries) if s.queries is not None else None for s in sources]
        self.fingerprint = "+".join(part.fingerprint for part in self._parts)
        self._rows = self._merge_rows()  # (lists, sources) int32, -1 where a source lacks the query
        self.disagreeing = np.zeros(len(self._rows), bool)
        seen: dict[int, int] = {}
        colliding = set()
        if len(self._parts) > 1:
            for part in self._parts:
                for query_id, key in zip(part.ids.tolist(), part.keys.tolist(), strict=True):
                    if seen.setdefault(query_id, key) != key:
                        colliding.add(query_id)
        self.colliding_ids = len(colliding)

    def _merge_rows(self) -> np.ndarray:
        if len(self._parts) == 1:
            return np.arange(len(self._parts[0]), dtype=np.int32)[:, None]
        row_of: dict[int, int] = {}
        for part in self._parts:
            for key in part.keys.tolist():
                row_of.setdefault(key, len(row_of))
        rows = np.full((len(row_of), len(self._parts)), -1, np.int32)
        for column, part in enumerate(self._parts):
            for index, key in enumerate(part.keys.tolist()):
                rows[row_of[key], column] = index
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RankingList:
        merged, seen = None, set()
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
        return merged

    def read_all(self, index: int) -> list[Passage]:
        """The passages that the sources have for a list's query, whatever their options select."""
        parts = zip(self._parts, self._rows[index].tolist(), strict=True)
        return [passage for part, row in parts if row >= 0 for passage in part[row].passages]

    def _choose(self, index: int, part: RankingList, source: Source, select) -> list:
        if select is not None and not select(part.query_id):
            return []
        passages = part.passages
        if source.labels != "intended":
            judged = _read_judged(part, source)
            if source.labels == "judged":
                for passage, grade in zip(passages, judged, strict=True):
                    passage.grade = grade
            elif not grades_agree([p.grade for p in passages], judged):
                self.disagreeing[index] = True
                return []
        if source.shuffle:
            draw = random.Random(f"shuffle/{self._seed}/{source.name}/{part.query_id}")
            if draw.random() < source.shuffle:
                grades = [p.grade for p in passages]
                draw.shuffle(grades)
                for passage, grade in zip(passages, grades, strict=True):
                    passage.grade = grade
        if source.grades is not None:
            mapping = dict(source.grades)
            passages = [p for p in passages if p.grade in mapping]
            for passage in passages:
                passage.grade = mapping[passage.grade]
        if source.sample is not None and len(passages) > source.sample:
            draw = random.Random(f"{self._seed}/{source.name}/{part.query_id}")
            chosen = sorted(draw.sample(range(len(passages)), source.sample))
            passages = [passages[i] for i in chosen]
        return passages


def _read_judged(part: RankingList, source: Source) -> list[float]:
    grades = [passage.extra.get(JUDGED) for passage in part.passages]
    for position, grade in enumerate(grades, 1):
        number = isinstance(grade, (int, float)) and not isinstance(grade, bool)
        if not number or not abs(grade) < GRADE_LIMIT:
            what = "has no judged grade" if grade is None else f"its judged grade '{grade}' is not a finite number"
            raise GradretError(
                f"{part.where}: passage {position}: {what}, which labels={source.labels} needs; "
                "write the lists with gradret gen --judge, or leave labels out"
            )
    return grades


@dataclass(frozen=True)
class ListsSummary:
    """What a check of all lists found.

    kept: positions of the lists to train on; best: (kept,) the highest grade of each; longest: the longest passage.
    """

    kept: np.ndarray
    passages: int
    lowest: float
    highest: float
    equal_grades: int
    empty: int
    excluded: int
    disagreeing: int
    longest: str
    best: np.ndarray

    def __str__(self) -> str:
        text = f"{len(self.kept)} lists, {self.passages} passages, grades {self.lowest:g} to {self.highest:g}"
        if self.equal_grades:
            text += f"; {self.equal_grades} lists whose grades are all equal, kept"
        if self.empty:
            text += f"; {self.empty} lists left out: none of their passages is selected"
        if self.disagreeing:
            text += f"; {self.disagreeing} lists left out: their judged and intended grades are not in one order"
        if self.excluded:
            text += f"; {self.excluded} lists left out, whose query is one to be measured"
        return text


def check_lists(lists: MixedLists, *, refuse_negative: bool, exclude: Container[str] = ()) -> ListsSummary:
    """Read every list once: all are well formed, and no grade is negative where targets begin at grade 0.

    Args:
        lists: of one source or several.
        refuse_negative: whether a negative grade is an error.
        exclude: lists with these queries (see lists.query_words) are left out, as those without passages are.
    Raises: GradretError naming the first list at fault, or when no list has a passage.
    """
    kept = np.zeros(len(lists), bool)
    passages, lowest, highest, equal_grades, empty, excluded, disagreeing = 0, np.inf, -np.inf, 0, 0, 0, 0
    longest, best = "", array("d")
    for index in show_bar(range(len(lists)), desc="checking lists", unit="list", delay=PATIENCE_S):
        ranking_list = lists[index]
        grades = [p.grade for p in ranking_list.passages]
        if not grades:
            disagreeing += lists.disagreeing[index]
            empty += not lists.disagreeing[index]
            continue
        if query_words(ranking_list.query) in exclude:
            excluded += 1
            continue
        kept[index] = True
        low, high = min(grades), max(grades)
        if refuse_negative and low < 0:
            raise GradretError(
                f"{ranking_list.where}: list '{ranking_list.query_id}' has the negative grade {low:g}, to which "
                f"targets of 2^grade - 1 or sqrt(grade) give nothing; map it (SOURCE?grades={low:g}:0,...) or "
                f"{SOFTMAX_ADVICE}"
            )
        passages += len(grades)
        longest = max(longest, *(p.content for p in ranking_list.passages), key=len)
        lowest, highest = min(lowest, low), max(highest, high)
        best.append(high)
        equal_grades += low == high
    if not kept.any():
        raise GradretError(
            "no ranking list is left: the chosen queries, grades and labels match none, or all are to be measured"
        )
    counts = equal_grades, empty, excluded, int(disagreeing)
    return ListsSummary(np.flatnonzero(kept), passages, lowest, highest, *counts, longest, np.array(best))
