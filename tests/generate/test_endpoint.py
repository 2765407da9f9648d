import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import permutations

import pytest
from faulty_server import Answer, FaultyServer, make_completion, make_logprobs
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("openai")

from gradret.console import GradretError
from gradret.generate import endpoint
from gradret.generate.endpoint import (
    CERTIFICATES,
    PROXIES,
    Endpoint,
    Failure,
    find_refused,
    make_reply,
    name_model,
    read_completion,
    read_error,
    ways_to_ask,
)
from gradret.generate.engine import Form, Reply, Request

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
    """The client's pause before it tries again is short, and the environment has no say."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    for name in {name for name in os.environ if name.upper() in (*PROXIES, *CERTIFICATES)} | {"OPENAI_API_KEY"}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    """A scripted server, and an engine that asks it."""
    with ExitStack() as stack:

        def serve_one(script=(), *, models=("tiny",), delay_s=0.0, **options) -> tuple[FaultyServer, Endpoint]:
            server = stack.enter_context(FaultyServer(script, models=models, delay_s=delay_s))
            engine = Endpoint(server.url, **options)
            stack.callback(engine.close)
            return server, engine

        yield serve_one


def make_request(key="a", **options) -> Request:
    messages = ({"role": "system", "content": "Answer."}, {"role": "user", "content": f"say {key}"})
    return Request(key, messages, 1 if options.get("choices") else 50, **options)


def run_all(engine: Endpoint, requests: list[Request]) -> list[Reply]:
    """Every reply, as the generator asks for them."""
    replies, waiting = [], list(requests)
    while True:
        while waiting and engine.free:
            engine.submit(waiting.pop(0))
        ready = engine.collect()
        if not ready:
            return replies
        replies += ready


def ask(engine: Endpoint, request: Request | None = None) -> Reply:
    (reply,) = run_all(engine, [request or make_request()])
    return reply


def fail(status: int, message: str) -> Answer:
    return Answer(status, {"error": {"message": message}})


# What goes out and what comes back


def test_replies_belong_to_their_requests_and_the_bound_holds(serve):
    server, engine = serve(concurrency=5, delay_s=0.02)
    assert (engine.free, engine.identity, engine.collect()) == (5, "tiny", [])
    replies = run_all(engine, [make_request(i) for i in range(40)])
    assert {r.request.key: r.text for r in replies} == {i: f"say {i}" for i in range(40)}
    assert {(r.finish, r.tokens, r.prompt_tokens, r.error) for r in replies} == {("stop", 3, 7, None)}
    assert 1 < server.most_at_once <= 5
    engine.submit(make_request())
    assert engine.free == 4
    assert len(engine.collect()) == 1
    assert engine.free == 5
    assert engine.describe() == f"tiny at {server.url}, 5 requests at once"


def test_a_request_is_said_in_full(serve):
    options = {"chat_template_kwargs": {"enable_thinking": False}, "top_p": 0.5}
    server, engine = serve(temperature=0.7, top_p=0.9, request_options=options)
    ask(engine, make_request(seed=2**40 + 5, form=FORM))
    ask(engine, make_request(choices=LABELS))
    written, judged = server.requests
    assert written["messages"] == list(make_request().messages)
    format = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": FORM.schema}}
    expected = {"model": "tiny", "max_tokens": 50, "seed": 5, "temperature": 0.7, "response_format": format, **options}
    assert {k: v for k, v in written.items() if k not in ("messages", "headers")} == expected
    assert (judged["max_tokens"], judged["temperature"], judged["logprobs"], judged["top_logprobs"]) == (1, 0, True, 20)
    assert "response_format" not in judged
    assert written["headers"]["authorization"] == "Bearer none"


def read(body, request, warn=lambda line: None) -> Reply:
    return make_reply(request, read_completion(json.dumps(body).encode()), warn)


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
        ({"content": None, "refusal": "I cannot"}, "stop", ("I cannot", "stop")),
        ({"content": [{"type": "thinking"}, {"type": "text", "text": "a"}, {"text": "b"}]}, "stop", ("ab", "stop")),
        ({"content": "half \ud800"}, "stop", ("half ?", "stop")),
        ({"content": "bad"}, "content_filter", ("bad", "refused")),
    ],
)
def test_texts_are_read_from_every_kind_of_message(message, finish, expected):
    reply = read(
        {"choices": [{"message": message, "finish_reason": finish}], "usage": None}, make_request(), pytest.fail
    )
    assert (reply.text, reply.finish, reply.tokens) == (*expected, 0)


NAMES = ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "usage", "error"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(LABELS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
)


@given(body=st.dictionaries(st.sampled_from(["choices", "usage", "error"]), JSON), choice=JSON, judge=st.booleans())
def test_no_body_breaks_the_reader(body, choice, judge):
    request = make_request(choices=LABELS if judge else ())
    for candidate in (body, {**body, "choices": [choice]}, {"choices": [{"message": {}, "logprobs": choice}]}):
        try:
            reply = read(candidate, request)
        except ValueError as error:
            assert str(error).startswith(("no reply, but ", "a reply without content"))
        else:
            assert reply.finish in ("stop", "length", "refused")
            assert not reply.probabilities or sum(reply.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long", ""),
        ('{"error": {"message": "too long", "param": "seed"}}', "too long", "seed"),
        ('[{"error": {"message": "too long", "param": null}}]', "too long", ""),
        (
            '{"error": {"message": "Provider error", "metadata": {"raw": "{\\"error\\": \\"too long\\"}"}}}',
            "too long",
            "",
        ),
        ('{"error": {"message": "too long", "metadata": {"raw": null}}}', "too long", ""),
        ('{"error": "too long"}', "too long", ""),
        ('{"object": "error", "message": "too long"}', "too long", ""),
        ('{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]', ""),
        ("<html>too long", "<html>too long", ""),
        ("", "", ""),
        ("3", "3", ""),
    ],
)
def test_error_messages_are_found_in_their_usual_places(body, message, field):
    assert read_error(body) == (message, field)


# Trying again


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(429), "HTTP 429: status 429"),
        (Answer(500), "HTTP 500: status 500"),
        (Answer(503, b"<html>\nbusy"), "HTTP 503: <html> busy"),
        (Answer(408), "HTTP 408: "),
        (Answer(body=b"<html>no"), "no JSON, but <html>no"),
        (Answer(body=b"\xff\xfe{"), "no JSON, but "),
        (Answer(body=b"[" * 50_000), "no JSON, but [[["),
        (Answer(body=b""), "no JSON, but "),
        (Answer(body=[1, 2]), "no reply, but [1, 2]"),
        (Answer(body={"choices": []}), "no reply, but {"),
        (Answer(body={"choices": None, "usage": None}), "no reply, but {"),
        (Answer(body={"error": {"message": "overloaded"}}), "no reply, but overloaded"),
        (Answer(body=make_completion(None)), "a reply without content"),
        (Answer(body=b"xxxx", headers={"Content-Encoding": "gzip"}), ""),
        (Answer(body=make_completion("half a reply"), half=True), ""),
        (Answer(500, half=True), ""),
        (Answer(302, headers={"Location": "http://127.0.0.1:1/"}), "All connection attempts failed"),
    ],
    ids=lambda a: f"{a.status}-{str(a.body)[:20]}{'-half' * a.half}" if isinstance(a, Answer) else "",
)
def test_what_passes_is_tried_again_and_ends_as_an_error(serve, answer, told):
    server, engine = serve([answer, None, answer, answer], retries=1)
    assert (ask(engine).text, len(server.requests)) == ("say a", 2)
    reply = ask(engine)
    assert (reply.finish, reply.text, len(server.requests)) == ("error", "", 4)
    assert reply.error.startswith(told) and reply.error.endswith(" (after 2 tries)")
    assert "\n" not in reply.error and len(reply.error) < 260


@pytest.mark.parametrize("answer", [Answer(wait_s=60), Answer(body=make_completion("x" * 999), drip_s=0.05)])
def test_a_try_has_a_deadline_however_the_server_stalls(serve, answer):
    """The client's own timeout would start anew with each byte that drips in."""
    _, engine = serve(lambda request: answer, retries=1, timeout=0.3)
    assert ask(engine).error == "no answer within 0.3 s (after 2 tries)"


def test_a_days_quota_is_not_waited_for(serve):
    _, engine = serve([Answer(429, headers={"Retry-After": "86400"})])
    reply = ask(engine)
    assert (reply.finish, reply.error) == ("error", "HTTP 429: status 429")


# What ends a run, and what does not


def test_a_server_that_goes_away_ends_the_run_after_all_replies(serve):
    taken = iter([None] * 7)
    server, engine = serve(lambda request: next(taken, Answer(503)), concurrency=4, retries=0)
    got = run_all(engine, [make_request(i) for i in range(6)])
    engine.submit(make_request("last"))
    with pytest.raises(GradretError) as caught:
        while True:
            while engine.free:
                engine.submit(make_request("lost"))
            got += engine.collect()
    counts = Counter(r.finish for r in got)
    assert counts["stop"] == 7 and counts["error"] >= 8
    assert re.match(rf"{server.url}: \d+ requests in a row failed \(last: HTTP 503", str(caught.value))
    assert str(caught.value).endswith("); what is written is kept, run the same command again to go on")


def test_scattered_errors_do_not_end_a_run(serve):
    _, engine = serve(lambda request: Answer(500) if request["seed"] % 3 else None, concurrency=1, retries=0)
    replies = run_all(engine, [make_request(i, seed=i) for i in range(30)])
    assert {r.request.key for r in replies if r.finish == "error"} == {i for i in range(30) if i % 3}


def test_a_refusal_is_final_once_another_request_was_taken(serve):
    """The next one in a row is not: the fault may lie in what all share, such as an account without credit."""
    long = fail(400, "context too long")
    server, engine = serve([long, None, long, Answer(413), Answer(422)])
    replies = [ask(engine) for _ in range(5)]
    assert [r.finish for r in replies] == ["error", "stop", "refused", "error", "error"]
    assert replies[2].error == "HTTP 400: context too long"
    assert len(server.requests) == 5


def test_a_server_that_refuses_everything_ends_the_run(serve):
    _, engine = serve(lambda request: fail(400, "no temperature"), concurrency=2)
    told = (
        r"[89] requests in a row failed \(last: HTTP 400: no temperature\); .* mend the request options or the model$"
    )
    with pytest.raises(GradretError, match=told):
        run_all(engine, [make_request(i, form=FORM) for i in range(30)])


def test_a_403_is_of_one_request_once_another_was_taken(serve):
    moderated = fail(403, "Your input was flagged")
    server, engine = serve([None, moderated, None])
    replies = [ask(engine) for _ in range(3)]
    assert [r.finish for r in replies] == ["stop", "refused", "stop"]
    assert (replies[1].error, len(server.requests)) == ("HTTP 403: Your input was flagged", 3)
    with pytest.raises(GradretError, match="refuses the key"):
        ask(serve([moderated])[1])


@pytest.mark.parametrize("status", [402, 404])
def test_what_meets_every_request_ends_the_run_after_what_came(serve, status):
    server, engine = serve([None, fail(status, "no such thing")], model="big", concurrency=1)
    assert ask(engine).text == "say a"
    engine.submit(make_request())
    told = rf"^{server.url}: HTTP {status}: no such thing for model big; check --model and the URL"
    for _ in range(2):
        with pytest.raises(GradretError, match=told):
            engine.collect()
    assert engine.free == 1


def test_close_abandons_what_runs(serve):
    """SIGINT ends collect; what runs then neither keeps the process nor is waited for."""
    code = """
import signal, sys
from gradret.generate.endpoint import Endpoint
from gradret.generate.engine import Request
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have been started without
engine = Endpoint(sys.argv[1])
for i in range(8):
    engine.submit(Request(i, ({"role": "user", "content": "x"},), 5))
try:
    engine.collect()
except KeyboardInterrupt:
    engine.close()
    engine.close()
    print(engine.collect(), engine.free)
"""
    process = None

    def interrupt(request):
        if len(server.requests) == 8:
            process.send_signal(signal.SIGINT)
        return Answer(wait_s=60)

    with FaultyServer(interrupt) as server:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code, server.url], **pipes)
        out, err = process.communicate(timeout=50)
    assert (out, process.returncode) == ("[] 32\n", 0), err
    assert err == ""


# What servers take of the protocol


@pytest.mark.parametrize(
    ("takes_schema", "refusal", "said"),
    [
        (True, Answer(400), "json_object with a schema"),
        (True, fail(500, "body, response_format: literal_error"), "json_object with a schema"),  # llama_cpp.server's
        (False, Answer(422), "nothing"),
        (False, Answer(501), "nothing"),
    ],
)
def test_forms_are_asked_for_as_the_server_takes_them(serve, capsys, takes_schema, refusal, said):
    def script(request):
        asked = request.get("response_format")
        return refusal if asked and not (takes_schema and asked["type"] == "json_object") else None

    server, engine = serve(script, delay_s=0.01, concurrency=4)
    replies = run_all(engine, [make_request(i, form=FORM) for i in range(20)])
    assert {r.request.key: r.text for r in replies} == {i: f"say {i}" for i in range(20)}
    # Only those that began before the first success meet refusals, each once: nobody retries them.
    assert 20 < len(server.requests) <= 20 + 4 * 2
    assert capsys.readouterr().err == (
        f"{server.url}: takes no response_format json_schema, so {said} asks for the form; replies are checked\n"
    )


def test_a_refusal_for_something_else_changes_no_form(serve, capsys):
    def script(request):
        return Answer(400) if "long" in request["messages"][-1]["content"] else None

    server, engine = serve(script)
    finishes = [ask(engine, make_request(k, form=FORM)).finish for k in ("long", "b", "long")]
    assert finishes == ["error", "stop", "refused"]
    assert [r.get("response_format", {}).get("type") for r in server.requests[-2:]] == ["json_schema"] * 2
    assert len(server.requests) == 3 + 1 + 1
    assert capsys.readouterr().err == ""


OPTIONAL = ("seed", "temperature", "top_p", "logprobs", "top_logprobs", "response_format", "max_tokens")
ALL = ("model", "messages", "max_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs", "response_format")
EXTRA = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted", "input": {name: 1 for name in ALL}}


def extra(name: str) -> dict:
    return {"type": EXTRA["type"], "loc": ["body", name], **EXTRA}


def in_place(name: str, message: str) -> Answer:
    return Answer(400, {"error": {"message": message, "type": "invalid_request_error", "param": name, "code": None}})


WORDINGS = {
    "OpenAI": lambda name: in_place(name, f"Unsupported parameter: '{name}' is not supported with this model."),
    "its value": lambda name: in_place(name, f"Unsupported value: '{name}' does not support 0.7 with this model."),
    "param alone": lambda name: in_place(name, "Invalid request"),
    "within it": lambda name: in_place(f"{name}.type", "Invalid request"),
    "OpenAI earlier": lambda name: fail(400, f"Unrecognized request argument supplied: {name}"),
    "a right": lambda name: fail(403, f"You are not allowed to request {name} from this model"),
    "JSON schema": lambda name: fail(400, f"Additional properties are not allowed ('{name}' was unexpected)"),
    "FastAPI": lambda name: Answer(422, {"detail": [extra(name)]}),
    "Mistral": lambda name: Answer(422, {"object": "error", "message": {"detail": [extra(name)]}}),
    "vLLM": lambda name: Answer(400, {"object": "error", "message": str([extra(name)]), "param": None}),
    "pydantic": lambda name: fail(400, f"1 validation error for Chat\n{name}\n  Extra [input_value={EXTRA}]"),
    "Gemini": lambda name: Answer(400, [{"error": {"message": f'Unknown name "{name}": Cannot find field.'}}]),
    "LiteLLM": lambda name: fail(
        400, f"litellm.UnsupportedParamsError: bedrock does not support parameters: ['{name}'], for model=x. Drop them."
    ),
    "Bedrock": lambda name: fail(400, f"Malformed input request: #: extraneous key [{name}] is not permitted"),
    "llama.cpp": lambda name: fail(500, f"Unsupported param: {name}"),
    "Ollama": lambda name: fail(400, f"cannot unmarshal number into Go struct field ChatCompletionRequest.{name}"),
    "OpenRouter": lambda name: Answer(
        400,
        {
            "error": {
                "message": "Provider returned error",
                "metadata": {"raw": f'{{"error": "{name} is not supported"}}'},
            }
        },
    ),
    "others after it": lambda name: fail(400, f"unknown field `{name}`, expected one of {', '.join(ALL)}"),
    "words": lambda name: fail(400, f"this model takes no {name.replace('_', ' ')}."),
}


def refuse(names, wording):
    """A script of a server that refuses the first of some fields that it is sent."""
    return lambda request: next((WORDINGS[wording](name) for name in names if name in request), None)


def ask_both(engine: Endpoint) -> None:
    """One reply to write and one to judge."""
    judge = replace(make_request(choices=LABELS), messages=({"role": "user", "content": "2"},))
    assert [ask(engine, request).finish for request in (make_request(form=FORM), judge)] == ["stop", "stop"]


@pytest.mark.parametrize("wording", WORDINGS)
def test_what_a_refusal_names_is_left_out_however_it_is_worded(serve, wording, capsys):
    named = wording not in ("param alone", "within it", "Ollama")  # else it may be the number of tokens
    server, engine = serve(refuse(OPTIONAL if named else OPTIONAL[:-1], wording))
    for _ in range(2):
        ask_both(engine)
    # Of a form and of logprobs there are three ways, of the others two.
    assert len(server.requests) == 4 + (1 + 1 + 1 + 2 + named) + (1 + 2)
    for request in server.requests[-2:]:
        assert set(request) == {"model", "messages", "max_completion_tokens" if named else "max_tokens", "headers"}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(set(told)) == 6 + named
    names = ("seed", "temperature 0.8", "top_p 0.95", "logprobs", "response_format", "temperature 0")
    for name in (*names, *["max_tokens"] * named):
        assert [line for line in told if name in line], name


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("Requested sample logprobs of 20, which is greater than max allowed: 5", "logprobs"),
        ("Logprobs is not enabled for this model", "logprobs"),
        ("This model does not support response format `json_schema`", "response_format"),
        ("generation_config.response_schema: unknown variant", "response_format"),
        ("O-series models don't support temperature=0.7. Only temperature=1 is supported.", "temperature 0.8"),
        ("temperature: range: 0..1", "temperature 0.8"),
        ("JAX does not support per-request seed.", "seed"),
        ("'max_tokens' and 'max_completion_tokens' at the same time is not supported", "max_tokens"),
        ("max_tokens is too large: 8192. This model supports at most 4096 completion tokens", None),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", None),
        ("max_tokens: Maximum is 4096", None),
        ("Please use `max_completion_tokens` in place of max_tokens", "max_tokens"),
        ("Could not finish the message because max_tokens was reached", None),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct is not served", None),
        ("'messages[0].role' does not support 'system' with this model.", "system"),
        ("Only user and assistant roles are supported!", "system"),
        ("The response was filtered. Please change your prompt.", None),
        # Azure, TGI, Anthropic, Groq, xAI, Databricks, LM Studio, mlx_lm
        ("The parameter `max_tokens` is deprecated in favor of max_completion_tokens", "max_tokens"),
        ("This model is not compatible with 'max_tokens'.", "max_tokens"),
        ("max_tokens cannot be used with this model", "max_tokens"),
        ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 12 and 5000 `max_new_tokens`", None),
        ("max_tokens: 9000 > 8192, which is the maximum allowed number of output tokens", None),
        ("`max_tokens` must be less than or equal to `8192`, the maximum value", None),
        ("Input validation error: `top_p` must be > 0.0 and < 1.0", "top_p 0.95"),
        ("Model grok-4 does not support parameter topP.", "top_p 0.95"),
        ('Bad request: json: unknown field "seed"', "seed"),
        ("logprobs must be between 1 and 10 but got 20", "logprobs"),
        ("JSON mode is not enabled for this model", "response_format"),
        ("'response_format.type' must be 'json_schema' or 'text'", "response_format"),
        ("Role 'system' is not supported", "system"),
        ("Invalid value: 'system'. Supported values are: 'user' and 'assistant'.", "system"),
        ('messages: Unexpected role "system".', "system"),
    ],
)
def test_what_a_refusal_names(message, name):
    ways = {}
    for request in (make_request(choices=LABELS), make_request(form=FORM)):
        ways |= ways_to_ask(request, {"temperature": 0.8, "top_p": 0.95})
    del ways["temperature 0"]
    assert find_refused(Failure(400, message, 1), {n: ways[n][0][0] for n in ways}) == name


def test_any_two_are_left_out_and_nothing_else(serve):
    """Once, in whichever order the server finds them."""
    names = []
    server, engine = serve(lambda request: refuse(names, "OpenAI")(request))
    for names[:] in permutations(OPTIONAL, 2):
        server.requests.clear()
        engine._ways.clear()
        engine._proven.clear()
        engine._proven_ways.clear()
        ask_both(engine)
        ask_both(engine)
        written, judged = server.requests[-2:]
        capped = "max_completion_tokens" if "max_tokens" in names else "max_tokens"
        common = {"model", "messages", "headers", "seed", "temperature", capped}
        logprobs = {"logprobs", "top_logprobs"}
        assert set(written) == (common | {"top_p", "response_format"}) - set(names), names
        assert set(judged) == (common | logprobs.difference(logprobs if logprobs & set(names) else ())) - set(names)
        assert len(server.requests) <= 4 + 2 * 3


def test_a_fixed_temperature_is_left_out_where_it_is_another(serve, capsys):
    """Only the judge asks for 0."""

    def script(request):
        value = request.get("temperature", 1)
        told = f"'temperature' does not support {value} with this model. Only the default (1) value is supported."
        return in_place("temperature", f"Unsupported value: {told}") if value != 1 else None

    server, engine = serve(script, temperature=1.0)
    for _ in range(2):
        ask_both(engine)
    assert [r.get("temperature") for r in server.requests] == [1, 0, None, 1, None]
    assert "takes no temperature 0, which is left to the server\n" in capsys.readouterr().err


def test_of_temperature_and_top_p_the_first_is_kept_where_a_server_takes_one(serve):
    both = fail(400, "`temperature` and `top_p` cannot both be specified for this model. Please use only one.")
    server, engine = serve(lambda request: both if {"temperature", "top_p"} <= set(request) else None)
    assert ask(engine).finish == "stop"
    assert (server.requests[-1]["temperature"], len(server.requests)) == (0.8, 2)


@pytest.mark.parametrize(
    "refusal",
    [
        fail(400, "The prompt was filtered: 'what is the temperature of a seed at top p'"),
        fail(400, "'max_tokens' or 'max_completion_tokens' is too large: 50. The maximum context length is 40."),
        fail(400, "This model's maximum context length is 40 tokens, you asked for max_tokens=50; reduce it."),
        Answer(422, {"detail": [{"loc": ["body"], "msg": "Value error", "input": dict.fromkeys(ALL, 1)}]}),
        fail(403, "You may not ask for a response_format about this"),
    ],
)
def test_a_refusal_for_what_a_request_says_costs_no_field(serve, refusal, capsys):
    server, engine = serve(lambda request: refusal if "long" in request["messages"][-1]["content"] else None)
    finishes = [ask(engine, make_request(key, form=FORM)).finish for key in ("long", "b", "long", "c")]
    assert finishes == ["error", "stop", "refused", "stop"]
    assert set(server.requests[-1]) == set(server.requests[0])
    assert len(server.requests) < 16
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "message",
    [
        "Prompt injection detected: the input tries to override the system prompt",
        "Request blocked: 'how to sterilise seed at high temperature'",
    ],
)
def test_a_field_that_was_taken_is_not_given_up_for_what_one_request_says(serve, message, capsys):
    server, engine = serve([None, fail(400, message)])
    assert [ask(engine).finish for _ in range(3)] == ["stop"] * 3
    first, refused, again, last = server.requests
    assert again != refused == first == last
    assert capsys.readouterr().err == ""


def test_a_model_named_after_a_field_is_none(serve):
    _, engine = serve([fail(500, "bytedance/seed-oss-36b is busy")], model="bytedance/seed-oss-36b")
    assert ask(engine).finish == "stop"  # asked again as it was


def test_fields_of_null_are_not_sent(serve):
    null = dict.fromkeys(["seed", "max_tokens", "logprobs", "top_logprobs", "response_format", "stop"])
    server, engine = serve(request_options={**null, "min_p": 0.1}, temperature=0.5)
    ask_both(engine)
    assert [sorted(r) for r in server.requests] == [
        ["headers", "messages", "min_p", "model", "temperature", "top_p"],
        ["headers", "messages", "min_p", "model", "temperature"],
    ]


def test_a_refused_option_of_the_user_stays(serve):
    """Nobody leaves out what was asked for in so many words."""
    refusal = WORDINGS["OpenAI"]("response_format")
    server, engine = serve(lambda _: refusal, request_options={"response_format": {"type": "text"}})
    reply = ask(engine, make_request(form=FORM))
    assert (reply.finish, reply.lasting, len(server.requests)) == ("error", True, 1)


@pytest.mark.parametrize("told", ["System role not supported", "Conversation roles must alternate user/assistant"])
def test_a_system_message_stands_before_the_question_where_the_server_takes_none(serve, told, capsys):
    server, engine = serve(lambda request: fail(400, told) if request["messages"][0]["role"] == "system" else None)
    for _ in range(2):
        assert ask(engine).text == "Answer.\n\nsay a"
    assert [m["role"] for m in server.requests[-1]["messages"]] == ["user"]
    assert len(server.requests) == 3
    assert capsys.readouterr().err.count("takes no system message") == 1


def test_the_urls_query_goes_with_each_request():
    with FaultyServer(root="/azure") as server:
        seen, send = [], server._chat
        server._chat = lambda path, *rest: seen.append(path) or send(path.partition("?")[0], *rest)
        engine = Endpoint(f"{server.url}?api-version=2024-10-21&a=&a=b%20c", model="m")
        assert ask(engine).text == "say a"
        engine.close()
    assert seen == ["/azure/chat/completions?api-version=2024-10-21&a=&a=b+c"]
    assert engine.describe() == f"m at {server.url}, 32 requests at once"


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"])
@pytest.mark.parametrize(
    "value", ["socks://127.0.0.1:7890", "socks5://127.0.0.1:1", "http://user:pass#x@h:1", "\udcff"]
)
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(GradretError) as caught:
        Endpoint("http://127.0.0.1:1/v1", retries=0)
    assert "\n" not in str(caught.value) and "pass" not in str(caught.value)
    assert f"; the environment sets {name})" in str(caught.value)


def test_a_proxy_that_is_not_there_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "http://[")
    with (
        FaultyServer() as server,
        pytest.raises(GradretError, match="sets (HTTP_PROXY, NO|NO_PROXY, HTTP)_PROXY\\); is"),
    ):
        Endpoint(server.url, retries=0)


@pytest.mark.parametrize("made", [True, False])
def test_certificates_that_cannot_be_read_are_named(monkeypatch, tmp_path, made):
    path = tmp_path / "certificates.pem"
    if made:
        path.write_text("none\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(GradretError, match=r"no HTTP client can be made \(.*; the environment sets SSL_CERT_FILE\)$"):
        Endpoint("http://127.0.0.1:1/v1")


# The judge


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"3": math.log(0.6), " 3": math.log(0.1), "1": math.log(0.1), "x": math.log(0.1)}, [7 / 8, 0, 1 / 8, 0]),
        ({"2": 0.0, "3": -9999.0}, [0, 1, 0, 0]),
        ({" 0\n": -0.1, "x": -4.0}, [0, 0, 0, 1]),
        ({"2": -1, "3": -(10**400), "1": math.nan, "0": None}, [0, 1, 0, 0]),
    ],
)
def test_judged_probabilities(top, expected):
    body = make_completion("3", logprobs=make_logprobs(next(iter(top)), top))
    reply = read(body, make_request(choices=LABELS), pytest.fail)
    assert list(reply.probabilities) == list(LABELS)
    assert list(reply.probabilities.values()) == pytest.approx(expected)
    assert (reply.finish, reply.tokens) == ("stop", 3)


@pytest.mark.parametrize("most", [5, 0])
def test_fewer_top_logprobs_where_the_server_caps_them(serve, most, capsys):
    def script(request):
        asked = request.get("top_logprobs", 0)
        if asked > most:
            return fail(400, f"top_logprobs must be at most {most}")
        return Answer(body=make_completion("2", logprobs=make_logprobs("2", {"2": -0.1, "x": -4.0}) if asked else None))

    server, engine = serve(script)
    for _ in range(2):
        assert ask(engine, make_request(choices=LABELS)).probabilities == {"3": 0, "2": 1, "1": 0, "0": 0}
    steps = [20, 5] if most else [20, 5, None]
    assert [r.get("top_logprobs") for r in server.requests] == [*steps, steps[-1]]
    warned = f"{server.url}: sends no logprobs; what the judge writes counts as certain\n"
    assert capsys.readouterr().err == ("" if most else warned)


@pytest.mark.parametrize("top", [{}, {"2": -0.9}, None])
def test_a_log_probability_of_the_written_token_alone_is_told(serve, capsys, top):
    logprobs = make_logprobs("2", top or {})
    logprobs["content"][0]["logprob"] = -0.9
    if top is None:
        logprobs["content"][0]["top_logprobs"] = None
    server, engine = serve(lambda request: Answer(body=make_completion("2", logprobs=logprobs)))
    for _ in range(2):
        assert ask(engine, make_request(choices=LABELS)).probabilities == {"3": 0, "2": 1, "1": 0, "0": 0}
    warned = "sends logprobs of the written token alone; what the judge writes counts as certain"
    assert capsys.readouterr().err == f"{server.url}: {warned}\n"


@pytest.mark.parametrize(
    ("text", "logprobs", "error"),
    [
        ("two", None, "none of 3, 2, 1, 0 was written; 'two' was"),
        ("It is " * 99, None, f"none of 3, 2, 1, 0 was written; '{('It is ' * 10)[:57]}...' was"),
        (
            "The",
            make_logprobs("The", {"The": -0.1, "A": -2.0}),
            "none of 3, 2, 1, 0 is among the 2 likeliest tokens; the likeliest is 'The'",
        ),
    ],
)
def test_a_judge_that_names_no_label_refuses(text, logprobs, error):
    reply = read(make_completion(text, logprobs=logprobs), make_request(choices=LABELS))
    assert (reply.finish, reply.probabilities, reply.error) == ("refused", None, error)


# The key


def test_the_key_is_sent_and_never_shown(serve, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    echo = f"got Authorization: Bearer {KEY}"
    forms = [{"error": {"message": echo}}, {"error": echo}, echo, {"odd": {"key": KEY}}, {"detail": "x" * 190 + KEY}]
    bodies = [*forms, f"<b>{KEY}</b>".encode(), json.dumps({"odd": KEY}).replace("/", "\\/").encode()]
    answers = [Answer(status, body) for body in bodies for status in (500, 200, 400)]
    server, engine = serve([*answers, Answer(401, {"error": echo})], retries=0)
    shown = [ask(engine).error for _ in answers]
    assert {r["headers"]["authorization"] for r in server.requests} == {f"Bearer {KEY}"}
    engine._failed_in_a_row.clear()
    engine.submit(make_request())
    with pytest.raises(GradretError) as caught:
        engine.collect()
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    shown += [str(caught.value), repr(engine), engine.describe(), engine.identity, caplog.text, *capsys.readouterr()]
    assert len(caplog.text) > 1000
    assert "[key]" in shown[0] and None not in shown
    assert not [line for line in shown if "secret" in line or "very" in line]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_says_what_to_set(serve, status):
    with FaultyServer(models=fail(status, f"bad key {KEY}")) as server:
        with pytest.raises(GradretError) as caught:
            Endpoint(server.url, key=KEY)
        assert str(caught.value) == (
            f"{server.url}: refuses the key (HTTP {status}: bad key [key]); "
            "put another key into the environment as OPENAI_API_KEY"
        )
        with pytest.raises(GradretError, match="put the server's key into the environment as OPENAI_API_KEY"):
            Endpoint(server.url)


def test_a_key_that_cannot_be_sent_is_not_shown():
    with pytest.raises(GradretError, match=r"^OPENAI_API_KEY: expected") as caught:
        Endpoint("http://127.0.0.1:1/v1", key="sk-secret\nx")
    assert "secret" not in str(caught.value)


# Finding the server and the model


def test_the_only_model_is_taken_and_several_are_listed(serve):
    with FaultyServer(models=[f"m{i}" for i in range(7)]) as server:
        with pytest.raises(GradretError) as caught:
            Endpoint(server.url)
    assert str(caught.value) == f"{server.url}: serves 7 models (m0, m1, m2, m3, m4, ...); choose one with --model"
    assert serve(models=["m2", "m3"], model="m3")[1].identity == "m3"


@pytest.mark.parametrize("models", [[], Answer(404), Answer(body=b"<html>"), Answer(body={"data": None})])
def test_a_server_without_a_list_needs_the_name(serve, models):
    with FaultyServer(models=models) as server:
        with pytest.raises(GradretError, match="lists no models; name one with --model"):
            Endpoint(server.url)
    server, engine = serve(models=models, model="big")
    assert (ask(engine).text, server.requests[0]["model"]) == ("say a", "big")


def test_a_server_that_wants_money_before_it_lists_its_models_names_no_model():
    with FaultyServer(models=fail(402, "pay first")) as server:
        with pytest.raises(GradretError) as caught:
            Endpoint(server.url)
    assert str(caught.value).startswith(f"{server.url}: HTTP 402: pay first; check --model and the URL; ")


@pytest.mark.parametrize(
    ("root", "tail"), [("/v1", ""), ("/v1", "/"), ("/v1", "/v1"), ("/v1", "/v1/"), ("/api", "/api")]
)
def test_v1_is_added_where_it_is_needed(root, tail):
    with FaultyServer(root=root) as server:
        engine = Endpoint(server.address + tail)
        assert ask(engine).text == "say a"
        engine.close()


def test_an_unreachable_server_is_named_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(GradretError) as caught:
        Endpoint(f"http://user:{KEY.replace('/', '')}@127.0.0.1:{port}/v1")
    assert str(caught.value) == (
        f"http://127.0.0.1:{port}/v1: cannot be reached (All connection attempts failed (after 3 tries)); "
        "is the server running, and is the URL the protocol's root, which usually ends in /v1?"
    )


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(endpoint, "CHECK_TIMEOUT_S", 0.2)
    with FaultyServer(models=fail(503, "Loading model")) as server:
        with pytest.raises(GradretError, match=r"cannot be reached \(HTTP 503: Loading model \(after 3 tries\)\)"):
            Endpoint(server.url)
        with pytest.raises(GradretError, match=r"cannot be reached \(HTTP 503: Loading model\); is the server"):
            Endpoint(server.url, retries=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(GradretError, match=r"cannot be reached \(no answer within 0.2 s \(after 3 tries\)\)"):
            Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", "http://[::/v1", ""])
def test_what_is_no_url(url):
    with pytest.raises(GradretError, match=r"not a server's URL; expected http://HOST:PORT/v1$"):
        Endpoint(url)


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


def test_a_real_server_writes_in_the_form_and_judges(real_server, capsys):
    engine = Endpoint(real_server, concurrency=3)
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
    engine.close()
