import json
import logging
import math
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from faulty_server import Answer, FaultyServer, make_completion, make_logprobs
from hypothesis import given
from hypothesis import strategies as st

from gradret.console import GradretError
from gradret.generate import endpoint
from gradret.generate.endpoint import Failure, name_model, read_message, read_reply, read_retry_after
from gradret.generate.engine import Form, Reply, Request

pytest.importorskip("openai")

KEY = "sk-very/secret+1234"
TEXTS = {"type": "string", "maxLength": 8}
FORM = Form(
    "",
    {
        "type": "object",
        "properties": {"grade_1": TEXTS, "grade_0": TEXTS},
        "required": ["grade_1", "grade_0"],
        "additionalProperties": False,
    },
)
LABELS = ("3", "2", "1", "0")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_DELAY_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def open_endpoint():
    engines = []

    def open_one(url: str, **options) -> endpoint.Endpoint:
        engines.append(endpoint.Endpoint(url, **options))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


def make_request(key="a", **options) -> Request:
    messages = ({"role": "system", "content": "Answer."}, {"role": "user", "content": f"say {key}"})
    return Request(key, messages, 50, **options)


def run_all(engine: endpoint.Endpoint, requests: list[Request]) -> list[Reply]:
    """Every reply, as the generator asks for them."""
    replies, waiting = [], list(requests)
    while True:
        while waiting and engine.free:
            engine.submit(waiting.pop(0))
        ready = engine.collect()
        if not ready:
            return replies
        replies += ready


def ask(engine: endpoint.Endpoint, request: Request | None = None) -> Reply:
    (reply,) = run_all(engine, [request or make_request()])
    return reply


# What goes out and what comes back


def test_replies_belong_to_their_requests_and_the_bound_holds(open_endpoint):
    with FaultyServer(delay_s=0.02) as server:
        engine = open_endpoint(server.url, concurrency=5)
        assert (engine.free, engine.identity) == (5, "tiny")
        replies = run_all(engine, [make_request(i) for i in range(40)])
    assert {r.request.key: r.text for r in replies} == {i: f"say {i}" for i in range(40)}
    assert {(r.finish, r.tokens, r.prompt_tokens, r.error) for r in replies} == {("stop", 3, 7, None)}
    assert server.most_at_once == 5
    assert engine.free == 5


def test_a_collected_place_is_free_again(open_endpoint):
    with FaultyServer() as server:
        engine = open_endpoint(server.url, concurrency=2)
        assert engine.collect() == []
        engine.submit(make_request())
        assert engine.free == 1
        assert len(engine.collect()) == 1
        assert engine.free == 2
        assert "tiny" in engine.describe() and server.url in engine.describe()


def test_a_request_is_said_in_full(open_endpoint):
    with FaultyServer() as server:
        options = {"chat_template_kwargs": {"enable_thinking": False}, "top_p": 0.5}
        engine = open_endpoint(server.url, temperature=0.7, top_p=0.9, options=options)
        ask(engine, make_request(seed=2**40 + 5, form=FORM))
        ask(engine, make_request(choices=LABELS))
        written, judged = server.requests
    assert written["messages"] == list(make_request().messages)
    format = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": FORM.schema}}
    expected = {"model": "tiny", "max_tokens": 50, "seed": 5, "temperature": 0.7, "response_format": format, **options}
    assert {k: v for k, v in written.items() if k not in ("messages", "at_s", "headers")} == expected
    assert (judged["max_tokens"], judged["temperature"], judged["logprobs"], judged["top_logprobs"]) == (1, 0, True, 20)
    assert "response_format" not in judged
    assert written["headers"]["authorization"] == "Bearer none"


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(open_endpoint):
    with FaultyServer() as server:
        assert ask(open_endpoint(server.url), make_request("\ud800x")).text == "say ?x"


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": "hello"}, "stop", ("hello", "stop")),
        ({"content": "hel"}, "length", ("hel", "length")),
        ({"content": "hello"}, None, ("hello", "stop")),
        ({"content": "hello"}, "eos", ("hello", "stop")),
        ({"content": ""}, "stop", ("", "stop")),
        ({"content": None}, "length", ("", "length")),
        ({"content": None, "reasoning_content": "hm"}, "stop", ("", "stop")),
        ({"content": None, "refusal": "I can not"}, "stop", ("I can not", "stop")),
        ({"content": [{"type": "thinking"}, {"type": "text", "text": "a"}, {"text": "b"}]}, "stop", ("ab", "stop")),
        ({"content": "half \ud800"}, "stop", ("half ?", "stop")),
        ({"content": "bad"}, "content_filter", ("bad", "refused")),
    ],
)
def test_texts_are_read_from_every_kind_of_message(message, finish, expected):
    body = {"choices": [{"message": message, "finish_reason": finish}], "usage": None}
    reply = read_reply(body, make_request(), pytest.fail)
    assert (reply.text, reply.finish, reply.tokens) == (*expected, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(LABELS),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "usage", "error"]
            ),
            inner,
            max_size=5,
        )
    ),
)


@given(body=st.dictionaries(st.sampled_from(["choices", "usage", "error"]), JSON), choice=JSON, judge=st.booleans())
def test_no_body_breaks_the_reader(body, choice, judge):
    request = make_request(choices=LABELS if judge else ())
    for candidate in (body, {**body, "choices": [choice]}, {"choices": [{"message": {}, "logprobs": choice}]}):
        try:
            reply = read_reply(candidate, request, lambda line: None)
        except Failure as failure:
            assert failure.passing
        else:
            assert reply.finish in ("stop", "length", "refused")
            assert not reply.probabilities or sum(reply.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        ('{"error": "too long"}', "too long"),
        ('{"object": "error", "message": "too long"}', "too long"),
        ('{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        ("<html>too long", "<html>too long"),
        ("", ""),
        ("3", "3"),
    ],
)
def test_error_messages_are_found_in_their_usual_places(body, message):
    assert read_message(body) == message


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [("3", 3), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after_is_a_number_or_a_date(value, wait_s):
    assert read_retry_after({"retry-after": value}) == wait_s
    assert 9e8 < read_retry_after({"retry-after": "Wed, 21 Oct 2095 07:28:00 GMT"})
    assert read_retry_after({}) == 0


# Trying again


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429),
        Answer(500),
        Answer(503, b"<html>"),
        Answer(408),
        Answer(body=b"<html>no"),
        Answer(body=b"\xff\xfe{"),
        Answer(body=b"[" * 50_000),
        Answer(body=b""),
        Answer(body=[1, 2]),
        Answer(body={"x": 1}),
        Answer(body={"choices": []}),
        Answer(body={"choices": None, "usage": None}),
        Answer(body={"error": {"message": "overloaded"}}),
        Answer(body=make_completion(None)),
        Answer(body=b"xxxx", headers={"Content-Encoding": "gzip"}),
        Answer(body=make_completion("half a reply"), half=True),
        Answer(500, half=True),
        Answer(302, headers={"Location": "http://127.0.0.1:1/"}),
        Answer(wait_s=30),
    ],
    ids=lambda a: f"{a.status}-{str(a.body)[:20]}{'-half' * a.half}{'-never' * bool(a.wait_s)}",
)
def test_what_passes_is_tried_again_and_ends_as_an_error(open_endpoint, answer):
    with FaultyServer([answer, answer]) as server:
        engine = open_endpoint(server.url, retries=2, timeout_s=0.5)
        reply = ask(engine)
        assert (reply.finish, reply.text, len(server.requests)) == ("stop", "say a", 3)
    with FaultyServer(lambda request: answer) as server:
        engine = open_endpoint(server.url, retries=1, timeout_s=0.5)
        reply = ask(engine)
        assert (reply.finish, reply.text, len(server.requests)) == ("error", "", 2)
        assert " after 2 tries" in reply.error
        assert "\n" not in reply.error and len(reply.error) < 260


def test_errors_are_told_in_few_words(open_endpoint):
    def tell(answer):
        with FaultyServer(lambda request: answer) as server:
            return ask(open_endpoint(server.url, retries=1, timeout_s=0.3)).error

    assert tell(Answer(500)) == "HTTP 500 after 2 tries: status 500"
    assert tell(Answer(wait_s=30)) == "no answer within 0.3 s after 2 tries"
    assert tell(Answer(body={"error": {"message": "busy"}})) == "HTTP 200 after 2 tries: no reply, but busy"


def test_retry_after_is_honoured(open_endpoint):
    with FaultyServer([Answer(429, headers={"Retry-After": "1"})]) as server:
        assert ask(open_endpoint(server.url)).finish == "stop"
        first, second = [r["at_s"] for r in server.requests]
    assert 1 <= second - first < 1.5


def test_a_days_quota_is_not_waited_for(open_endpoint):
    with FaultyServer([Answer(429, headers={"Retry-After": "86400"})]) as server:
        reply = ask(open_endpoint(server.url))
    assert (reply.finish, reply.error) == ("error", "HTTP 429 after 1 try: status 429")


def test_delays_grow(open_endpoint, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(endpoint, "MOST_DELAY_S", 0.2)
    with FaultyServer(lambda request: Answer(500)) as server:
        ask(open_endpoint(server.url, retries=4))
        times = [r["at_s"] for r in server.requests]
    delays = [b - a for a, b in pairwise(times)]
    for delay, expected in zip(delays, [0.05, 0.1, 0.2, 0.2], strict=True):
        assert 0.74 * expected <= delay < 1.25 * expected + 0.2


def test_a_server_that_drips_does_not_hold_a_request(open_endpoint):
    with socket.create_server(("127.0.0.1", 0)) as listener, FaultyServer() as server:
        engine = open_endpoint(server.url, retries=0, timeout_s=0.6)
        engine._client.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        engine.submit(make_request())
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            start_s = time.monotonic()
            while not engine._done.qsize() and time.monotonic() - start_s < 5:
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
                time.sleep(0.1)
        assert engine.collect()[0].error == "no answer within 0.6 s after 1 try"
        assert time.monotonic() - start_s < 2


# What ends a run, and what does not


def test_a_server_that_goes_away_ends_the_run_after_all_replies(open_endpoint):
    with FaultyServer(delay_s=0.01) as server:
        engine = open_endpoint(server.url, concurrency=4, retries=1)
        got = run_all(engine, [make_request(i) for i in range(6)])
        engine.submit(make_request("last"))
        time.sleep(0.3)  # answered, not yet collected
    with pytest.raises(GradretError) as caught:
        while True:
            while engine.free:
                engine.submit(make_request("lost"))
            got += engine.collect()
    counts = Counter((r.request.key == "lost", r.finish) for r in got)
    assert counts[False, "stop"] == 7
    assert counts[True, "error"] >= 8
    assert set(counts) == {(False, "stop"), (True, "error")}
    assert str(caught.value).startswith(f"{server.url}: {counts[True, 'error']} requests in a row failed (last: ")
    assert str(caught.value).endswith("); what is written is kept, run the same command again to go on")


def test_scattered_errors_do_not_end_a_run(open_endpoint):
    with FaultyServer(lambda request: Answer(500) if request["seed"] % 3 else None) as server:
        engine = open_endpoint(server.url, concurrency=1, retries=0)
        replies = run_all(engine, [make_request(i, seed=i) for i in range(30)])
    assert {r.request.key for r in replies if r.finish == "error"} == {i for i in range(30) if i % 3}


def test_a_refusal_is_final_once_another_request_was_taken(open_endpoint):
    """The next one in a row is not: the fault may lie in what all share, such as an account without credit."""
    script = [Answer(400, {"error": {"message": "context too long"}}), None]
    with FaultyServer([*script, script[0], Answer(413), Answer(422)]) as server:
        engine = open_endpoint(server.url)
        replies = [ask(engine) for _ in range(5)]
        assert [r.finish for r in replies] == ["error", "stop", "refused", "error", "error"]
        assert replies[2].error == "HTTP 400: context too long"
        assert len(server.requests) == 5


def test_a_server_that_refuses_everything_ends_the_run(open_endpoint):
    with FaultyServer(lambda request: Answer(400, {"error": {"message": "no temperature"}})) as server:
        engine = open_endpoint(server.url, concurrency=2)
        with pytest.raises(GradretError, match=r"8 requests in a row failed \(last: HTTP 400: no temperature\)"):
            run_all(engine, [make_request(i, form=FORM) for i in range(30)])


@pytest.mark.parametrize("status", [402, 404, 405])
def test_what_meets_every_request_ends_the_run_after_what_came(open_endpoint, status):
    answer = Answer(status, {"error": {"message": "no such thing"}})
    with FaultyServer([None, answer]) as server:
        engine = open_endpoint(server.url, model="big", concurrency=1)
        assert ask(engine).text == "say a"
        engine.submit(make_request())
        with pytest.raises(
            GradretError, match=rf"^{server.url}: HTTP {status}: no such thing for model big; check --model and the URL"
        ):
            engine.collect()
        assert engine.free == 1


def test_close_abandons_what_runs(open_endpoint):
    with FaultyServer(lambda request: Answer(wait_s=30)) as server:
        engine = open_endpoint(server.url)
        for i in range(8):
            engine.submit(make_request(i))
        time.sleep(0.2)
        start_s = time.monotonic()
        engine.close()
        engine.close()
        assert time.monotonic() - start_s < 1
        assert engine.collect() == []


@pytest.mark.parametrize("closes", [True, False])
def test_sigint_ends_collect_and_the_process(closes):
    code = f"""
import signal, sys
from gradret.generate.endpoint import Endpoint
from gradret.generate.engine import Request
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have been started without
engine = Endpoint(sys.argv[1])
for i in range(8):
    engine.submit(Request(i, ({{"role": "user", "content": "x"}},), 5))
try:
    print("waiting", flush=True)
    engine.collect()
except KeyboardInterrupt:
    print("stopped", flush=True)
    if {closes}:
        engine.close()
"""
    with FaultyServer(lambda request: Answer(wait_s=60)) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        start_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        assert (out, process.returncode) == ("stopped\n", 0)
        assert time.monotonic() - start_s < 3


# Dialects


def refuse_formats(accepted: tuple, answer: Answer):
    def script(request: dict) -> Answer | None:
        format = request.get("response_format")
        kind = (format["type"], "schema" in format) if format else None
        return None if kind in accepted else answer

    return script


@pytest.mark.parametrize(
    "answer",
    [
        Answer(400),
        Answer(422),
        Answer(501),
        Answer(500, {"error": {"message": "body, response_format: literal_error"}}),
    ],
    ids=lambda a: str(a.status),
)
@pytest.mark.parametrize(
    ("accepted", "said"),
    [
        ((None, ("json_object", False), ("json_object", True)), "json_object with a schema"),
        ((None, ("json_object", False)), "json_object"),
        ((None,), "nothing"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_forms_are_asked_for_as_the_server_takes_them(open_endpoint, capsys, accepted, said, answer):
    with FaultyServer(refuse_formats(accepted, answer), delay_s=0.01) as server:
        engine = open_endpoint(server.url, concurrency=4)
        replies = run_all(engine, [make_request(i, form=FORM) for i in range(20)])
        assert {r.request.key: r.text for r in replies} == {i: f"say {i}" for i in range(20)}
        # Only those that began before the first success meet refusals.
        assert len(server.requests) <= 20 + 4 * 3
        assert len(server.requests) > 20
    assert capsys.readouterr().err == (
        f"{server.url}: takes no response_format json_schema, so {said} asks for the form; replies are checked\n"
    )


def test_a_refusal_for_something_else_changes_no_form(open_endpoint, capsys):
    def script(request):
        return Answer(400) if "long" in request["messages"][-1]["content"] else None

    with FaultyServer(script) as server:
        engine = open_endpoint(server.url)
        assert [ask(engine, make_request(k, form=FORM)).finish for k in ("long", "b", "long")] == [
            "error",
            "stop",
            "refused",
        ]
        assert [r.get("response_format", {}).get("type") for r in server.requests[-2:]] == ["json_schema"] * 2
        assert len(server.requests) == 4 + 1 + 1
    assert capsys.readouterr().err == ""


def test_max_completion_tokens_where_the_server_wants_it(open_endpoint):
    def script(request):
        if "max_tokens" in request:
            return Answer(
                400, {"error": {"message": "Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead."}}
            )
        return None

    with FaultyServer(script) as server:
        engine = open_endpoint(server.url)
        assert [ask(engine, make_request(form=FORM)).finish for _ in range(2)] == ["stop", "stop"]
        assert [r.get("max_completion_tokens") for r in server.requests] == [None, 50, 50]
        assert ["response_format" in r for r in server.requests] == [True] * 3


# The judge


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"3": math.log(0.6), " 3": math.log(0.1), "1": math.log(0.1), "x": math.log(0.1)}, [7 / 8, 0, 1 / 8, 0]),
        ({"2": 0.0, "3": -9999.0}, [0, 1, 0, 0]),
        ({" 0\n": -0.1}, [0, 0, 0, 1]),
        ({"2": -1, "3": -(10**400), "1": math.nan, "0": None}, [0, 1, 0, 0]),
    ],
)
def test_judged_probabilities(open_endpoint, top, expected):
    body = make_completion("3", logprobs=make_logprobs(next(iter(top)), top))
    with FaultyServer([Answer(body=body)]) as server:
        reply = ask(open_endpoint(server.url), make_request(choices=LABELS))
    assert list(reply.probabilities) == list(LABELS)
    assert list(reply.probabilities.values()) == pytest.approx(expected)
    assert (reply.finish, reply.tokens) == ("stop", 3)


@pytest.mark.parametrize("most", [5, 0])
def test_fewer_top_logprobs_where_the_server_caps_them(open_endpoint, most, capsys):
    def script(request):
        asked = request.get("top_logprobs", 0)
        if asked > most:
            return Answer(400, {"error": {"message": f"top_logprobs must be at most {most}"}})
        logprobs = make_logprobs("2", {"2": -0.1}) if asked else None
        return Answer(body=make_completion("2", logprobs=logprobs))

    with FaultyServer(script) as server:
        engine = open_endpoint(server.url)
        for _ in range(2):
            assert ask(engine, make_request(choices=LABELS)).probabilities == {"3": 0, "2": 1, "1": 0, "0": 0}
        steps = [20, 5] if most else [20, 5, None]
        assert [r.get("top_logprobs") for r in server.requests] == [*steps, steps[-1]]
    assert ("no probabilities" in capsys.readouterr().err) is (most == 0)


def test_without_probabilities_the_written_label_counts(open_endpoint, capsys):
    script = [Answer(body=make_completion(text)) for text in (" 2\n", "0", "two")]
    with FaultyServer(script) as server:
        engine = open_endpoint(server.url)
        replies = [ask(engine, make_request(choices=LABELS)) for _ in range(3)]
    assert [r.probabilities for r in replies[:2]] == [
        {"3": 0, "2": 1, "1": 0, "0": 0},
        {"3": 0, "2": 0, "1": 0, "0": 1},
    ]
    assert (replies[2].finish, replies[2].probabilities) == ("refused", None)
    assert replies[2].error == "none of 3, 2, 1, 0 was written; 'two' was"
    assert capsys.readouterr().err == (
        f"{server.url}: sends no probabilities of tokens; what the judge writes counts as certain\n"
    )


def test_no_label_among_the_likeliest(open_endpoint):
    body = make_completion("The", logprobs=make_logprobs("The", {"The": -0.1, "A": -2.0}))
    with FaultyServer([Answer(body=body)]) as server:
        reply = ask(open_endpoint(server.url), make_request(choices=LABELS))
    assert (reply.finish, reply.error) == (
        "refused",
        "none of 3, 2, 1, 0 is among the 2 likeliest tokens; the likeliest is 'The'",
    )


# The key


def test_the_key_is_sent_and_never_shown(open_endpoint, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert endpoint.read_key() == KEY
    echo = f"got Authorization: Bearer {KEY}"
    forms = [{"error": {"message": echo}}, {"error": echo}, echo, {"odd": {"key": KEY}}, {"detail": "x" * 190 + KEY}]
    bodies = [*forms, f"<b>{KEY}</b>".encode(), json.dumps({"odd": KEY}).replace("/", "\\/").encode()]
    with FaultyServer([Answer(s, b) for b in bodies for s in (500, 200, 400)]) as server:
        engine = open_endpoint(server.url, retries=0, key=endpoint.read_key())
        shown = [ask(engine).error for _ in range(3 * len(bodies))]
        assert {r["headers"]["authorization"] for r in server.requests} == {f"Bearer {KEY}"}
    with FaultyServer(lambda request: Answer(401, {"error": echo})) as server:
        engine = open_endpoint(server.url, key=KEY)
        engine.submit(make_request())
        with pytest.raises(GradretError) as caught:
            engine.collect()
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    shown += [str(caught.value), repr(engine), engine.describe(), engine.identity, caplog.text, *capsys.readouterr()]
    assert len(caplog.text) > 1000
    assert "[key]" in shown[0] and None not in shown
    assert not [line for line in shown if "secret" in line or "very" in line]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_says_what_to_set(status):
    with FaultyServer(models=Answer(status, {"error": {"message": f"bad key {KEY}"}})) as server:
        with pytest.raises(GradretError) as caught:
            endpoint.Endpoint(server.url, key=KEY)
        assert str(caught.value) == (
            f"{server.url}: refuses the key (HTTP {status}: bad key [key]); "
            "put another key into the environment as OPENAI_API_KEY"
        )
        with pytest.raises(GradretError, match="put the server's key into the environment as OPENAI_API_KEY"):
            endpoint.Endpoint(server.url)


def test_a_key_that_can_not_be_sent_is_not_shown():
    with pytest.raises(GradretError, match=r"^OPENAI_API_KEY: expected") as caught:
        endpoint.Endpoint("http://127.0.0.1:1/v1", key="sk-secret\nx")
    assert "secret" not in str(caught.value)


# Finding the server and the model


def test_the_only_model_is_taken_and_several_are_listed():
    with FaultyServer(models=[f"m{i}" for i in range(7)]) as server:
        with pytest.raises(GradretError) as caught:
            endpoint.Endpoint(server.url)
        assert str(caught.value) == (
            f"{server.url}: serves 7 models (m0, m1, m2, m3, m4, ...); choose one with --model"
        )
        engine = endpoint.Endpoint(server.url, model="m3")
        engine.close()
        assert engine.identity == "m3"


@pytest.mark.parametrize("models", [[], Answer(404), Answer(body=b"<html>"), Answer(body={"data": None})])
def test_a_server_without_a_list_needs_the_name(open_endpoint, models):
    with FaultyServer(models=models) as server:
        with pytest.raises(GradretError, match="lists no models; name one with --model"):
            endpoint.Endpoint(server.url)
        assert ask(open_endpoint(server.url, model="big")).text == "say a"
        assert server.requests[0]["model"] == "big"


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_v1_is_added_where_it_is_needed(open_endpoint, tail):
    with FaultyServer() as server:
        assert ask(open_endpoint(server.address + tail)).text == "say a"


def test_a_root_without_v1_is_kept(open_endpoint):
    with FaultyServer(root="/api") as server:
        assert ask(open_endpoint(server.url)).text == "say a"


def test_an_unreachable_server_is_named_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(GradretError) as caught:
        endpoint.Endpoint(f"http://user:{KEY.replace('/', '')}@127.0.0.1:{port}/v1")
    assert str(caught.value) == (
        f"http://127.0.0.1:{port}/v1: can not be reached (All connection attempts failed); "
        "is the server running, and is the URL the protocol's root, which usually ends in /v1?"
    )


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(endpoint, "CHECK_TIMEOUT_S", 0.2)
    with FaultyServer(models=Answer(503, {"error": {"message": "Loading model"}})) as server:
        with pytest.raises(GradretError, match=r"can not be reached \(HTTP 503: Loading model\)"):
            endpoint.Endpoint(server.url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(GradretError, match=r"can not be reached \(no answer within 0.2 s\)"):
            endpoint.Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", "http://[::/v1", ""])
def test_what_is_no_url(url):
    with pytest.raises(GradretError, match=r"not a server's URL; expected http://HOST:PORT/v1$"):
        endpoint.Endpoint(url)


def test_a_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(GradretError, match=r"needs the openai package: pip install 'gradret\[gen\]'$"):
        endpoint.Endpoint("http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("served", "name"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("gpt-5", "gpt-5"),
        ("/models/tiny.gguf", "tiny.gguf"),
        ("/models/qwen", "qwen"),
        ("models/tiny.gguf", "tiny.gguf"),
        ("C:\\models\\tiny.gguf", "tiny.gguf"),
    ],
)
def test_a_model_is_named_without_directories(served, name):
    assert name_model(served) == name


# A real server


def test_a_real_server_writes_in_the_form_and_judges(open_endpoint, real_server, capsys):
    engine = open_endpoint(real_server, concurrency=3)
    assert engine.identity == "tiny.gguf"
    replies = run_all(engine, [make_request(i, seed=i, form=FORM) for i in range(3)])
    assert {r.request.key: r.finish for r in replies} == dict.fromkeys(range(3), "stop")
    for reply in replies:
        assert list(json.loads(reply.text)) == ["grade_1", "grade_0"]
        assert reply.tokens > 0 and reply.prompt_tokens > 0
    assert len({r.text for r in replies}) == 3
    assert "so json_object with a schema asks for the form" in capsys.readouterr().err
    judged = ask(engine, make_request(choices=LABELS))
    assert judged.finish == "stop", judged.error
    assert sum(judged.probabilities.values()) == pytest.approx(1)
    assert sum(p > 0 for p in judged.probabilities.values()) > 1
