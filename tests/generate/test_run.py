"""The loop of gen on an engine whose replies a test writes down."""

import json
import random
from dataclasses import replace

import pytest
from conftest import SAMPLE_FILE

from gradret.console import GradretError
from gradret.data.lists import read_lists
from gradret.generate.engine import Reply
from gradret.generate.journal import Journal
from gradret.generate.prompts import TREC_DL, Prompts, Scale, draw_seed
from gradret.generate.queries import Query
from gradret.generate.replies import Checks
from gradret.generate.run import format_summary, generate, settings_record
from gradret.settings import GenSettings

SETTINGS = GenSettings(min_chars=10, max_chars=400)
QUERIES = [Query(f"q{i}", f"what is thing number {i}") for i in range(6)]
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(4000)]
PARTS = ("plan", "near", "far", 3, 2, 1, 0)


def text_of(subject: str) -> str:
    """Two sentences of words of their own for each subject, the last of which is the subject's last."""
    words = random.Random(subject).choices(WORDS, k=16)
    return f"{' '.join(words[:8])}. {' '.join(words[8:])} {subject.split()[-1]}."


def brief_of(query: str, name: str) -> str:
    end, longest = query.split()[-1], max(query.split(), key=len)
    other = " ".join(random.Random(f"{query} {name}").choices(WORDS, k=2))
    return {
        "answer": f"Its {end} is zebra{end}.",
        "broader": f"every {longest} b{end}",
        "thing": longest,
        "near": f"{longest} of another n{end}",
    }.get(name, f"{other} f{end}")


def plan_of(query: str) -> dict[str, str]:
    return {name: brief_of(query, name) for name in ("thing", "answer", "broader", "near", "far")}


def passage_of(query: str, grade: float) -> str:
    """What a good model's reply to a grade's brief becomes."""
    if grade == 3:
        return text_of(query)
    if grade == 2:
        first, second = text_of(brief_of(query, "broader")).split(". ")
        return f"{first}. {brief_of(query, 'answer')} {second}"
    return text_of(brief_of(query, {1: "near", 0: "far"}[grade]))


def write_well(request) -> Reply:
    """What a good model replies."""
    if request.choices:
        return Reply(request, "", "stop", 0, 5, {label: float(label == "2") for label in request.choices})
    content = request.messages[-1]["content"]
    if content.startswith("Subject: "):
        return Reply(request, text_of(json.loads(content.splitlines()[0].removeprefix("Subject: "))), "stop", 40, 100)
    query = json.loads(content).get("query", f"what is thing number {request.key[0][1:]}")
    names = request.form.schema["required"]
    return Reply(request, json.dumps({name: brief_of(query, name) for name in names}), "stop", 40, 100)


class ScriptedEngine:
    """Replies by a function, newest request first, `room` at a time."""

    identity = "scripted"

    def __init__(self, reply=write_well, room=3):
        self.reply, self.room, self.asked, self.running = reply, room, [], []

    @property
    def free(self):
        return self.room - len(self.running)

    def submit(self, request):
        assert self.free > 0
        self.asked.append(request)
        self.running.append(request)

    def collect(self):
        return [self.reply(self.running.pop())] if self.running else []

    def describe(self):
        return "scripted"


@pytest.fixture
def run(tmp_path):
    def run_once(engine, settings=SETTINGS, queries=QUERIES, scale=TREC_DL, **journal_options):
        prompts = Prompts(settings, scale)
        with Journal(tmp_path / "lists.jsonl") as journal:
            journal.resume(settings_record(prompts, engine.identity), **journal_options)
            checks = Checks(settings, prompts.instructions)
            return generate(queries, engine, prompts, checks, journal)

    return run_once


@pytest.fixture
def written(tmp_path):
    return lambda: {r.query_id: r for r in read_lists(tmp_path / "lists.jsonl")}


@pytest.fixture
def rejects(tmp_path):
    return lambda: [json.loads(line) for line in (tmp_path / "lists.rejects.jsonl").read_text().splitlines()]


def failing(*wrong, text="", finish="stop", attempts=99):
    """An engine whose model writes no more than `text` for the given (query id, part), for so many attempts."""

    def reply(request):
        query_id, attempt, part = request.key
        if (query_id, part) in wrong and attempt <= attempts:
            return Reply(request, text, finish, 3, 100)
        return write_well(request)

    return ScriptedEngine(reply)


def test_a_list_for_every_query(run, written, rejects):
    engine = ScriptedEngine()
    summary = run(engine)
    assert sorted(written()) == sorted(q.query_id for q in QUERIES)
    for query in QUERIES:
        found = written()[query.query_id]
        assert found.query == query.text
        assert [(p.grade, p.text) for p in found.passages] == [(g, passage_of(query.text, g)) for g in (3, 2, 1, 0)]
        assert found.meta == {"plan": plan_of(query.text)}
    assert rejects() == []
    assert (summary.lists, summary.incomplete, summary.skipped) == (6, 0, 0)
    assert (summary.tokens, summary.prompt_tokens) == (6 * 7 * 40, 6 * 7 * 100)
    assert {grade: len(lengths) for grade, lengths in summary.lengths.items()} == {3: 6, 2: 6, 1: 6, 0: 6}
    assert {r.key[2] for r in engine.asked} == {*PARTS}
    assert len({r.seed for r in engine.asked}) == 42


def test_what_is_done_is_skipped(run, written):
    run(ScriptedEngine(), queries=QUERIES[:4])
    engine = ScriptedEngine()
    summary = run(engine)
    assert (summary.lists, summary.skipped, len(engine.asked)) == (2, 4, 14)
    assert len(written()) == 6


@pytest.mark.parametrize("part", PARTS)
def test_what_fails_is_asked_again_alone_with_another_seed(run, written, rejects, part):
    engine = failing(("q2", part), text="Sorry, no", attempts=2)
    summary = run(engine)
    assert (summary.lists, summary.incomplete, rejects()) == (6, 0, [])
    assert [p.text for p in written()["q2"].passages] == [passage_of(QUERIES[2].text, g) for g in (3, 2, 1, 0)]
    asked = [r for r in engine.asked if r.key[0] == "q2"]
    assert sorted(str(r.key[2]) for r in asked) == sorted(map(str, [*PARTS, part, part]))
    assert len({r.seed for r in asked}) == 9
    assert summary.retries == {"not JSON" if isinstance(part, str) else "cut off": 2}


@pytest.mark.parametrize(("part", "grade"), [("far", 0), (2, 2), (1, 1), (0, 0)])
def test_a_list_is_kept_without_what_cannot_be_written(run, written, rejects, part, grade):
    summary = run(failing(("q2", part), text="I'm sorry, but I can't help with that."))
    found = written()["q2"]
    assert [p.grade for p in found.passages] == [g for g in (3, 2, 1, 0) if g != grade]
    reason = "not JSON" if part == "far" else "refusal"
    assert found.meta["missing"] == {str(grade): reason}
    assert (summary.lists, summary.incomplete, summary.retries, rejects()) == (6, 1, {reason: 4}, [])
    assert format_summary({"out": "o", "rejects": "r", **summary.as_dict()}).startswith(
        "o: 6 lists written (1 without a passage of some grade); "
    )


@pytest.mark.parametrize("wrong", [[3], ["plan"], [1, 0], [2]])
def test_too_little_is_no_list(run, written, rejects, wrong):
    """The best grade's passage and two others are a list; with --strict all are."""
    settings = replace(SETTINGS, strict=wrong == [2], attempts=3)
    engine = failing(*(("q2", part) for part in wrong), text="<think>")
    summary = run(engine, settings)
    assert set(written()) == {q.query_id for q in QUERIES} - {"q2"}
    (reject,) = rejects()
    assert (reject["query_id"], reject["query"], reject["final"]) == ("q2", QUERIES[2].text, True)
    grade = 2 if wrong == ["plan"] else wrong[0]
    assert (reject["reason"], reject["detail"]) == ("empty reply", f"grade {grade}: nothing was written")
    assert reject["replies"].count("<think>") >= 3
    assert summary.rejected == {"empty reply": 1}
    # Final: not asked again, unless told to.
    engine = ScriptedEngine()
    again = run(engine, settings)
    assert (again.skipped, again.rejected_before, engine.asked) == (5, 1, [])
    assert run(engine, settings, retry_rejects=True).lists == 1
    assert len(written()) == 6


def test_good_briefs_are_kept_while_others_are_asked_again(run, written):
    def reply(request):
        good = write_well(request)
        if request.key[2] != "plan":
            return good
        names = {1: ("thing",), 2: ("answer", "broader")}[request.key[1]]
        return replace(good, text=json.dumps({**json.loads(good.text), **dict.fromkeys(names, "elsewhere")}))

    engine = ScriptedEngine(reply, room=1)
    summary = run(engine, queries=QUERIES[:1])
    assert written()["q0"].meta == {"plan": plan_of(QUERIES[0].text)}
    assert summary.retries == {"bad plan": 1}
    order = [r.key[2] for r in engine.asked]
    assert sorted(map(str, order)) == sorted(map(str, [*PARTS, "plan"])) and order.index(2) < order.index(1)


def test_a_passage_in_another_language_gets_another_brief(run, written):
    """That of its own may be why."""
    german = (
        "Der erste Schnee fiel in diesem Jahr schon im Oktober auf die Berge, und niemand hatte die Reifen gewechselt. "
        "Auf der Straße zum Pass standen am Morgen lange Schlangen von Autos, deren Fahrer auf den Räumdienst warteten."
    )
    english = [passage.text for passage in next(iter(read_lists(SAMPLE_FILE))).passages]

    def reply(request):
        good, (_, attempt, part) = write_well(request), request.key
        if part == "far" and attempt == 1:
            return replace(good, text=json.dumps({"far": "der erste Schnee des Jahres"}))
        if part not in (3, 2, 1, 0):
            return good
        return replace(good, text=german if "Schnee" in request.messages[-1]["content"] else english[3 - part])

    engine = ScriptedEngine(reply)
    settings = replace(SETTINGS, min_chars=60)
    summary = run(engine, settings, queries=QUERIES[:1])
    assert summary.retries == {"language": 1}
    assert [r.key[1:] for r in engine.asked if r.key[1] > 1] == [(2, "far"), (2, 0)]
    assert written()["q0"].meta["plan"]["far"] == brief_of(QUERIES[0].text, "far")
    assert len(written()["q0"].passages) == 4


@pytest.mark.parametrize("room", [1, 6])
def test_of_two_that_are_alike_the_lower_one_is_written_again(run, written, room):
    """In whatever order they came."""
    query = QUERIES[0].text

    def reply(request):
        good = write_well(request)
        return replace(good, text=text_of(brief_of(query, "near"))) if request.key[1:] == (1, 0) else good

    engine = ScriptedEngine(reply, room)
    run(engine, queries=QUERIES[:1])
    assert [r.key[1:] for r in engine.asked if r.key[1] == 2] == [(2, 0)]
    assert [p.text for p in written()["q0"].passages] == [passage_of(query, g) for g in (3, 2, 1, 0)]


def test_the_likeliest_reply_is_asked_for_once(run, rejects):
    settings = replace(SETTINGS, temperature=0)
    engine = ScriptedEngine(lambda r: Reply(r, "{}", "stop", 1))
    run(engine, settings, QUERIES[:1])
    assert [r.key[2] for r in engine.asked].count("plan") == 1
    # A plan and a passage; a far brief would be another, but the best passage has failed by then.
    assert len(rejects()[0]["replies"]) <= 7 and len(engine.asked) == len({r.seed for r in engine.asked})


def test_passages_end_with_a_sentence(run, written):
    def reply(request):
        good = write_well(request)
        return replace(good, text=f"{good.text} And then the", finish="length") if request.key[2] in (3, 1) else good

    run(ScriptedEngine(reply), queries=QUERIES[:1])
    assert [p.text for p in written()["q0"].passages] == [passage_of(QUERIES[0].text, g) for g in (3, 2, 1, 0)]


def test_a_plan_that_is_cut_off_is_asked_again(run, written):
    engine = failing(("q0", "plan"), text='{"answer": "It is', finish="length", attempts=1)
    summary = run(engine, queries=QUERIES[:1])
    assert (summary.lists, summary.retries) == (1, {"cut off": 1})


def test_a_far_passage_can_be_borrowed(run, written):
    queries = [Query(f"q{i}", f"{word} is thing number {i}") for i, word in enumerate(WORDS[:4])]
    others = [Query("q8", "zebras graze together")]
    settings = replace(SETTINGS, borrow=True)

    engine = ScriptedEngine(room=1)
    run(engine, settings, [*queries, *others])
    lists = written()
    assert "far" in lists["q0"].meta["plan"] and "borrowed" not in lists["q0"].meta
    assert "far" in lists["q1"].meta["plan"]  # the queries before it are about the same
    lender = lists[lists["q8"].meta["borrowed"]]
    assert lists["q8"].passages[-1].text == lender.passages[0].text and "far" not in lists["q8"].meta["plan"]
    assert [r.key[2] for r in engine.asked if r.key[0] == "q8"].count("far") == 0


def test_another_passage_is_written_for_a_borrowed_one_that_fails(run, written):
    queries = [Query("q0", f"{WORDS[0]} is thing number 0"), Query("q8", "zebras graze together")]
    lent = passage_of(queries[0].text, 3)

    def reply(request):
        copies = request.key[0] == "q8" and request.key[2] == 3
        return Reply(request, lent, "stop", 40, 100) if copies else write_well(request)

    summary = run(ScriptedEngine(reply, room=1), replace(SETTINGS, borrow=True), queries)
    assert summary.retries["duplicate"] == 1
    found = written()["q8"]
    assert (found.passages[-1].grade, found.passages[-1].text) == (0, text_of(found.meta["plan"]["far"]))
    assert "borrowed" not in found.meta


def test_an_engine_that_fails_leaves_the_query_for_later(run, written, rejects):
    summary = run(ScriptedEngine(lambda r: Reply(r, "", "error", error="HTTP 500 after 7 tries")), queries=QUERIES[:2])
    assert summary.rejected == {"no reply": 2}
    assert [(r["reason"], r["detail"], r["final"]) for r in rejects()] == 2 * [
        ("no reply", "HTTP 500 after 7 tries", False)
    ]
    assert run(ScriptedEngine()).lists == 6
    assert len(written()) == 6


def test_a_refused_request_is_final(run, rejects):
    run(ScriptedEngine(lambda r: Reply(r, "", "refused", error="too long; raise --context")), queries=QUERIES[:1])
    assert [(r["reason"], r["detail"], r["final"]) for r in rejects()] == [
        ("refused by the engine", "grade 3: too long; raise --context", True)
    ]


def test_what_the_engine_refuses_costs_its_grade_alone(run, written):
    engine = failing(("q1", 1), ("q2", "far"), finish="refused")
    run(engine, queries=QUERIES[:3])
    assert written()["q1"].meta["missing"] == {"1": "refused by the engine"}
    assert written()["q2"].meta["missing"] == {"0": "refused by the engine"}
    assert [r.key for r in engine.asked if r.key[1] > 1] == []


@pytest.mark.parametrize("text", ["# A title. And more.", "First. **Second**.", "One.\n- Two."])
def test_markup_is_written_again(run, written, text):
    summary = run(failing(("q0", 1), text=text, attempts=1), queries=QUERIES[:1])
    assert (summary.lists, summary.incomplete, summary.retries) == (1, 0, {"markup": 1})


def test_an_empty_query_is_recorded(run, written, rejects):
    summary = run(ScriptedEngine(), queries=[Query("e", " \n"), *QUERIES[:1], Query("f", "")])
    assert set(written()) == {"q0"}
    assert [(r["query_id"], r["reason"]) for r in rejects()] == [("e", "empty query"), ("f", "empty query")]
    assert summary.rejected == {"empty query": 2}


def test_what_a_list_still_needs_comes_before_the_next_query(run):
    """So that one sequence writes the same file whenever it was stopped."""
    engine = ScriptedEngine(room=1)
    run(engine, replace(SETTINGS, judge=True), QUERIES[:3])
    assert [r.key[0] for r in engine.asked] == ["q0"] * 11 + ["q1"] * 11 + ["q2"] * 11


def test_judged_grades_are_expectations(run, written):
    def reply(request):
        if not request.choices:
            return write_well(request)
        passage = json.loads(request.messages[-1]["content"])["passage"]
        shares = {"3": (0.5, 0.5, 0, 0), "2": (0, 0.9, 0.1, 0), "1": (0, 0, 0, 1), "0": (0, 0, 0.25, 0.75)}
        query = f"what is thing number {request.key[0][1:]}"
        grade = next(g for g in (3, 2, 1, 0) if passage_of(query, g) == passage)
        chosen = shares[str(grade)]
        return Reply(request, "", "stop", 0, 50, dict(zip(request.choices, chosen, strict=True)))

    settings = replace(SETTINGS, judge=True)
    engine = ScriptedEngine(reply)
    summary = run(engine, settings)
    assert [(p.grade, p.extra) for p in written()["q1"].passages] == [
        (3, {"judged": 2.5}),
        (2, {"judged": 1.9}),
        (1, {"judged": 0.0}),
        (0, {"judged": 0.25}),
    ]
    # 2.5 is as near to 3 as to 2: the better one. Grade 1 is judged below grade 0: out of order.
    assert summary.as_dict()["judged"]["confusion"] == [[6, 0, 0, 0], [0, 6, 0, 0], [0, 0, 0, 6], [0, 0, 0, 6]]
    assert (summary.lists, summary.agreed) == (6, 0)
    blind = [r for r in engine.asked if r.choices]
    assert len(blind) == 24
    assert all(set(json.loads(r.messages[-1]["content"])) == {"query", "passage"} for r in blind)
    document = {"out": "o", "rejects": "r", **summary.as_dict()}
    assert "agree in order in 0 of 6 lists" in format_summary(document)


def test_a_judge_without_an_answer(run, written, rejects):
    def reply(request):
        return Reply(request, "", "refused", error="no label") if request.choices else write_well(request)

    run(ScriptedEngine(reply), replace(SETTINGS, judge=True), QUERIES[:1])
    assert not written()
    assert (rejects()[0]["reason"], rejects()[0]["detail"]) == ("not judged", "no label")
    assert text_of(QUERIES[0].text) in rejects()[0]["replies"]


def test_variety_is_one_style_a_list_whatever_the_order(run, written, tmp_path):
    settings = replace(SETTINGS, variety=True)
    engine = ScriptedEngine()
    run(engine, settings)
    styles = {i: found.meta["style"] for i, found in written().items()}
    assert len({json.dumps(s) for s in styles.values()}) > 3
    for request in engine.asked:
        words, genre, level = styles[request.key[0]].values()
        if request.key[2] in (3, 2, 1, 0):
            assert request.messages[-1]["content"].endswith(
                f"\nKind of text: {genre}\nFor: {level}\nLength: {words} words"
            )
    (tmp_path / "lists.jsonl").unlink()
    run(ScriptedEngine(room=1), settings, QUERIES[::-1])
    assert {i: found.meta["style"] for i, found in written().items()} == styles


def test_any_scale(run, written):
    scale = Scale(((10, "right"), (2.5, "half right"), (-1, "wrong")))
    run(ScriptedEngine(), scale=scale, queries=QUERIES[:2])
    found = written()["q0"]
    plan = {name: brief_of(QUERIES[0].text, name) for name in ("grade_2.5", "grade_-1")}
    assert found.meta == {"plan": plan}
    wanted = [(10, QUERIES[0].text), (2.5, plan["grade_2.5"]), (-1, plan["grade_-1"])]
    assert [(p.grade, p.text) for p in found.passages] == [(grade, text_of(subject)) for grade, subject in wanted]


def test_other_settings_are_refused(run, written):
    run(ScriptedEngine(), queries=QUERIES[:2])
    changed = replace(SETTINGS, temperature=0.7)
    with pytest.raises(
        GradretError, match=r"was written with temperature=0.8 where 0.7 is asked for; .*--mix-settings"
    ):
        run(ScriptedEngine(), changed)
    assert len(written()) == 2
    # Neither shows in a list that passed.
    run(ScriptedEngine(), replace(SETTINGS, attempts=9, max_tokens=500), QUERIES[:3])
    run(ScriptedEngine(), changed, mix=True)
    assert len(written()) == 6


def test_an_engine_that_gives_up_keeps_what_is_there(run, written, capsys):
    def reply(request):
        if len(engine.asked) > 21:
            raise GradretError("http://there: 3 requests in a row failed")
        return write_well(request)

    engine = ScriptedEngine(reply, room=1)
    with pytest.raises(GradretError, match="3 requests in a row failed"):
        run(engine)
    assert len(written()) == 3
    assert "3 lists written, 0 queries rejected, all saved" in capsys.readouterr().err
    assert run(ScriptedEngine()).lists == 3


def test_streams_differ_in_all_they_should(run):
    base = (QUERIES[0], 0, "model", 1, None)
    changes = [(QUERIES[1], 0, "model", 1, None), (QUERIES[0], 1, "model", 1, None)]
    changes += [(QUERIES[0], 0, "other", 1, None), (QUERIES[0], 0, "model", 2, None), (QUERIES[0], 0, "model", 1, 3)]
    assert len({draw_seed(*arguments) for arguments in [base, *changes]}) == 6
    assert draw_seed(*base) == draw_seed(*base)


def test_kinds_are_those_submitted(run):
    engine = ScriptedEngine()
    settings = replace(SETTINGS, judge=True)
    run(engine, settings, QUERIES[:1])
    kinds = {(k.messages[:-1], k.max_tokens, k.choices) for k in map(freeze, Prompts(settings, TREC_DL).kinds())}
    assert {(k.messages[:-1], k.max_tokens, k.choices) for k in map(freeze, engine.asked)} == kinds


def freeze(request):
    return replace(request, messages=tuple((m["role"], m["content"]) for m in request.messages))
