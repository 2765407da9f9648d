"""From a reply to briefs or a passage: the form asked for, the parsing, and what no list should hold, by rules."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache

from gradret.console import GradretError, needing
from gradret.data.lists import (
    MIN_SHINGLES,
    NEAR_DUPLICATE,
    SHINGLE,
    UNSPACED,
    UNSPACED_RUN,
    make_shingles,
    quote,
    split_words,
    weigh_words,
)
from gradret.generate.engine import Form
from gradret.settings import GenSettings

MAX_REPEAT = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD: above it {m,n} fails, or quietly loses its n
# U+FFFD is among them: bytes that are no character are read as several of it, where the grammar counted one.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]+")
# What texts cannot hold, of ASCII only: to the first byte of a longer character llama.cpp refuses all that begin with
# it if one of them is excluded, and models write rare characters byte by byte.
EXCLUDED = r'"\\\x00-\x1F\x7F'
THOUGHTS = re.compile(r".*?</think>|\s*<think>.*\Z", re.DOTALL)  # which the prompt may have opened
OBJECT_START = re.compile(r'\{\s*["}]')
# Not after an initial, nor after Dr. and its like, except where the text ends.
SENTENCE_END = re.compile(
    r"""(?<!\b[^\W\d_])(?<!\b[A-Z][a-z])(?<!\bMrs)[.!?]["”’')\]]*(?=\s)|[.!?]["”’')\]]*$|[。！？।۔؟។]["”’」』]?"""
)
# An object as its pairs: a key twice shows, arrays stay lists. Line breaks within a string are mended by clean_text.
DECODER = json.JSONDecoder(object_pairs_hook=tuple, strict=False)


class Unusable(Exception):
    """A brief or passage that is no good. `reason` is two or three words to count by; `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def make_form(bounds: Mapping[str, tuple[int, int]]) -> Form:
    """The form of a JSON object of exactly these keys in this order, as json.dumps writes it.

    The grammar keeps to the bounds, the fewest and the most characters of each key's string. It leaves no freedom of
    space, in which a model could stay for ever, and ends with the brace. The schema, for endpoints, has only what all
    of them take; no lengths.
    """
    members = ' ", " '.join(
        f'{json.dumps(json.dumps(key) + ": ")} "\\"" first char{_repeat(low - 1, high - 1)} "\\""'
        for key, (low, high) in bounds.items()
    )
    grammar = "\n".join(
        (
            f'root ::= "{{" {members} "}}"',
            f"first ::= [^ {EXCLUDED}] | escape",
            f"char ::= [^{EXCLUDED}] | escape",
            'escape ::= "\\\\" ["\\\\]',
            "",
        )
    )
    schema = {
        "type": "object",
        "properties": {key: {"type": "string"} for key in bounds},
        "required": list(bounds),
        "additionalProperties": False,
    }
    return Form(grammar, schema)


def make_text_form(low: int, high: int) -> Form:
    """The form of plain prose of so many characters: no line break and no markup. There is no schema for it."""
    grammar = f"""\
root ::= first char{_repeat(low - 1, max(low, high) - 1)}
first ::= [^ "'{{}}\\[\\]*#`\\-\\x00-\\x1F\\x7F]
char ::= [^*`\\x00-\\x1F\\x7F]
"""
    return Form(grammar, None)


def _repeat(low: int, high: int) -> str:
    return f"{{{low},{high}}}" if high < MAX_REPEAT else "*"


def clean_text(text: str) -> str:
    """The text as one printable paragraph: runs of white space and of what cannot be shown become one space."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())


def drop_thoughts(text: str) -> str:
    """The text without <think>...</think> at its start. Raises: Unusable when nothing else is there."""
    text = THOUGHTS.sub("", text, count=1) if THOUGHTS.match(text) else text
    if not text.strip():
        raise Unusable("empty reply", "nothing was written")
    return text


def parse_object(text: str, keys: Sequence[str]) -> dict[str, str]:
    """The cleaned strings of a reply, in the order of `keys`.

    Thoughts at the start, fences and words around the one JSON object are passed over, and so are keys that nobody
    asked for.

    Raises: Unusable.
    """
    text = drop_thoughts(text)
    found, cut = _find_objects(text)
    answers = [pairs for pairs in found if any(key in keys for key, _ in pairs)]
    if len(answers) > 1:
        raise Unusable("not JSON", f"{len(answers)} objects with the keys asked for, expected 1")
    if not answers and cut:
        raise Unusable("cut off", f"the JSON object does not end: ...{quote_reply(text[-40:])}")
    if not found:
        raise Unusable("not JSON", f"no JSON object in {quote_reply(text)}")
    pairs = answers[0] if answers else found[0]
    names = [key for key, _ in pairs]
    for key in keys:
        if names.count(key) != 1:
            raise Unusable("wrong keys", f"{key} is there {names.count(key)} times, expected once")
    values = dict(pairs)
    for key in keys:
        if not isinstance(values[key], str):
            raise Unusable("no text", f"{key} is not a string")
    strings = {key: clean_text(values[key]) for key in keys}
    for key, string in strings.items():
        if not string:
            raise Unusable("no text", f"{key} is empty")
    return strings


def _find_objects(text: str) -> tuple[list[tuple], bool]:
    """The outermost JSON objects in a text, each as its pairs, and whether one began that does not end."""
    found, cut, position = [], False, 0
    while start := OBJECT_START.search(text, position):
        try:
            pairs, position = DECODER.raw_decode(text, start.start())
            found.append(pairs)
        except json.JSONDecodeError as error:
            cut = cut or error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
            position = start.end()
        except ValueError:  # a number of thousands of digits
            position = start.end()
        except RecursionError:  # thousands of brackets, each a start to try: no answer lies in there
            break
    return found, cut


def quote_reply(text: str) -> str:
    """What a model wrote, as messages show it: on one line, in quotation marks, cut off."""
    return quote(clean_text(text))


ECHO_WORDS = 8  # in a row, as in the instructions; real passages have at most 4 in common with them
# No real passage holds its whole query, of 3 words or more; but a shorter one, or a name, may come up by itself: only
# one of COPIED_WORDS is a copy wherever it stands, one of OPENING_WORDS if the passage opens with it.
COPIED_WORDS, OPENING_WORDS = 12, 6
LEAST_DISTINCT = 0.5  # share of a passage's shingles that are not there a second time; real passages have .95 at least
# Han, kana or Thai that another script's text runs into, as in "home装饰"; what is quoted or set apart may be meant.
GLUED = re.compile(
    f"(?<![\\s\"'“‘«(\\[、。，！？：；「『（《{UNSPACED}])[{UNSPACED}]+|[{UNSPACED}]+(?=[^\\W_{UNSPACED}])"
)
LANGUAGE_SHARE = 0.01  # least probability of the language asked for: kin, such as Danish to Norwegian, has more
# Where none was asked for, least probability that a passage is in the language of the list's best one: two sentences of
# kin have .001 at least, an English passage with French proverbs 1e-6, an English passage and a German one 1e-14.
SAME_LANGUAGE = 1e-8

MARKUP = re.compile(r"^\s*(#|[-*•] |\|)|\*\*|```|^Subject:", re.MULTILINE)  # which no prose has
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
    """All checks on a passage, which may not repeat the instructions, what the model was told.

    Raises: GradretError when the settings ask for a language that cannot be recognised, or py3langid is missing.
    """

    def __init__(self, settings: GenSettings, instructions: str):
        self._settings = settings
        self._instructions = make_shingles(split_words(instructions), ECHO_WORDS)
        _require_language(settings.language)

    def check(self, query: str, text: str, others: Sequence[str]) -> None:
        """Refuse a passage that is no good by itself, or beside those of the list that are, the best first.

        Raises: Unusable with the reason.
        """
        words = split_words(text)
        low, high = self._settings.min_chars, self._settings.max_chars
        if not low <= len(text) <= high:
            raise Unusable("length", f"{len(text)} characters, expected {low} to {high}")
        if not words:
            raise Unusable("no text", "there are no words")
        shingles = len(words) - SHINGLE + 1
        if shingles >= MIN_SHINGLES and len(make_shingles(words, SHINGLE)) < LEAST_DISTINCT * shingles:
            raise Unusable("repetition", "it says the same words again and again")
        if is_refusal(text):
            raise Unusable("refusal", f"it opens with '{text[:50]}'")
        if key := FORM_KEY.search(text):
            raise Unusable("prompt echo", f"it holds '{key[0]}'")
        if echo := make_shingles(words, ECHO_WORDS) & self._instructions:
            raise Unusable("prompt echo", f"it repeats the instructions: '{' '.join(min(echo))}'")
        if holds_query(words, split_words(query)):
            raise Unusable("query copied", "it holds the whole query")
        self._check_language(text, others)
        if foreign := find_foreign(text):
            raise Unusable("language", f"it slips into another script: '{foreign}'")
        for other in others:
            if share := _near_duplicate(split_words(other), words):
                raise Unusable("duplicate", f"it shares {share:.0%} of its text with another passage of the list")

    def _check_language(self, text: str, others: Sequence[str]) -> None:
        expected = self._settings.language
        if not (expected or others):
            return
        shares = _tell_languages(text)
        if expected:
            foreign = shares[expected] < LANGUAGE_SHARE
        else:
            best = _tell_languages(others[0])
            expected = max(best, key=best.__getitem__)
            foreign = sum(min(shares[code], best[code]) for code in best) < SAME_LANGUAGE
        if foreign:
            raise Unusable("language", f"it is in '{max(shares, key=shares.__getitem__)}', expected '{expected}'")


def is_refusal(text: str) -> bool:
    """Whether a text opens as refusals and talk about the task do."""
    return REFUSAL.match(text.replace("’", "'")) is not None


def find_foreign(text: str) -> str:
    """Words that a model let slip in from a script without spaces into a text in another; "" where there are none."""
    words = split_words(text)
    if 2 * weigh_words([word for word in words if UNSPACED_RUN.match(word)]) > weigh_words(words):
        return ""
    return found[0] if (found := GLUED.search(text)) else ""


def holds_query(words: list[str], query: list[str]) -> bool:
    """Whether a text copies the whole query: opens with it, or has it somewhere and it is long."""
    weight = weigh_words(query)
    opens = weight >= OPENING_WORDS and words[: len(query)] == query
    inside = weight > 0 and f" {' '.join(query)} " in f" {' '.join(words)} "
    return opens or (inside and (weight >= COPIED_WORDS or 2 * len(query) >= len(words)))


def _near_duplicate(one: list[str], other: list[str]) -> float:
    """The share of the shorter text's shingles that both have, if it makes them near-duplicates; otherwise 0."""
    if one == other:
        return 1.0
    shingles = make_shingles(one, SHINGLE), make_shingles(other, SHINGLE)
    shorter = min(map(len, shingles))
    if shorter < MIN_SHINGLES:
        return 0.0
    share = len(shingles[0] & shingles[1]) / shorter
    return share if share >= NEAR_DUPLICATE else 0.0


def _require_language(language: str | None) -> None:
    """Raises: GradretError where py3langid is missing, or does not know the language."""
    with needing("gen", "py3langid", "gen"):
        import py3langid  # noqa: F401
    if language is None:
        return
    codes = sorted(label for label in _load_identifier().labels if len(label) == 2)
    if language not in codes:
        raise GradretError(f"language '{language}' cannot be checked; expected one of {', '.join(codes)}")


@cache
def _load_identifier():  # takes a second
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _tell_languages(text: str) -> dict[str, float]:
    """The probability of each language, by its code."""
    return {code: float(share) for code, share in _load_identifier().rank(text)}
