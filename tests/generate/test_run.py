"""The loop of gen on an engine whose replies a test writes down."""

import json
import random
from dataclasses import replace

import pytest

from gradret.console import GradretError
from gradret.data.lists import read_lists
from gradret.generate.engine import Reply
from gradret.generate.journal import Journal
from gradret.generate.prompts import TREC_DL, Prompts, Scale, draw_seed, read_examples
from gradret.generate.queries import Query
from gradret.generate.replies import Checks
from gradret.generate.run import format_summary, generate, settings_record
from gradret.settings import GenSettings

SETTINGS = GenSettings(min_chars=10, max_chars=200)
QUERIES = [Query(f"q{i}", f"what is thing number {i}") for i in range(6)]


def text_of(query: str, grade: float) -> str:
    """Words of their own for each query and grade, the last of which is g3, g2, ..."""
    draw = random.Random(f"{query} {grade}")
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(15)]
    return " ".join([*words, f"g{grade:g}"])


def write_well(request, scale=TREC_DL) -> Reply:
    """What a good model replies."""
    if request.choices:
        return Reply(request, "", "stop", 0, 5, {label: float(label == "2") for label in request.choices})
    asked = json.loads(request.messages[-1]["content"])
    grades = [asked["grade"]] if "grade" in asked else scale.grades
    passages = {f"grade_{g:g}": text_of(asked["query"], g) for g in grades}
    return Reply(request, json.dumps(passages), "stop", 40, 100)


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
        examples = read_examples(None, scale, settings)
        prompts = Prompts(settings, scale, examples)
        with Journal(tmp_path / "lists.jsonl") as journal:
            journal.resume(settings_record(prompts, engine.identity), **journal_options)
            checks = Checks(settings, prompts.instructions, examples)
            return generate(queries, engine, prompts, checks, journal, progress=False)

    return run_once


@pytest.fixture
def written(tmp_path):
    return lambda: {r.query_id: r for r in read_lists(tmp_path / "lists.jsonl")}


@pytest.fixture
def rejects(tmp_path):
    return lambda: [json.loads(line) for line in (tmp_path / "lists.rejects.jsonl").read_text().splitlines()]


def test_a_list_for_every_query(run, written, rejects):
    engine = ScriptedEngine()
    summary = run(engine)
    assert sorted(written()) == sorted(q.query_id for q in QUERIES)
    for query in QUERIES:
        found = written()[query.query_id]
        assert found.query == query.text
        assert [(p.grade, p.text) for p in found.passages] == [(g, text_of(query.text, g)) for g in (3, 2, 1, 0)]
        assert found.meta == {"attempt": 1}
    assert rejects() == []
    assert (summary.lists, summary.skipped, summary.tokens, summary.prompt_tokens) == (6, 0, 240, 600)
    assert {grade: len(lengths) for grade, lengths in summary.lengths.items()} == {3: 6, 2: 6, 1: 6, 0: 6}
    assert len({r.seed for r in engine.asked}) == 6
    assert engine.asked[0].max_tokens == SETTINGS.reply_tokens(4)


def test_what_is_done_is_skipped(run, written):
    run(ScriptedEngine(), queries=QUERIES[:4])
    engine = ScriptedEngine()
    summary = run(engine)
    assert (summary.lists, summary.skipped, len(engine.asked)) == (2, 4, 2)
    assert len(written()) == 6


def test_a_failed_reply_is_asked_again_with_another_seed(run, written, rejects):
    def reply(request):
        query_id, attempt, _ = request.key
        if query_id == "q2" or (query_id == "q4" and attempt < 3):
            return Reply(request, f"sorry, {attempt}", "stop", 3, 100)
        return write_well(request)

    engine = ScriptedEngine(reply)
    summary = run(engine)
    assert set(written()) == {q.query_id for q in QUERIES} - {"q2"}
    assert written()["q4"].meta == {"attempt": 3}
    (reject,) = rejects()
    assert (reject["query_id"], reject["query"], reject["final"]) == ("q2", QUERIES[2].text, True)
    assert reject["reason"] == "not JSON"
    assert reject["replies"] == ["sorry, 1", "sorry, 2", "sorry, 3"]
    assert (summary.rejected, summary.retries) == ({"not JSON": 1}, {"not JSON": 4})
    seeds = [r.seed for r in engine.asked if r.key[0] == "q2"]
    assert len(set(seeds)) == 3
    # Final: not asked again, unless told to.
    engine = ScriptedEngine()
    again = run(engine)
    assert (again.skipped, again.rejected_before, engine.asked) == (5, 1, [])
    assert run(engine, retry_rejects=True).lists == 1
    assert len(written()) == 6


def test_the_likeliest_reply_is_asked_for_once(run, rejects):
    run(ScriptedEngine(lambda r: Reply(r, "{}", "stop", 1)), replace(SETTINGS, temperature=0), QUERIES[:1])
    assert len(rejects()[0]["replies"]) == 1


def test_a_reply_of_a_failed_attempt_does_not_count(run, written):
    """With --separate: grade 1 fails while grade 0 of the same attempt is still under way."""

    def reply(request):
        _, attempt, grade = request.key
        return Reply(request, "{}", "stop", 1) if (attempt, grade) == (1, 1) else write_well(request)

    class Late(ScriptedEngine):
        def collect(self):  # what ran longest comes last
            return [self.reply(self.running.pop(0 if len(self.running) < 3 else 1))] if self.running else []

    engine = Late(reply, room=4)
    run(engine, replace(SETTINGS, separate=True), QUERIES[:2])
    assert {r.meta["attempt"] for r in written().values()} == {2}


def test_a_cut_reply_is_no_list(run, rejects):
    run(ScriptedEngine(lambda r: replace(write_well(r), finish="length")), replace(SETTINGS, attempts=1), QUERIES[:1])
    assert rejects()[0]["reason"] == "cut off"
    assert rejects()[0]["detail"] == "40 tokens were not enough; raise --max-tokens and pass --retry-rejects"


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
        ("refused by the engine", "too long; raise --context", True)
    ]


def test_an_empty_query_is_recorded(run, written, rejects):
    summary = run(ScriptedEngine(), queries=[Query("e", " \n"), *QUERIES[:1], Query("f", "")])
    assert set(written()) == {"q0"}
    assert [(r["query_id"], r["reason"]) for r in rejects()] == [("e", "empty query"), ("f", "empty query")]
    assert summary.rejected == {"empty query": 2}


def test_one_request_a_grade(run, written):
    engine = ScriptedEngine()
    settings = replace(SETTINGS, separate=True)
    run(engine, settings)
    assert len(engine.asked) == 24
    assert len({r.seed for r in engine.asked}) == 24
    assert {r.max_tokens for r in engine.asked} == {settings.reply_tokens(1)}
    assert [p.grade for p in written()["q3"].passages] == [3, 2, 1, 0]
    assert len(written()) == 6


def test_a_grade_that_fails_starts_the_list_again(run, written, rejects):
    def reply(request):
        _, attempt, grade = request.key
        return Reply(request, "{}", "stop", 1) if attempt == 1 and grade == 1 else write_well(request)

    engine = ScriptedEngine(reply, room=2)
    summary = run(engine, replace(SETTINGS, separate=True), QUERIES[:2])
    assert {r.meta["attempt"] for r in written().values()} == {2}
    assert (summary.lists, summary.retries, rejects()) == (2, {"wrong keys": 2}, [])


def test_what_a_list_still_needs_comes_before_the_next_query(run):
    """So that one sequence writes the same file whenever it was stopped."""
    engine = ScriptedEngine(room=1)
    run(engine, replace(SETTINGS, separate=True, judge=True), QUERIES[:3])
    assert [r.key[0] for r in engine.asked] == ["q0"] * 8 + ["q1"] * 8 + ["q2"] * 8


def test_judged_grades_are_expectations(run, written):
    def reply(request):
        if not request.choices:
            return write_well(request)
        passage = json.loads(request.messages[-1]["content"])["passage"]
        shares = {"3": (0.5, 0.5, 0, 0), "2": (0, 0.9, 0.1, 0), "1": (0, 0, 0, 1), "0": (0, 0, 0.25, 0.75)}
        chosen = shares[passage.split(" g")[-1][0]]
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
    assert json.loads(rejects()[0]["replies"][0])["grade_3"] == text_of(QUERIES[0].text, 3)


def test_variety_is_one_style_a_list_whatever_the_order(run, written, tmp_path):
    settings = replace(SETTINGS, variety=True, separate=True)
    engine = ScriptedEngine()
    run(engine, settings)
    styles = {i: found.meta["style"] for i, found in written().items()}
    assert len({json.dumps(s) for s in styles.values()}) > 3
    for request in engine.asked:
        asked = json.loads(request.messages[-1]["content"])
        style = styles[request.key[0]]
        assert (asked["words"], asked["genre"], asked["reader"]) == tuple(style.values())
    (tmp_path / "lists.jsonl").unlink()
    run(ScriptedEngine(room=1), settings, QUERIES[::-1])
    assert {i: found.meta["style"] for i, found in written().items()} == styles


def test_any_scale(run, written):
    scale = Scale(((10, "right"), (2.5, "half right"), (-1, "wrong")))
    engine = ScriptedEngine(lambda r: write_well(r, scale))
    run(engine, scale=scale, queries=QUERIES[:2])
    assert [p.grade for p in written()["q0"].passages] == [10, 2.5, -1]


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
        if len(engine.asked) > 3:
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
    for query, settings in zip(
        QUERIES, (replace(SETTINGS, judge=True), replace(SETTINGS, separate=True)), strict=False
    ):
        engine = ScriptedEngine()
        run(engine, settings, [query], mix=True)
        prompts = Prompts(settings, TREC_DL, read_examples(None, TREC_DL, settings))
        kinds = {(k.messages[:-1], k.max_tokens, k.choices) for k in map(freeze, prompts.kinds())}
        asked = {(k.messages[:-1], k.max_tokens, k.choices) for k in map(freeze, engine.asked)}
        assert asked <= kinds


def freeze(request):
    return replace(request, messages=tuple((m["role"], m["content"]) for m in request.messages))
