"""What the passages of a list are about: a plan turns a query into a brief for each of its lower grades.

A small model that is told a query and a low grade answers the query all the same. So nobody tells it: the passage of a
lower grade is the best one about something else, and the plan says what.
"""

import random
from collections.abc import Iterable, Mapping, Sequence, Set

from gradret.data.words import UNSPACED_RUN, split_words
from gradret.generate.replies import SENTENCE_END, Unusable, holds_query, is_refusal

# How far a grade's passage lies from the query, the nearest first, and the briefs it is made from.
BRIEFS = {
    "answer": (),  # about the query itself
    "part": ("answer", "broader"),  # about a broader subject; one sentence, `answer`, answers the query
    # About the same thing, but another question. `same` is there so that `near` does not say the query once more.
    "near": ("same", "near"),
    "far": ("far",),  # about something else that shares a word
}
TOPIC_CHARS = (6, 70)  # of a brief that is a search query

# What a far brief is about. The model that writes it does not see the query: told both, it mixes them.
FIELDS = (
    *("cooking", "football", "gardening", "folk music", "tax law", "fashion", "railways", "banking", "painting"),
    *("astronomy", "sailing", "farming", "cinema", "bridge building", "chess", "mountaineering", "photography"),
    *("theatre", "pottery", "beekeeping", "aviation", "carpentry", "tourism", "ballet", "mining", "poetry", "cycling"),
    *("wine", "insurance", "toys", "fishing", "weather forecasting", "jewellery", "elections", "schools", "museums"),
    *("horse riding", "printing", "perfume", "furniture", "tea and coffee", "stamp collecting", "zoos", "lighthouses"),
    *("postal services", "dance", "city planning", "advertising", "knitting", "libraries"),
)

# Shares of content words above which a brief counts as the query in other words, or as another brief.
PARAPHRASE, REPEATED = 0.4, 0.5
STEM = 5  # characters: inflected forms of a word mostly share so many
SHORT = 3  # words of so many characters are no content, unless there are no others
# Longer words that say nothing of a query's subject, in English, the language of most collections.
EMPTY = set(
    "about also been best between could does from have help into list made make makes many more most much other should "
    "some than that their there these they this used uses using what when where whether which while will with would "
    "your".split()
)
# And those that many queries ask by: to share one of them alone is not to be about the same thing.
ASKING = set(
    "average cause caused causes cost costs diagnose difference effect effects role symptoms treatments".split()
)


def content_words(text: str, left_out: Set[str] = frozenset()) -> set[str]:
    """The stems of the words that a text is about; in scripts without spaces, its pairs of characters."""
    pairs = {run[i : i + 2] for run in UNSPACED_RUN.findall(text) for i in range(max(1, len(run) - 1))}
    words = [word for word in split_words(text) if word not in EMPTY and not UNSPACED_RUN.match(word)]
    words = [word for word in words if word not in left_out] or words
    return pairs | ({word[:STEM] for word in words if len(word) > SHORT} or {*words})


def draw_far(query: str, draw: random.Random) -> dict[str, str]:
    """What the model that writes a far brief is told: a field, and a word of the query."""
    words = [word for word in split_words(query) if len(word) > SHORT and word not in EMPTY]
    words = words or sorted(content_words(query)) or [query[:STEM]]
    return {"field": pick(FIELDS, draw), "word": pick(words, draw)}


def pick(choices: Sequence, draw: random.Random):
    """One of the choices. random() is the one method whose sequence Python promises to keep."""
    return choices[int(draw.random() * len(choices))]


def check_brief(
    query: str, name: str, text: str, others: Mapping[str, str], *, longest: int, shown: Iterable[str] = ()
) -> None:
    """Refuse a brief that its grade cannot be written from.

    Args:
        name: of BRIEFS' briefs, or any other.
        others: the good briefs of the same reply and of those before it.
        longest: characters that a brief can have; one of as many was cut off.
        shown: what the prompt's examples say.

    Raises: Unusable.
    """
    if len(text) >= longest:
        raise Unusable("bad plan", f"the brief '{name}' does not end")
    if not split_words(text) or is_refusal(text):
        raise Unusable("bad plan", f"the brief '{name}' is no brief: '{text[:50]}'")
    if name == "same":
        return
    wanted, found = content_words(query), content_words(text)
    if any(_repeats(found, example) for example in shown):
        raise Unusable("bad plan", f"the brief '{name}' repeats an example: '{text}'")
    if name == "answer":
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if not ends or ends[-1] < len(text):
            raise Unusable("bad plan", f"the answer is no sentence: '{text[:50]}'")
        if holds_query(split_words(text), split_words(query)):
            raise Unusable("bad plan", "the answer copies the query")
        return
    shared = len(wanted & found)
    if name == "far" and shared > max(1, len(wanted) // 3):
        raise Unusable("bad plan", f"the brief 'far' is near the query: '{text}'")
    # The subject may be a short word: "what is dna".
    subject, words = content_words(query, ASKING), found | {word[:STEM] for word in split_words(text)}
    if name in ("near", "broader") and subject and not subject & words:
        raise Unusable("bad plan", f"the brief '{name}' is far from the query: '{text}'")
    # Of three words two are the subject itself: "baking soda vs baking powder".
    same = shared == len(wanted) > 1 or shared > max(2, PARAPHRASE * len(wanted))
    if split_words(text) == split_words(query) or (name in ("near", "broader") and same):
        raise Unusable("bad plan", f"the brief '{name}' is the query in other words: '{text}'")
    for other, brief in others.items():
        if other != "answer" and _repeats(found, brief):
            raise Unusable("bad plan", f"the brief '{name}' repeats '{other}': '{text}'")


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
