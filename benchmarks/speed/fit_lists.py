"""The lists that the training benchmark's two sides train on: made ones of mixed length, or the user's, checked."""

import random
from collections.abc import Sequence

from gradret.console import GradretError, count_of
from gradret.data.lists import Passage, RankingList, read_lists
from gradret.data.sources import MixedLists, check_lists, find_path, parse_source
from gradret.settings import SAMPLE
from gradret.train.batches import draw_positions

WORDS = (12, 200)  # of a made passage
QUERY_WORDS = (4, 12)
GRADES = (3.0, 2.0, 1.0, 0.0)


def make_lists(count: int, seed: int = 0, passage_words: tuple[int, int] = WORDS) -> list[RankingList]:
    """Ranking lists of one passage a grade, pieces of the sample's running text.

    Their word counts are log-uniform in `passage_words`, a query's in QUERY_WORDS. No two passages are
    the same, and the same arguments give the same lists.
    """
    words = [w for entry in read_lists(find_path(SAMPLE)) for p in entry.passages for w in p.text.split()]
    draw = random.Random(seed).random

    def cut(shortest: int, longest: int) -> str:
        length = round(shortest * (longest / shortest) ** draw())
        start = int(draw() * (len(words) - length))
        return " ".join(words[start : start + length])

    lists, seen = [], set()
    for number in range(count):
        passages = []
        for grade in GRADES:
            text = cut(*passage_words)
            while text in seen:
                text = cut(*passage_words)
            seen.add(text)
            passages.append(Passage(grade, text))
        lists.append(RankingList(f"made-{number}", cut(*QUERY_WORDS), passages))
    return lists


def choose_lists(data: Sequence[str], count: int, seed: int = 0) -> list[RankingList]:
    """`count` lists that both sides' losses can be computed on: made ones, or drawn from sources, all where fewer.

    Raises: GradretError when lists differ in their number of passages, or one's highest grade is not one passage's.
    """
    if not data:
        return make_lists(count, seed)
    mixed = MixedLists([parse_source(source) for source in data], seed=seed)
    kept = check_lists(mixed, refuse_negative=True).kept.tolist()
    if len(kept) > count:
        kept = sorted(random.Random(seed).sample(kept, count))
    lists = [mixed[i] for i in kept]
    length = len(lists[0].passages)
    for entry in lists:
        grades = [passage.grade for passage in entry.passages]
        best = grades.count(max(grades))
        if len(grades) != length or length < 2 or best > 1:
            raise GradretError(
                f"{entry.where}: list '{entry.query_id}' has {count_of(len(grades), 'passage')}, "
                f"{best} of its highest grade; "
                f"expected {max(2, length)} with one of the highest, as sentence-transformers' loss takes one positive "
                "and the same number of negatives for each query: choose with SOURCE?grades=..., or leave --data out"
            )
    return [
        RankingList(str(number), entry.query, [Passage(p.grade, p.content) for p in entry.passages])
        for number, entry in enumerate(lists)
    ]


def draw_fit_batches(lists: Sequence[RankingList], count: int, size: int, seed: int) -> list[list[RankingList]]:
    """The lists of the first `count` batches of `size` that `fit` draws.

    Raises: GradretError when there are fewer lists than that, or a passage comes twice in a batch: gradret counts it
        once, the trainer twice.
    """
    if len(lists) < size:
        raise GradretError(f"{len(lists)} lists are too few for a batch of {size}; give more, or fewer to a batch")
    batches = [
        [lists[i] for i in draw_positions(step, count=len(lists), size=size, seed=seed)] for step in range(count)
    ]
    for batch in batches:
        texts = passage_texts(batch)
        if len(set(texts)) < len(texts):
            twice = next(text for i, text in enumerate(texts) if text in texts[:i])
            raise GradretError(
                f"passage '{twice[:60]}' stands twice in a batch of {size} lists, which gradret counts once and "
                f"sentence-transformers' loss twice; give more lists (there are {len(lists)}), fewer to a batch, or "
                "leave --data out"
            )
    return batches


def passage_texts(lists: Sequence[RankingList]) -> list[str]:
    """All passages, list after list."""
    return [passage.content for entry in lists for passage in entry.passages]
