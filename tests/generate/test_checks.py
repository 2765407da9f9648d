import random
import sys
from functools import cache

import pytest
from conftest import SAMPLE_FILE

from gradret.console import GradretError
from gradret.data.lists import read_lists
from gradret.generate.prompts import TREC_DL, Prompts
from gradret.generate.replies import Checks, Unusable, find_foreign
from gradret.settings import GenSettings

LISTS = list(read_lists(SAMPLE_FILE))
TEXTS = [passage.text for passage in LISTS[9].passages]
QUERY = LISTS[9].query
GERMAN = (
    "Der Sauerteig riecht nach Nagellackentferner, weil die Hefen zu lange nichts zu fressen bekommen haben. "
    "Füttern Sie ihn öfter mit frischem Mehl und lauwarmem Wasser."
)


@cache  # the model of languages takes a second to load
def make_checks(**settings) -> Checks:
    chosen = GenSettings(**{"min_chars": 100, "max_chars": 1000, **settings})
    return Checks(chosen, Prompts(chosen, TREC_DL).instructions)


CHECKS = make_checks()


def check(texts, query=QUERY, checks=CHECKS) -> None:
    """Check the last text, beside the others."""
    checks.check(query, texts[-1], texts[:-1])


def problem(texts, query=QUERY, checks=CHECKS) -> tuple[str, str]:
    with pytest.raises(Unusable) as found:
        check(texts, query, checks)
    return found.value.reason, found.value.detail


def replace_words(text: str, every: int) -> str:
    return " ".join("zebra" if i % every == every - 1 else word for i, word in enumerate(text.split()))


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({}, []), ({"language": "en"}, []), ({"variety": True}, [])],
)
def test_real_lists_pass(settings, refused):
    checks, found = make_checks(**settings), []
    for ranking_list in LISTS:
        texts = [passage.text for passage in ranking_list.passages]
        for count in range(1, 5):
            try:
                check(texts[:count], ranking_list.query, checks)
            except Unusable as unusable:
                found.append((unusable.reason, unusable.detail))
    assert found == refused


@pytest.mark.parametrize(("length", "message"), [(99, "99 characters"), (1001, "1001 characters")])
def test_lengths_outside_the_bounds_are_refused(length, message):
    text = (TEXTS[1] * 10)[:length]
    assert problem([TEXTS[0], text]) == ("length", f"{message}, expected 100 to 1000")


def test_lengths_at_the_bounds_pass():
    for text in ((TEXTS[0] * 10)[:100], " ".join(f"word{i}" for i in range(200))[:1000]):
        check([text])


@pytest.mark.parametrize(
    "copy",
    [
        lambda text: text,
        lambda text: text.upper().replace(",", " -").replace(".", " !"),
        lambda text: replace_words(text, 6),
        lambda text: "Others have said so before, and at length. " + text[: len(text) * 2 // 3],
    ],
)
def test_duplicates_are_refused_whatever_their_case_and_punctuation(copy):
    reason, detail = problem([TEXTS[0], TEXTS[1], copy(TEXTS[0])])
    assert (reason, detail[:10]) == ("duplicate", "it shares ")
    assert detail.endswith(" of its text with another passage of the list")


def test_a_text_with_every_second_word_of_another_is_no_duplicate():
    check([TEXTS[0], replace_words(TEXTS[0], 2)])


def test_short_passages_are_duplicates_only_when_equal():
    checks = make_checks(min_chars=5)
    check(["The capital of France is Paris.", "The capital of France is Lyon."], QUERY, checks)
    assert problem(["It is Paris.", "it is paris"], checks=checks)[0] == "duplicate"


def test_scripts_without_spaces_are_compared_by_characters():
    checks = make_checks(min_chars=40)
    sleep = "猫在白天睡觉的时间很长，一般每天要睡十二到十六个小时。这与它们的捕猎习性有关，需要在两次捕猎之间保存体力。"
    play = "养猫的人常常会发现，猫的活动时间与人不同。它们喜欢在清晨和黄昏玩耍，白天则在窗台上晒太阳，夜里更安静一些。"
    check([sleep, play], "猫一天睡多久", checks)
    assert problem([sleep, play, sleep.replace("猫", "它")], "猫", checks)[0] == "duplicate"
    query = "为什么猫在白天睡觉的时间很长"
    assert problem(
        [play, f"{query}？因为它们在清晨和黄昏捕猎，需要在两次捕猎之间保存体力，这是很久以前就有的习性。"],
        query,
        checks,
    ) == (
        "query copied",
        "it holds the whole query",
    )


@pytest.mark.parametrize(
    "opening",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, I cannot write this.",
        "Sorry, but as an AI I have no opinion.",
        "I apologize, but I am not able to help with this.",
        "As an AI language model, I do not have personal experience.",
        "I cannot provide medical advice.",
        "Unfortunately, I'm unable to generate this passage.",
        "I don't have access to current data.",
        "Sure! Here is a passage on the subject:",
        "Here's a highly relevant passage about tea:",
        '"This passage is not relevant to the query.',
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
        "Je suis désolé, mais je ne peux pas répondre.",
        "Lo siento, pero no puedo ayudar con eso.",
        "很抱歉，我无法回答这个问题。",
        "申し訳ありませんが、お答えできません。",
    ],
)
def test_refusals_and_talk_about_the_task_are_refused(opening):
    assert problem([TEXTS[0], f"{opening} {TEXTS[1]}"])[0] == "refusal"
    check([TEXTS[0], f"{TEXTS[1]} {opening}"])  # only at the start: people do say sorry


@pytest.mark.parametrize(
    "opening",
    [
        "I can't sleep when the moon is full.",
        "I cannot help but admire the old bakers.",
        "As an assistant professor I taught chemistry.",
        "I'm sorry to say that the plum tree died.",
        "Sorry is the hardest word.",
        "Apologies are a matter of culture.",
        "Here is a lake that never freezes.",
        "This passage between the islands is narrow.",
        "Sure signs of rot are soft spots.",
    ],
)
def test_good_passages_may_open_like_refusals(opening):
    check([TEXTS[0], f"{opening} {TEXTS[1]}"])


def test_echoes_of_the_prompt_are_refused():
    echo = "It is one paragraph of plain prose, four or five sentences long."
    assert problem([TEXTS[0], f"{TEXTS[1]} {echo}"]) == (
        "prompt echo",
        "it repeats the instructions: 'one paragraph of plain prose four or five'",
    )
    assert problem([f"Grade_3: {TEXTS[0]}"]) == ("prompt echo", "it holds 'Grade_3'")
    check([f"In grade 3 pupils learn to write. {TEXTS[0]}"])


@pytest.mark.parametrize(
    ("query", "passage", "copied"),
    [
        ("how long does bread keep at home", f"How long does bread keep, at home? {TEXTS[1]}", True),
        ("how long does bread keep at home", f"How long bread keeps at home depends. {TEXTS[1]}", False),
        ("bread", f"Bread keeps. {TEXTS[1]}", False),
        ("olive oil smoke point", f"The olive oil smoke point varies. {TEXTS[1]}", False),
        (TEXTS[1].rsplit(" ", 9)[0], TEXTS[1], True),
        ("?!", TEXTS[1], False),
    ],
)
def test_a_query_is_not_copied_whole(query, passage, copied):
    if copied:
        assert problem([TEXTS[0], passage], query) == ("query copied", "it holds the whole query")
    else:
        check([TEXTS[0], passage], query)


def test_a_passage_is_not_a_short_query_and_little_more():
    checks = make_checks(min_chars=10)
    assert problem(["Stale bread uses, and more"], "stale bread uses", checks)[0] == "query copied"


def test_the_language_is_as_asked():
    assert problem([TEXTS[0]], checks=make_checks(language="de")) == ("language", "it is in 'en', expected 'de'")
    assert problem([GERMAN], checks=make_checks(language="en")) == ("language", "it is in 'de', expected 'en'")
    danish = (
        "Surdejen lugter af acetone, fordi den er sulten. Giv den oftere frisk mel og lunkent vand, så går lugten væk."
    )
    check([danish], checks=make_checks(language="no"))  # too near to tell


def test_where_no_language_is_asked_for_it_is_the_best_passages():
    check([GERMAN])  # the query's language is not checked
    assert problem([TEXTS[0], GERMAN]) == ("language", "it is in 'de', expected 'en'")
    assert problem([GERMAN, TEXTS[0]]) == ("language", "it is in 'en', expected 'de'")
    kin = [
        "Zagreb je glavni grad Republike Hrvatske i najveći grad po broju stanovnika, a leži na obalama rijeke Save.",
        "Beograd je glavni grad Republike Srbije. Nalazi se na ušću Save u Dunav, gde se sastaju dva lepa kraja.",
    ]
    check(kin)
    check(kin[::-1])


def test_a_language_that_nobody_recognises_is_refused():
    with pytest.raises(GradretError) as error:
        make_checks(language="german")
    assert str(error.value).startswith("language 'german' cannot be checked; expected one of af, am, an, ar, ")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(GradretError, match=r"pip install 'gradret\[gen\]'"):
        Checks(GenSettings(), "")


def test_random_words_pass():
    rng = random.Random(0)
    words = sorted({word for text in TEXTS for word in text.split()})
    for _ in range(50):
        check([" ".join(rng.choices(words, k=60)) for _ in range(4)])


def test_repetition():
    """Loops and texts without words are no passages."""
    loop = "Cats purr when they are happy. "
    for text, reason in (
        (loop * 6, "repetition"),
        ("the " * 40, "repetition"),
        ("." * 150, "no text"),
        ("\u200b" * 150, "no text"),
    ):
        with pytest.raises(Unusable) as problem:
            check([text.strip()], "why do cats purr")
        assert problem.value.reason == reason


@pytest.mark.parametrize(
    "opening",
    [
        "I don't have access to a garden, so",
        "I can't answer for my neighbours, but",
        "This passage is one of the busiest sea lanes, and",
        "As an AI system grows,",
    ],
)
def test_openings_that_only_look_like_refusals(opening):
    check([f"{opening} " + " ".join(f"word{i}" for i in range(30))], "garden shipping")


def test_a_name_may_come_up_in_a_passage_that_answers():
    query = "United Nations Framework Convention on Climate Change"
    words = " ".join(f"word{i}" for i in range(30))
    check([f"In 1992 the {query} was opened for signature, {words}"], query)
    with pytest.raises(Unusable, match="holds the whole query"):
        check([f"{query}: {words}"], query)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It makes a complex home装饰. They offer", "装饰"),
        ("Water them deeply,施肥 regularly.", "施肥"),
        ("lesions such as 宫iac misplacement are rare", "宫"),
        ("In Chinese you say thank you as 谢谢 (xiexie).", ""),
        ("The sign “猫” means cat and costs ฿500.", ""),
        ("我使用Python编程，每天都写代码。", ""),
    ],
)
def test_words_that_slip_in_from_another_script(text, found):
    assert find_foreign(text) == found
