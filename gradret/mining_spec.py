"""How `gradret fit --mine` is spelled: which passages to mine, from where, how often."""

import math
import re
from dataclasses import dataclass

from gradret.errors import GradretError
from gradret.lists import GRADE_LIMIT
from gradret.sources import parse_source

ENCODER, BM25 = "encoder", "bm25"
KEYS = ("k", "grade", "from", "by", "skip", "every")
LEAST_EVERY = 0.001  # epochs: each round ranks for all lists
COUNT_DIGITS = 18  # what an int64 holds
# SOURCE may hold commas itself, as in lists.jsonl?grades=1,0: only one before a key ends it.
SEPARATOR = re.compile(rf",\s*(?=(?:{'|'.join(KEYS)})=)")


@dataclass(frozen=True)
class Mining:
    """`k=2,grade=1[,from=SOURCE][,by=encoder|bm25][,skip=S][,every=EPOCHS]`, parsed.

    Attributes:
        k: passages added to a list.
        grade: theirs.
        source: where the documents come from, see mining_pool.open_pool; None: the passages of the training lists.
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


def parse_mining(text: str) -> Mining:
    """A Mining from its spelling, e.g. `k=2,grade=1,from=beir/scifact,skip=5`.

    A comma belongs to SOURCE unless one of the keys and `=` follow it.

    Raises: GradretError.
    """
    here, given = f"mine '{text}'", {}
    for item in SEPARATOR.split(text.strip()):
        key, equals, value = item.partition("=")
        if key != "from" and "," in value:  # what follows the comma is no key
            value, _, item = value.partition(",")
            key = item.partition("=")[0]
        if key not in KEYS or not equals:
            raise GradretError(
                f"{here}: '{item}' is not known; use k=K,grade=GRADE and, if wanted, from=SOURCE, "
                "by=encoder|bm25, skip=S, every=EPOCHS"
            )
        if key in given:
            raise GradretError(f"{here}: {key} is given twice; leave one out")
        given[key] = value
    for key in ("k", "grade"):
        if key not in given:
            raise GradretError(f"{here}: {key} is missing; give at least k=K,grade=GRADE, such as k=2,grade=1")
    if "from" in given:
        if not given["from"]:
            raise GradretError(f"{here}: from is empty; name a file, a BEIR directory or an ir_datasets id")
        parse_source(given["from"])
    by = given.get("by", ENCODER)
    if by not in (ENCODER, BM25):
        raise GradretError(f"{here}: by '{by}' is not one of {ENCODER}, {BM25}")
    every = None
    if "every" in given:
        if by == BM25:
            raise GradretError(f"{here}: every is for by={ENCODER}; BM25 would rank as before: leave it out")
        every = _parse_number(given["every"])
        if every is None or every <= 0:
            raise GradretError(f"{here}: every '{given['every']}' is not a number of epochs above 0")
        if every < LEAST_EVERY:
            raise GradretError(f"{here}: every '{given['every']}' is below {LEAST_EVERY} epochs; mine less often")
    grade = _parse_number(given["grade"])
    if grade is None or abs(grade) >= GRADE_LIMIT:
        raise GradretError(f"{here}: grade '{given['grade']}' is not a finite number below {GRADE_LIMIT}")
    k, skip = _parse_count(given["k"]), _parse_count(given.get("skip", "0"))
    if not k:
        raise GradretError(f"{here}: k '{given['k']}' is not a whole number above 0")
    if skip is None:
        raise GradretError(f"{here}: skip '{given['skip']}' is not a whole number of 0 or above")
    return Mining(k, grade, given.get("from"), by, skip, every)


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= COUNT_DIGITS else None
