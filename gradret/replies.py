"""Replies of a language model: the form they must have, and the passages in them."""

import json
import re
from collections.abc import Sequence

from gradret.llm import Form

# Why an answer yields no list; what the counts of a summary go by.
REASONS = (
    "empty reply",
    "cut off",
    "not JSON",
    "wrong keys",
    "no text",
    "length",
    "repetition",
    "duplicate",
    "refusal",
    "prompt echo",
    "query copied",
    "language",
)
MAX_REPEAT = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD: above it {m,n} fails or quietly loses its n
# U+FFFD is among them: bytes that are no character are read as several of it, where the grammar counted one.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]+")
# What texts can not hold, of ASCII only: to the first byte of a longer character llama.cpp refuses all that begin with
# it if one of them is excluded, and models write rare characters byte by byte.
EXCLUDED = r'"\\\x00-\x1F\x7F'
THOUGHTS = re.compile(r".*?</think>|\s*<think>.*\Z", re.DOTALL)  # which the prompt may have opened
OBJECT_START = re.compile(r'\{\s*["}]')
# An object as its pairs: a key twice shows, arrays stay lists. Line breaks within a string are mended by clean_text.
DECODER = json.JSONDecoder(object_pairs_hook=tuple, strict=False)


class Unusable(Exception):
    """A reply that gives no list. `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def make_form(keys: Sequence[str], min_chars: int, max_chars: int) -> Form:
    """The form of a reply: a JSON object of exactly these keys in this order, as json.dumps writes it.

    The grammar bounds the characters of each text; it leaves no freedom of space, in which a model could stay for
    ever, and ends with the brace. The schema, for endpoints, has only what all of them take; no lengths.
    """
    members = ' ", " '.join(f"{json.dumps(json.dumps(key) + ': ')} text" for key in keys)
    rest = _repeat("char", min_chars - 1, max_chars - 1)
    grammar = "\n".join(
        (
            f'root ::= "{{" {members} "}}"',
            f'text ::= "\\"" first {rest[0]} "\\""',
            f"first ::= [^ {EXCLUDED}] | escape",
            f"char ::= [^{EXCLUDED}] | escape",
            'escape ::= "\\\\" ["\\\\]',
            *rest[1:],
            "",
        )
    )
    schema = {
        "type": "object",
        "properties": {key: {"type": "string"} for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }
    return Form(grammar, schema)


def _repeat(name: str, low: int, high: int) -> list[str]:
    """What stands for low to high times the rule `name`, then the rules it needs; no repetition above MAX_REPEAT."""
    if high <= MAX_REPEAT:
        return [f"{name}{{{low},{high}}}" if high else '""']
    blocks, low_rest = divmod(low, MAX_REPEAT)
    more, more_rest = divmod(high - low, MAX_REPEAT)
    rules = [f"block ::= {name}{{{MAX_REPEAT}}}", f"more0 ::= {name}{{0,{more_rest}}}" if more_rest else 'more0 ::= ""']
    # After a full block another may begin, or the text ends within one: two readings at a time, never more.
    rules += [f"more{i} ::= block more{i - 1} | {name}{{0,{MAX_REPEAT - 1}}}" for i in range(1, more + 1)]
    used = ["block"] * blocks + ([f"{name}{{{low_rest}}}"] if low_rest else []) + [f"more{more}"]
    return [" ".join(used), *rules]


def clean_text(text: str) -> str:
    """The text as one printable paragraph: runs of white space and of what can not be shown become one space."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())


def parse_reply(text: str, keys: Sequence[str]) -> dict[str, str]:
    """The cleaned passages of a reply, in the order of `keys`.

    Thoughts (<think>...</think>) at the start, fences and words around the one JSON object are passed over, and so
    are keys that nobody asked for.

    Raises: Unusable.
    """
    text = THOUGHTS.sub("", text, count=1) if THOUGHTS.match(text) else text
    if not text.strip():
        raise Unusable("empty reply", "nothing was written")
    found, cut = _find_objects(text)
    answers = [pairs for pairs in found if any(key in keys for key, _ in pairs)]
    if len(answers) > 1:
        raise Unusable("not JSON", f"{len(answers)} objects with the keys asked for, expected 1")
    if not answers and cut:
        raise Unusable("cut off", f"the JSON object does not end: ...{_quote(text[-40:])}")
    if not found:
        raise Unusable("not JSON", f"no JSON object in {_quote(text.strip())}")
    pairs = answers[0] if answers else found[0]
    names = [key for key, _ in pairs]
    for key in keys:
        if names.count(key) != 1:
            raise Unusable("wrong keys", f"{key} is there {names.count(key)} times, expected once")
    values = dict(pairs)
    for key in keys:
        if not isinstance(values[key], str):
            raise Unusable("no text", f"{key} is not a string")
    passages = {key: clean_text(values[key]) for key in keys}
    for key, passage in passages.items():
        if not passage:
            raise Unusable("no text", f"{key} is empty")
    return passages


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


def _quote(text: str) -> str:
    shown = clean_text(text)
    return f"'{shown}'" if len(shown) <= 60 else f"'{shown[:57]}...'"
