"""The words of a text, and shingles: runs of words, by which texts that repeat each other are found."""

import re
import unicodedata
from collections.abc import Sequence

# Thai, Lao, Burmese, Khmer, kana and Han write no spaces: there each character counts as a word.
UNSPACED = (
    "\u0e00-\u0e3e\u0e40-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
# Vowel signs of Indic scripts, Hebrew and Arabic points, accents: part of a word, though not for \w.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(f"[{UNSPACED}]|(?:[^\\W_{UNSPACED}]|[{MARKS}])+")

# Thresholds against 513 real lists (2,052 passages written by a large model), of which they reject none.
SHINGLE = 3  # words
MIN_SHINGLES = 8  # of the shorter text; below, chance decides
# Share of the shorter text's shingles that the other has, too. Two passages of a real list share at most .06; a copy
# in which every fifth word is another shares .5 of them in the median.
NEAR_DUPLICATE = 0.3


def split_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; in scripts without spaces, its characters."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def weigh_words(words: Sequence[str]) -> float:
    """How many words they are worth: a character of a script without spaces is half a word."""
    return sum(0.5 if UNSPACED_RUN.match(word) else 1 for word in words)


def make_shingles(words: Sequence[str], size: int = SHINGLE) -> set[tuple[str, ...]]:
    """Every run of so many words; none where there are fewer."""
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
