import math

import numpy as np
import pytest

from gradret.data.lists import Passage, RankingList
from gradret.evaluation.order import LEAST_SHARE, PairOrder, Repeat, measure_order


def embed_numbers(texts, kind):
    """A passage's similarity is the number in front of it; a query is as far from every passage as that says."""
    return np.array([[1.0 if kind == "query" else float(text.split()[0])] for text in texts])


def make_list(query_id, *passages, query="a query", judged=()):
    made = [Passage(grade, text) for grade, text in passages]
    for passage, grade in zip(made, judged, strict=False):
        passage.extra["judged"] = grade
    return RankingList(query_id, query, made)


BY_HAND = [
    # In order: 3>2 and 3>0; 2>0 is the wrong way round.
    make_list("a", (3, ".9 one two"), (2, ".1 one"), (0, ".5 one two three"), judged=(2.5, 2.5, 0.1)),
    # A tie is not in order, and equal grades are no pair.
    make_list("b", (2, ".4 x"), (0, ".4 y"), (0, ".3 z")),
]


def test_by_hand():
    order = measure_order(BY_HAND, embed_numbers)
    assert order.encoder.kinds == {(3, 2): (1, 1), (3, 0): (1, 1), (2, 0): (1, 3)}
    assert list(order.encoder.kinds) == [(3, 2), (3, 0), (2, 0)]
    assert (order.encoder.pairs, order.encoder.share) == (5, 3 / 5)
    assert order.judge.kinds == {(3, 2): (0, 1), (3, 0): (1, 1), (2, 0): (1, 1)}
    assert (order.lists, order.passages, order.complete) == (2, 6, 1)
    assert list(order.grades) == [3, 2, 0]
    zero = order.grades[0]
    assert (zero.lists, zero.passages, zero.characters) == (2, 3, pytest.approx((16 + 4 + 4) / 3))
    assert zero.words == pytest.approx((4 + 2 + 2) / 3)
    assert zero.similarity == pytest.approx((0.5 + 0.4 + 0.3) / 3)
    assert (zero.judged, order.grades[2].judged) == (0.1, 2.5)
    assert [scores.tolist() for scores in order.similarities] == [
        pytest.approx([0.9, 0.1, 0.5]),
        pytest.approx([0.4, 0.4, 0.3]),
    ]
    assert (order.repeats, order.repeating) == ([], 0)


def test_the_warning():
    assert PairOrder({(1, 0): (7, 10)}).warn() == PairOrder({}).warn() == ""
    assert PairOrder({(1, 0): (699, 1000)}).warn() == (
        "the grades of these lists do not follow the order of the encoder: 0.699 of the pairs are in order, "
        f"expected {LEAST_SHARE:g} at least"
    )


def test_lists_are_read_once_and_in_blocks():
    many = [make_list(f"q{i}", (1, f".{i} up"), (0, f".{i - 1} down")) for i in range(11, 91)]
    order = measure_order(iter(many), embed_numbers, total=80)
    assert (order.lists, order.encoder.kinds) == (80, {(1, 0): (80, 80)})


def test_lists_without_pairs_queries_without_text_and_judgments_that_are_none():
    lists = [
        make_list("same", (1, ".5 a"), (1, ".4 b"), judged=(True, "high")),
        make_list("blank", (1, ".5 c"), (0, ".4 d"), query=" "),
        make_list("none"),
    ]
    order = measure_order(lists, embed_numbers)
    assert (order.encoder.share, order.judge.share, order.encoder.pairs) == (None, None, 0)
    assert order.grades[1].similarity == pytest.approx(0.45)
    assert (order.grades[0].similarity, order.grades[1].judged) == (None, None)
    assert np.isnan(order.similarities[1]).all() and len(order.similarities[2]) == 0


def test_no_lists():
    order = measure_order([], embed_numbers)
    assert (order.lists, order.grades, order.encoder.share, order.repeats) == (0, {}, None, [])


def test_the_same_words_have_the_same_similarity(tiny_encoder):
    """Whatever stands beside them in a batch."""
    short, long = "the moon pulls the sea", "bread needs yeast " * 9
    order = measure_order([make_list("a", (3, short), (2, long), (1, short), (0, long))], str(tiny_encoder))
    assert order.encoder.kinds[3, 1] == order.encoder.kinds[2, 0] == (0, 1)


def test_many_grades_are_rounded_for_the_table_alone():
    lists = [make_list("q", *((i / 4, f".{i:02} text") for i in range(12)))]
    order = measure_order(lists, embed_numbers)
    assert list(order.grades) == [3, 2, 1, 0]
    assert order.encoder.pairs == math.comb(12, 2) and order.encoder.share == 1
    assert order.encoder.kinds[3, 3] == (1, 1)  # 2.5 and 2.75


WORDS = "the old mill by the river ground corn for three villages until a flood took its wheel away".split()


def repeats_of(*texts):
    order = measure_order([make_list(f"q{i}", (i, f"1 {text}")) for i, text in enumerate(texts)], embed_numbers)
    return order.repeats, order.repeating


def test_repeated_passages():
    text, changed = " ".join(WORDS), " ".join([*WORDS[:-2], "clean", "off"])
    assert repeats_of(text, f"{text.upper()}!") == ([Repeat(("q0", 0), ("q1", 1), 1.0)], 2)
    (near,), count = repeats_of(text, "something else " * 5, changed)
    assert ((near.one, near.other), count) == ((("q0", 0), ("q2", 2)), 2)
    assert near.share == pytest.approx(15 / 17)  # 19 words with the number in front
    assert repeats_of(text, " ".join(reversed(WORDS))) == ([], 0)
    assert repeats_of("yes", "no", "yes")[0] == [Repeat(("q0", 0), ("q2", 2), 1.0)]
    assert repeats_of("the old mill", "the old mill by") == ([], 0)  # too short for anything but chance
    found, count = repeats_of(text, text, text)
    assert (len(found), count) == (2, 3)


def test_passages_of_one_list_do_not_count_as_repeated():
    text = "1 " + " ".join(WORDS)
    order = measure_order([make_list("a", (1, text), (0, text)), make_list("b", (1, "1"), (0, "2"))], embed_numbers)
    assert order.repeats == []
    empty = [make_list(name, (1, ""), (0, "...")) for name in "ab"]
    order = measure_order(empty, lambda texts, kind: np.ones((len(texts), 2)))
    assert order.repeats == []
