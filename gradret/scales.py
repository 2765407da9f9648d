"""Scales of relevance: the grades there are and what each means."""

import json
import os
import string
from dataclasses import dataclass

from gradret.errors import GradretError
from gradret.lists import GRADE_LIMIT, decode_json, open_file

DIGITS = set(range(10))


@dataclass(frozen=True)
class Scale:
    """Grades and their definitions, best first.

    Attributes:
        levels: (grade, definition) pairs, grades strictly falling; at least two, at most 26.
    """

    levels: tuple[tuple[float, str], ...]

    def __post_init__(self):
        if not 2 <= len(self.levels) <= len(string.ascii_uppercase):
            raise ValueError(f"a scale has 2 to 26 grades, got {len(self.levels)}")
        if list(self.grades) != sorted(set(self.grades), reverse=True):
            raise ValueError(f"grades must fall strictly, got {self.grades}")

    @property
    def grades(self) -> tuple[float, ...]:
        return tuple(grade for grade, _ in self.levels)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a reply, aligned with the grades: "grade_3", "grade_2.5", ..."""
        return tuple(f"grade_{grade:g}" for grade in self.grades)

    @property
    def labels(self) -> tuple[str, ...]:
        """One-character names of the grades, which every vocabulary has as one token: the digit where all are one."""
        if set(self.grades) <= DIGITS:
            return tuple(f"{grade:g}" for grade in self.grades)
        return tuple(string.ascii_uppercase[: len(self.levels)])


TREC_DL = Scale(
    (
        (3, "Perfectly relevant: the passage is devoted to what the query asks and holds its full, exact answer."),
        (
            2,
            "Highly relevant: the passage holds some answer to the query, but an incomplete or unclear one, or one "
            "buried among other matters.",
        ),
        (1, "Related: the passage is on the subject of the query but does not answer it."),
        (0, "Irrelevant: the passage is about something different and has nothing to do with the query."),
    )
)


def read_scale(path: str | os.PathLike) -> Scale:
    """A scale from a JSON file: an object of grades and their definitions, in any order.

    Raises: GradretError when the file is no such object, has a grade that is no number, is there twice or has more
        than six digits, an empty definition, or fewer than 2 or more than 26 grades.
    """
    with open_file(path) as file:
        content = file.read()
    if not isinstance(decode_json(content, str(path)), dict):
        raise GradretError(f'{path}: expected a JSON object such as {{"1": "what it means", "0": "what it means"}}')
    levels: dict[float, str] = {}
    for key, definition in json.loads(content, object_pairs_hook=tuple):  # pairs, so that a repeated key shows
        try:
            grade = float(key) + 0.0  # -0 is 0
        except ValueError:
            grade = float("nan")
        if not abs(grade) < GRADE_LIMIT:
            raise GradretError(f"{path}: grade '{key}' is not a number below 1000; write one such as 0, 1 or 2.5")
        if grade != float(f"{grade:g}"):
            raise GradretError(f"{path}: grade '{key}' has more than six digits; round it")
        if grade in levels:
            raise GradretError(f"{path}: grade '{key}' is there twice; define every grade once")
        if not isinstance(definition, str) or not definition.strip():
            raise GradretError(f"{path}: the definition of grade '{key}' is not a non-empty string")
        levels[int(grade) if grade.is_integer() else grade] = " ".join(definition.split())
    if not 2 <= len(levels) <= len(string.ascii_uppercase):
        raise GradretError(f"{path}: expected 2 to 26 grades with their definitions, got {len(levels)}")
    return Scale(tuple(sorted(levels.items(), reverse=True)))
