import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradret.generate.plans import FIELDS, check_brief, content_words, draw_far, split_sentences, trim, weave
from gradret.generate.prompts import PLANNED
from gradret.generate.replies import Unusable

QUERY = "how do noise cancelling headphones work"
FOUR = ["One is first.", "Two comes after it.", "Three is more.", "Four ends it all."]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("answer", "They add a sound wave that is the mirror image of the noise.", None),
        ("answer", "by adding a wave", "is no sentence"),
        ("answer", "It rose to 5. and then the rest", "is no sentence"),
        ("far", "!!!", "is no brief"),
        ("answer", "I'm sorry, but I can't answer that.", "is no brief"),
        ("answer", "How do noise cancelling headphones work? They add a wave.", "copies the query"),
        ("answer", "Long. " * 40, "does not end"),
        ("same", "how headphones against noise cancelling work", None),
        ("near", "how to repair headphones", None),
        ("near", "how noise cancelling headphones are made to work", "is the query in other words"),
        ("near", "history of noise cancelling", None),
        ("near", "noise cancelling headphones for children", "is the query in other words"),
        ("near", "when to plant tulips", "is far from the query"),
        ("near", "history of headphones", "repeats 'broader'"),
        ("near", "headphones " * 8, "does not end"),
        ("broader", "headphones for music", None),
        ("broader", "sound in buildings", "is far from the query"),
        ("far", "street noise and house prices", None),
        ("far", "headphones against noise", "is near the query"),
        ("far", "history of all headphones", "repeats 'broader'"),
        ("grade_1", "How do noise-cancelling headphones work?", "is the query in other words"),
        ("grade_1", "how to choose noise cancelling headphones", None),  # what a grade means is the scale's affair
    ],
)
def test_a_brief_is_good_or_has_a_reason(name, text, complaint):
    others = {} if name == "broader" else {"answer": "They add a wave.", "broader": "the history of headphones"}
    longest = 220 if name == "answer" else 70
    if complaint is None:
        check_brief(QUERY, name, text, others, longest=longest)
        return
    with pytest.raises(Unusable, match=complaint) as problem:
        check_brief(QUERY, name, text, others, longest=longest)
    assert problem.value.reason == "bad plan"


def test_to_ask_alike_is_not_to_be_near():
    with pytest.raises(Unusable, match="is far from the query"):
        check_brief("causes of ringing in the ears", "near", "causes of headache", {}, longest=70)
    check_brief("causes of ringing in the ears", "near", "how ears are pierced", {}, longest=70)


@pytest.mark.parametrize(("query", "plan"), PLANNED)
def test_the_examples_are_good_plans(query, plan):
    found = {}
    for name, text in plan.items():
        check_brief(query, name, text, found, longest=220)
        found[name] = text


@pytest.mark.parametrize(
    ("query", "near"),
    [
        ("what is dna", "who discovered dna"),
        ("how old is the sun", "where the sun rises"),
        ("average cost", "history of average prices"),
        ("symptoms", "symptoms and doctors"),
        ("?!", "anything at all"),
        ("ビタミンは何に良い", "ビタミンを見つけた人"),
    ],
)
def test_a_subject_may_be_a_short_word(query, near):
    check_brief(query, "near", near, {}, longest=70)


def test_no_brief_repeats_an_example():
    shown = [PLANNED[0][1]["answer"], "street noise and house prices"]
    for name, text in zip(("answer", "far"), shown, strict=True):
        with pytest.raises(Unusable, match="repeats an example"):
            check_brief("tulips", name, text, {}, longest=220, shown=shown)


def test_content_is_stems_without_what_says_nothing():
    assert content_words("What are the effects of Walking, and walks?") == {"effec", "walki", "walks"}
    assert content_words("is it up") == {"is", "it", "up"}
    assert content_words("猫はなぜ") == {"猫は", "はな", "なぜ"}


def test_a_far_brief_is_planned_without_the_query():
    drawn = [draw_far(QUERY, random.Random(i)) for i in range(200)]
    assert {d["word"] for d in drawn} == {"noise", "cancelling", "headphones", "work"}
    assert len({d["field"] for d in drawn}) > 40 and {d["field"] for d in drawn} <= {*FIELDS}
    assert draw_far("猫はなぜ", random.Random(0))["word"] in ("猫は", "はな", "なぜ")
    assert draw_far("", random.Random(0))["word"] == ""


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
