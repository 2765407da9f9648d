import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradret.generate.plans import (
    ASPECTS,
    FIELDS,
    content_words,
    draw_far,
    draw_near,
    find_brief_fault,
    split_sentences,
    trim,
    weave,
)
from gradret.generate.prompts import PLANNED, PLANNED_NEAR

QUERY = "how do noise cancelling headphones work"
FOUR = ["One is first.", "Two comes after it.", "Three is more.", "Four ends it all."]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("answer", "They add a sound wave that is the mirror image of the noise.", None),
        ("answer", "by adding a wave", "is no sentence"),
        ("answer", "It rose to 5. and then the rest", "is no sentence"),
        ("far", "!!!", "is no brief"),
        ("far", "folk music offside}", "is no brief"),
        ("answer", "I'm sorry, but I can't answer that.", "is no brief"),
        ("answer", "How do noise cancelling headphones work? They add a wave.", "copies the query"),
        ("answer", "Long. " * 40, "does not end"),
        ("thing", "noise cancelling headphones", None),
        ("thing", "headphones", None),
        ("thing", "do noise cancelling headphones work", "is the whole query"),
        ("thing", "loudspeakers", "is no part of the query"),
        ("near", "insurance of headphones", None),
        ("near", "headphones", "is the query in other words"),
        ("near", "headphones that work in museums", "is the query in other words"),
        ("near", "when to plant tulips", "does not have the thing"),
        ("near", "noise in museums", "does not have the thing"),
        ("near", "headphones " * 8, "does not end"),
        ("near", "headphones广告", "slips into another script, '广告'"),
        ("broader", "how noise cancelling headphones are made to work", "is the query in other words"),
        ("broader", "history of noise cancelling", "is the query in other words"),
        ("broader", "headphones against noise", None),
        ("broader", "headphones", "is the query in other words"),
        ("broader", "headphones for music", None),
        ("broader", "sound in buildings", None),
        ("far", "street noise and house prices", None),
        ("far", "headphones against noise", "is near the query"),
        ("far", "history of all headphones", "repeats 'broader'"),
        ("grade_1", "How do noise-cancelling headphones work?", "is the query in other words"),
        ("grade_1", "how to choose noise cancelling headphones", None),  # what a grade means is the scale's affair
    ],
)
def test_a_brief_is_good_or_has_a_reason(name, text, complaint):
    others = {"answer": "They add a wave.", "broader": "the history of headphones", "thing": "headphones"}
    others.pop(name, None)
    longest = 220 if name == "answer" else 70
    assert find_brief_fault(QUERY, name, text, others, longest=longest) == complaint


@pytest.mark.parametrize(
    ("query", "thing", "complaint"),
    [
        ("dna", "DNA", None),
        ("convolutional neural networks", "neural networks", None),
        ("why cats purr", "why cats purr", "is the whole query"),
        ("hiking boots vs trail runners", "hiking boots vs trail runners", "is the whole query"),
        ("What is Von Hippel-Lindau Disease?", "Von Hippel-Lindau Disease", None),
        ("what psi for a car tyre", "psi for a car tyre", "is the whole query"),
        ("ビタミンは何に良い", "ビタミン", None),
        ("ビタミンは何に良い", "ビタミンは何に良い", "is the whole query"),
        ("量子力学", "量子力学", None),
        ("why is the sea salty", "sea", None),
        ("고양이는 왜 골골거리나요", "고양이", None),
        ("why do the cats purr", "the felines", "is no part of the query"),
        ("what's the capital of France", "Berlin's", "is no part of the query"),
        ("水为什么是蓝色的", "水", None),
    ],
)
def test_the_thing_is_less_than_the_query(query, thing, complaint):
    # An example may be about the same.
    assert find_brief_fault(query, "thing", thing, {}, longest=40, shown=[thing]) == complaint


@pytest.mark.parametrize(("query", "plan"), PLANNED)
def test_the_examples_are_good_plans(query, plan):
    found = {}
    for name, text in plan.items():
        assert find_brief_fault(query, name, text, found, longest=220) is None
        found[name] = text


@pytest.mark.parametrize(("asked", "query"), PLANNED_NEAR)
def test_the_examples_of_other_aspects_are_good(asked, query):
    assert asked["aspect"] in ASPECTS
    assert find_brief_fault(f"how {asked['thing']} works", "near", query, {"thing": asked["thing"]}, longest=70) is None


@pytest.mark.parametrize(
    ("thing", "near"),
    [
        ("dna", "DNA in films"),
        ("sun", "the sun in poems"),
        ("ビタミン", "ビタミンの広告"),
        ("css", "css in museums"),
        ("水", "水彩画"),
    ],
)
def test_a_thing_may_be_a_short_word(thing, near):
    assert find_brief_fault(f"{thing} work", "near", near, {"thing": thing}, longest=70) is None


def test_no_brief_repeats_an_example():
    shown = [PLANNED[0][1]["answer"], "street noise and house prices"]
    for name, text in zip(("answer", "far"), shown, strict=True):
        assert find_brief_fault("tulips", name, text, {}, longest=220, shown=shown) == "repeats an example"


def test_content_is_stems_without_what_says_nothing():
    assert content_words("What are the effects of Walking, and walks?") == {"effec", "walki", "walk"}
    assert content_words("is it up") == {"is", "it", "up"}
    assert content_words("猫はなぜ") == {"猫は", "はな", "なぜ"}


def test_a_near_brief_is_planned_from_the_thing():
    drawn = [draw_near("headphones", random.Random(i)) for i in range(200)]
    assert {d["thing"] for d in drawn} == {"headphones"} and {d["aspect"] for d in drawn} == {*ASPECTS}


def test_a_far_brief_is_planned_without_the_query():
    drawn = [draw_far(QUERY, "loudspeakers", random.Random(i)) for i in range(200)]
    assert {d["word"] for d in drawn} == {"noise", "cancelling", "headphones", "work"}
    assert len({d["field"] for d in drawn}) > 40 and {d["field"] for d in drawn} <= {*FIELDS}
    assert draw_far("猫はなぜ", "", random.Random(0))["word"] in ("猫は", "はな", "なぜ")
    assert draw_far("", "", random.Random(0))["word"] == ""


def test_a_far_brief_shares_no_word_of_the_thing_if_there_are_others():
    assert {draw_far(QUERY, "a headphone", random.Random(i))["word"] for i in range(99)} == {
        "noise",
        "cancelling",
        "work",
    }
    assert draw_far("headphones", "headphones", random.Random(0))["word"] == "headphones"


def test_a_sentence_is_woven_into_the_midst():
    assert weave(FOUR, "Here!", 1000) == "One is first. Two comes after it. Here! Three is more. Four ends it all."
    assert weave(FOUR[:1], "Here!", 1000) == "One is first. Here!"
    assert weave(FOUR, "Here!", 40) == "One is first. Two comes after it. Here!"  # it is never cut off


def test_a_passage_is_cut_where_a_sentence_ends():
    assert trim(FOUR, 30) == "One is first. Two comes after it."
    assert trim(FOUR, 1) == "One is first."


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three", ["One.", "Two!"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("Dr. J. Doe paid $2.50 (in 1999). Yes.", ["Dr. J. Doe paid $2.50 (in 1999).", "Yes."]),
        ("猫は寝る。犬も", ["猫は寝る。"]),
        ("It was he.", ["It was he."]),
        ("no end", []),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text())
def test_sentences_lose_nothing_but_the_end(text):
    joined = "".join("".join(split_sentences(text)).split())
    assert "".join(text.split()).startswith(joined)
