"""Checks of written passages: what no list should hold, found by rules."""

import re
import unicodedata
from collections.abc import Sequence

from gradret.errors import GradretError
from gradret.lists import RankingList
from gradret.replies import Unusable
from gradret.settings import GenSettings

# Thresholds against 513 real lists (2,052 passages written by a large model), of which they reject none.
SHINGLE = 3  # words
MIN_SHINGLES = 8  # of the shorter text; below, chance decides
# Share of the shorter text's shingles that the other has, too. Two passages of a real list share at most .06; a copy
# in which every fifth word is another shares .5 of them in the median.
NEAR_DUPLICATE = 0.3
ECHO_WORDS = 8  # in a row, as in the instructions; real passages have at most 4 in common with them
# No real passage holds its whole query, of 3 words or more; but a shorter one, or a name, may come up by itself: only
# one of COPIED_WORDS is a copy wherever it stands, one of OPENING_WORDS if the passage opens with it.
COPIED_WORDS, OPENING_WORDS = 12, 6
LEAST_DISTINCT = 0.5  # share of a passage's shingles that are not there a second time; real passages have .95 at least
LANGUAGE_SHARE = 0.01  # least probability of the language asked for: kin, such as Danish to Norwegian, has more

# Thai, Lao, Burmese, Khmer, kana and Han write no spaces: there each character counts as a word, if half a one.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs of Indic scripts, Hebrew and Arabic points, accents: part of a word, though not for \w.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(f"[{UNSPACED}]|(?:[^\\W_{UNSPACED}]|[{MARKS}])+")
UNSPACED_WORD = re.compile(f"[{UNSPACED}]")

FORM_KEY = re.compile(r"\bgrade_-?\d|```|\[/?INST\]|<\|\w+\|>", re.IGNORECASE)  # and what chats are made of
# At the start only, and with what is refused: "I can't sleep" opens many a good passage.
REFUSAL = re.compile(
    r"""\W*(
    ((i'm|i\ am|we're|we\ are)\ )?((very|so)\ )?sorry([,.!:;]|\ but\b)\ ?((but|however),?\ )?(i|we|as\ an?\ ai)\b
    |((my|our)\ |(i|we)\ )?(sincere(ly)?\ )?apolog(ies|i[sz]e)\b.{0,40}\b(i|we)\ (can|could|am|are|do|will)
    |(unfortunately,?\ )?i('m|\ am)?\ (can'?t|can\ ?not|won't|will\ not|(un|not\ )able\ to|must\ decline\ to)\ (\w+\ )?
        (assist|help\ (you|with)|provide|write|generate|create|fulfil|comply|complete|(answer|respond\ to)\ (th|your))
    |i\ must\ decline\b|i\ will\ not\ be\ able\ to\ (assist|help|provide|write|answer)
    |(unfortunately,?\ )?i\ (do\ not|don't)\ have\ (access\ to\ (real|external|current|the\ internet)|the\ ability\ to)
    |as\ an?\ (ai(,|\ (assistant|(language\ )?model|system),)|artificial\ intelligence,|(large\ )?language\ model,)
    |the\ query\ (asks|is\ about|seeks)\b|(perfectly|highly)\ relevant\b.{0,3}:|grade\ -?\d\s*[:.]
    |(sure|certainly|of\ course|okay|ok)\b.{0,20}\bhere('s|\ is|\ are)\b
    |here('s|\ is|\ are)\ (an?|the|your|my)\ ([\w-]+\ ){0,4}passages?\b
    |(this|the\ following)\ passage\ (does|would|provides|answers|discusses|is\ (not\ )?(ir)?relevant)\b
    |es\ tut\ mir\ (sehr\ )?leid,\ aber\ ich|leider\ kann\ ich\ (\w+\ ){0,4}(nicht|keine)
    |(je\ suis\ )?désolée?,\ (mais\ )?je|lo\ siento,\ (pero\ )?no
    |mi\ dispiace,\ (ma\ )?non|(me\ )?desculpe,\ (mas\ )?não
    |(很|非常)?(抱歉|对不起|對不起)[，,]|作为(一个|一名)?(ai|人工智能|语言模型)|申し訳(ありません|ございません)|죄송(합니다|하지만)
    )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


class Checks:
    """All checks on the passages of a list.

    Args:
        instructions: what the model was told, which no passage may repeat.
        examples: the prompt's example lists, likewise.

    Raises: GradretError when the settings ask for a language that can not be recognised, or py3langid is missing.
    """

    def __init__(self, settings: GenSettings, instructions: str, examples: Sequence[RankingList] = ()):
        self._settings = settings
        self._instructions = _shingles(split_words(instructions), ECHO_WORDS)
        self._examples = [split_words(passage.text) for example in examples for passage in example.passages]
        self._identifier = _load_identifier(settings.language) if settings.language else None

    def check(self, query: str, texts: Sequence[str]) -> None:
        """Refuse a list of which one passage, cleaned by replies.parse_reply, is no good.

        Raises: Unusable with the reason, and in its detail the passage, counted from 1.
        """
        words = [split_words(text) for text in texts]
        query_words = split_words(query)
        for number, (text, own) in enumerate(zip(texts, words, strict=True), 1):
            self._check_passage(f"passage {number}", text, own, query_words)
        for second, other in enumerate(words):
            for first, own in enumerate(words[:second]):
                if share := _near_duplicate(own, other):
                    raise Unusable(
                        "duplicate", f"passages {first + 1} and {second + 1} share {share:.0%} of their text"
                    )

    def _check_passage(self, where: str, text: str, words: list[str], query: list[str]) -> None:
        low, high = self._settings.min_chars, self._settings.max_chars
        if not low <= len(text) <= high:
            raise Unusable("length", f"{where} has {len(text)} characters, expected {low} to {high}")
        if not words:
            raise Unusable("no text", f"{where} has no words")
        shingles = len(words) - SHINGLE + 1
        if shingles >= MIN_SHINGLES and len(_shingles(words, SHINGLE)) < LEAST_DISTINCT * shingles:
            raise Unusable("repetition", f"{where} says the same words again and again")
        if REFUSAL.match(text.replace("’", "'")):
            raise Unusable("refusal", f"{where} opens with '{text[:50]}'")
        if key := FORM_KEY.search(text):
            raise Unusable("prompt echo", f"{where} holds '{key[0]}'")
        if echo := _shingles(words, ECHO_WORDS) & self._instructions:
            raise Unusable("prompt echo", f"{where} repeats the instructions: '{' '.join(min(echo))}'")
        if any(_near_duplicate(words, example) for example in self._examples):
            raise Unusable("prompt echo", f"{where} repeats an example")
        weight = _weigh(query)
        opens = weight >= OPENING_WORDS and words[: len(query)] == query
        if opens or (_contains(words, query) and (weight >= COPIED_WORDS or 2 * len(query) >= len(words))):
            raise Unusable("query copied", f"{where} holds the whole query")
        if self._identifier:
            shares = dict(self._identifier.rank(text))
            if shares[self._settings.language] < LANGUAGE_SHARE:
                found = max(shares, key=shares.get)
                raise Unusable("language", f"{where} is in '{found}', expected '{self._settings.language}'")


def split_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; in scripts without spaces, its characters."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _weigh(words: list[str]) -> float:
    return sum(0.5 if UNSPACED_WORD.fullmatch(word) else 1 for word in words)


def _shingles(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _contains(words: list[str], part: list[str]) -> bool:
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(words)} "


def _near_duplicate(one: list[str], other: list[str]) -> float:
    """The share of the shorter text's shingles that both have, if it makes them near-duplicates; otherwise 0."""
    if one == other:
        return 1.0
    shingles = _shingles(one, SHINGLE), _shingles(other, SHINGLE)
    shorter = min(map(len, shingles))
    if shorter < MIN_SHINGLES:
        return 0.0
    share = len(shingles[0] & shingles[1]) / shorter
    return share if share >= NEAR_DUPLICATE else 0.0


def _load_identifier(language: str):
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise GradretError(
            "a language is checked with py3langid, which is not installed: pip install 'gradret[gen]'"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    codes = sorted(label for label in identifier.labels if len(label) == 2)
    if language not in codes:
        raise GradretError(f"language '{language}' can not be checked; expected one of {', '.join(codes)}")
    return identifier
