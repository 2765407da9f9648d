"""Blind grades: the expected grade under the judge's probabilities, and how it agrees with the intended one."""

from collections import Counter
from collections.abc import Mapping

from gradret.lists import JUDGED, RankingList, grades_agree
from gradret.scales import Scale


def expected_grade(probabilities: Mapping[str, float], scale: Scale) -> float:
    """Sum of p(label) grade(label) over the scale, to four decimals; probabilities by label, summing to 1."""
    return round(sum(probabilities[label] * grade for label, grade in zip(scale.labels, scale.grades, strict=True)), 4)


class Agreement:
    """Counts of (intended grade, nearest grade to the judged one), and how many lists agree in order.

    Attributes:
        counts: Counter of (intended, judged) grades.
        lists, agreed: lists seen, and those whose judged grades order them as the intended ones do.
    """

    def __init__(self, scale: Scale):
        self._scale = scale
        self.counts: Counter = Counter()
        self.lists = self.agreed = 0

    def add(self, ranking_list: RankingList) -> None:
        """Count a list whose passages are judged."""
        pairs = [(p.grade, p.extra[JUDGED]) for p in ranking_list.passages]
        self.counts.update((grade, min(self._scale.grades, key=lambda g: abs(g - judged))) for grade, judged in pairs)
        self.lists += 1
        self.agreed += grades_agree(*zip(*pairs, strict=True))

    def table(self) -> list[list[int]]:
        """Counts, a row for each intended grade, a column for each judged one, both best first."""
        return [[self.counts[row, column] for column in self._scale.grades] for row in self._scale.grades]
