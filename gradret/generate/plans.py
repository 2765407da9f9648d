"""What the passages of a list are about: a plan turns a query into a brief for each of its lower grades.

A small model that is told a query and a low grade answers the query all the same. So nobody tells it: the passage of a
lower grade is the best one about something else, and the plan says what.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence

from gradret.data.lists import UNSPACED_RUN, split_words, weigh_words
from gradret.generate.replies import SENTENCE_END, find_foreign, holds_query, is_refusal

# How far a grade's passage lies from the query, the nearest first, and the briefs it is made from.
BRIEFS = {
    "answer": (),  # about the query itself
    "part": ("thing", "answer", "broader"),  # about a broader subject; one sentence, `answer`, answers the query
    "near": ("thing", "near"),  # about another aspect of the same thing
    "far": ("far",),  # about something else that shares a word
}
DRAWN = ("near", "far")  # briefs with a request of their own, for which an aspect or a field is drawn
AROUND = {"broader": 1, "near": 0}  # briefs that say more of the thing, and how many of the query's other words at most
TOPIC_CHARS = (6, 70)  # of a brief that is a search query
THING_CHARS = (1, 60)  # names of diseases have over 40

# What near and far briefs are about. The model that writes them does not see the query: told it, a small one says the
# query once more in other words, or mixes the two.
ASPECTS = (
    *("art and literature", "films and television", "museums and collections", "photography", "advertising"),
    *("laws and regulations", "patents", "insurance", "fraud and fakes", "trade fairs", "jobs and training"),
    *("school lessons", "children's books", "old beliefs", "famous people", "names and languages"),
    *("clubs and societies", "newspaper reports", "waste and recycling", "research funding"),
)
FIELDS = (
    *("cooking", "football", "gardening", "folk music", "tax law", "fashion", "railways", "banking", "painting"),
    *("astronomy", "sailing", "farming", "cinema", "bridge building", "chess", "mountaineering", "photography"),
    *("theatre", "pottery", "beekeeping", "aviation", "carpentry", "tourism", "ballet", "mining", "poetry", "cycling"),
    *("wine", "insurance", "toys", "fishing", "weather forecasting", "jewellery", "elections", "schools", "museums"),
    *("horse riding", "printing", "perfume", "furniture", "tea and coffee", "stamp collecting", "zoos", "lighthouses"),
    *("postal services", "dance", "city planning", "advertising", "knitting", "libraries"),
)

JSON_MARKS = re.compile(r"[{}\[\]]")  # of a reply that went wrong; answers may hold code
REPEATED = 0.5  # share of content words above which a brief counts as another
THING = 2, 2 / 3  # words that it can have, or of the query's words this share
STEM = 5  # characters
SHORT = 3  # words of so many characters are no content, unless there are no others
# Longer words that say nothing of a query's subject, in English, the language of most collections.
EMPTY = set(
    "about also been best between could does from have help into list made make makes many more most much other should "
    "some than that their there these they this used uses using what when where whether which while will with would "
    "your".split()
)


def content_words(text: str) -> set[str]:
    """The stems of the words that a text is about; in scripts without spaces, its pairs of characters."""
    pairs = {run[i : i + 2] for run in UNSPACED_RUN.findall(text) for i in range(max(1, len(run) - 1))}
    words = [word for word in split_words(text) if word not in EMPTY and not UNSPACED_RUN.match(word)]
    return pairs | ({stem(word) for word in words if len(word) > SHORT} or {*map(stem, words)})


def stem(word: str) -> str:
    """What inflected forms of a word mostly share: its beginning, without the s of a plural."""
    start = word[:STEM]
    return start[:-1] if start.endswith("s") and len(start) > SHORT else start


def have_common(stems: Iterable[str], others: Iterable[str]) -> bool:
    """Whether a stem and another begin alike: they are one, or the shorter one is at least half of the longer."""
    pairs = (sorted((one, other), key=len) for one in stems for other in {*others})
    return any(longer.startswith(shorter) and 2 * len(shorter) >= len(longer) for shorter, longer in pairs)


def draw_far(query: str, thing: str, draw: random.Random) -> dict[str, str]:
    """What the model that writes a far brief is told: a field, and a word of the query, at best not of its thing."""
    words = [word for word in split_words(query) if len(word) > SHORT and word not in EMPTY]
    words = words or sorted(content_words(query)) or [query[:STEM]]
    left_out = content_words(thing)
    return {"field": pick(FIELDS, draw), "word": pick([w for w in words if stem(w) not in left_out] or words, draw)}


def draw_near(thing: str, draw: random.Random) -> dict[str, str]:
    """What the model that writes a near brief is told: what the query is about, and an aspect of it."""
    return {"thing": thing, "aspect": pick(ASPECTS, draw)}


def pick(choices: Sequence, draw: random.Random):
    """One of the choices. random() is the one method whose sequence Python promises to keep."""
    return choices[int(draw.random() * len(choices))]


def find_brief_fault(
    query: str, name: str, text: str, others: Mapping[str, str], *, longest: int, shown: Iterable[str] = ()
) -> str | None:
    """Why a grade cannot be written from a brief, as what a sentence says of it; None if it can.

    Args:
        name: of BRIEFS' briefs, or any other.
        others: the good briefs of the same request, and the `thing`.
        longest: characters that a brief can have; one of as many was cut off.
        shown: what the prompt's examples say.
    """
    words, asked = split_words(text), split_words(query)
    if len(text) >= longest:
        return "does not end"
    if not words or is_refusal(text) or (name != "answer" and JSON_MARKS.search(text)):
        return "is no brief"
    if foreign := find_foreign(text):
        return f"slips into another script, '{foreign}'"
    wanted, found = content_words(query), content_words(text)
    if name == "thing":  # a query may be about a short word: "what is dna"
        if weigh_words(words) > max(THING[0], THING[1] * weigh_words(asked)):
            return "is the whole query"
        return None if have_common(found, wanted | {*map(stem, asked)}) else "is no part of the query"
    if any(_repeats(found, example) for example in shown):
        return "repeats an example"
    if name == "answer":
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if ends[-1:] != [len(text)]:
            return "is no sentence"
        return "copies the query" if holds_query(words, asked) else None
    thing = content_words(others.get("thing", ""))
    if name == "far" and len(wanted & found) > max(1, len(wanted) // 3):
        return "is near the query"
    if name == "near" and not have_common(thing, found | {*map(stem, words)}):
        return "does not have the thing"
    if words == asked or (name in AROUND and (found <= thing or len(wanted & found - thing) > AROUND[name])):
        return "is the query in other words"
    others = {other: brief for other, brief in others.items() if other not in ("answer", "thing")}
    return next((f"repeats '{other}'" for other, brief in others.items() if _repeats(found, brief)), None)


def _repeats(found: set[str], brief: str) -> bool:
    words = content_words(brief)
    return len(words & found) > REPEATED * len(words | found)


def weave(sentences: Sequence[str], sentence: str, target: int) -> str:
    """A passage of the sentences, with one more in its midst, cut to about `target` characters."""
    middle = max(1, len(sentences) // 2)
    return trim([*sentences[:middle], sentence, *sentences[middle:]], target, least=middle + 1)


def trim(sentences: Sequence[str], target: int, least: int = 1) -> str:
    """The first sentences, at least so many, whose length together is nearest to `target` characters."""
    texts = [" ".join(sentences[:count]) for count in range(least, len(sentences) + 1)]
    return min(texts, key=lambda text: abs(len(text) - target))


def split_sentences(text: str) -> list[str]:
    """The whole sentences of a text; what follows the last one is left out."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]
