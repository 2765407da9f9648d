"""An engine that asks any server of OpenAI's chat protocol, many requests at once."""

import asyncio
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlsplit

from gradret.console import GradretError, needing, say
from gradret.generate.engine import Reply, Request
from gradret.generate.replies import quote_reply

with needing("gen --endpoint", "openai", "gen", "openai", "httpx2"):
    import httpx2
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"  # local servers want none, but the client insists on one
CONNECT_TIMEOUT_S = 20
CHECK_TIMEOUT_S, CHECK_RETRIES = 5, 2  # a server that has not listed its models by then counts as out of reach
PASSING = {408, 409, 425, 429}  # and nearly all from 500 on: the next run may not meet them
REFUSED = {400, 413, 422, 501}  # this request, not every request
REFUSED_BY_NAME = {403, 500}  # in which some answer what others do with 400: OpenAI of logprobs, llama_cpp.server
LEAST_LOGPROB = -9999.0  # what vLLM and llama.cpp send for a token that cannot be
MOST_SHOWN = 200  # characters of a server's message
# How refusals name what a request asks for, see ways_to_ask; no model's name, such as bytedance/seed-oss.
NAMES = {
    name: re.compile(rf"(?<![\w-])(?:{pattern})(?![\w/-])", re.IGNORECASE)
    for name, pattern in {
        "seed": "seed",
        "top_p": "top[ _-]?p",
        "temperature": "temperature",
        "logprobs": "(?:top|response)?[ _-]?log[ _-]?prob(?:s|abilities)",
        "response_format": "response[ _-]?(?:format|schema)|json[ _](?:schema|object|mode)|structured[ _]outputs?",
        "max_tokens": "max[ _-]?(?:output[ _-]?)?tokens",
        "system": r"system (?:role|message|instruction|prompt)s?|developer instruction|roles must alternate|"
        r"assistant roles|messages\[0\]\.role|[\"'`]system[\"'`]",
    }.items()
}
# From here on a refusal repeats what it was sent, as pydantic's do.
ECHO = re.compile(r"""["']input\\?["']\s*:|\binput_value=""")
# What refuses the name max_tokens. All else refuses the number, which under another name would be refused again.
NOT_TAKEN = re.compile(
    r"un(?:supported|known|expected|recogni[sz]ed)|\bextra|takes no|\buse\W+max_completion_tokens|deprecated|replaced|"
    r"(?:\b(?:can)?not|n't|no longer) (?:be )?(?:support|permitted|allowed|accepted|recogni[sz]ed|compatible|used)",
    re.IGNORECASE,
)
# How a server is reached and known, which the client reads from the environment.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
ADVICE = "is the server running, and is the URL the protocol's root, which usually ends in /v1?"
KEPT = "what is written is kept, run the same command again to go on"
REFUSED_ALL = "what is written is kept, mend the request options or the model"


def refuses_request(status: int, message: str) -> bool:
    """Whether a server will never take a request."""
    return status in REFUSED or (status in REFUSED_BY_NAME and any(name.search(message) for name in NAMES.values()))


class PatientClient(openai.DefaultAsyncHttpxClient):
    """The openai client's transport, with three things put right, so that the client retries what it should.

    The client's timeout starts anew with each byte: here it is the deadline of a whole try. It takes any body for an
    answer: here one without a reply counts as a broken connection. It repeats every 5xx: here not those that are
    refusals.
    """

    async def send(self, request, **options):
        deadline_s = request.extensions["timeout"]["read"]
        try:
            response = await asyncio.wait_for(super().send(request, **options), deadline_s)
        except asyncio.TimeoutError:
            raise httpx2.ReadTimeout(f"no answer within {deadline_s:g} s", request=request) from None
        if refuses_request(response.status_code, response.text):
            response.headers["x-should-retry"] = "false"
        elif response.status_code == 200 and request.url.path.endswith("/chat/completions"):
            try:
                read_completion(response.content)
            except ValueError as error:
                raise httpx2.RemoteProtocolError(str(error), request=request) from None
        return response


@dataclass(frozen=True)
class Failure:
    """Why a request brought no answer.

    Attributes:
        status: of HTTP; None when no answer came, or one that is none.
        message: the server's. It may quote what it was sent, the key included: only Endpoint._tell may show it.
        tries: how often the client asked.
        field: of the request, which the server names as the one at fault; "" where it says so in words alone.
    """

    status: int | None
    message: str
    tries: int
    field: str = ""

    @property
    def refused(self) -> bool:
        """Whether the request is at fault."""
        return self.status is not None and refuses_request(self.status, self.message)

    @property
    def passing(self) -> bool:
        """Whether the next run may get an answer."""
        return self.status is None or self.status in PASSING or (self.status >= 500 and not self.refused)


@dataclass(frozen=True)
class Completion:
    """What a server wrote.

    Attributes:
        finish: the protocol's finish_reason.
        logprobs: log-probabilities of the likeliest first tokens; {} where the server sends none.
    """

    text: str
    finish: object
    logprobs: dict[str, float]
    tokens: int
    prompt_tokens: int


def read_completion(content: bytes) -> Completion:
    """A chat completion from an answer's body. Raises: ValueError that says what came instead."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"no JSON, but {content.decode(errors='replace')}") from None
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = read_text(message)
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(f"no reply, but {read_error(content.decode(errors='replace'))[0]}") from None
    logprobs = read_logprobs(choice)
    if text is None and finish != "length" and not thought and not logprobs:
        raise ValueError("a reply without content")
    usage = body.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("completion_tokens", "prompt_tokens")]
    return Completion(text or "", finish, logprobs, *(max(n, 0) if isinstance(n, int) else 0 for n in counts))


def read_text(message: dict) -> str | None:
    """What was written; a refusal that the server sets apart counts as such."""
    content = message.get("content")
    if isinstance(content, list):  # Mistral's: parts, some of them thoughts
        content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    text = content if isinstance(content, str) else message.get("refusal")
    # JSON can hold halves of surrogate pairs, and UTF-8 cannot.
    return text.encode(errors="replace").decode() if isinstance(text, str) else None


def read_logprobs(choice: dict) -> dict[str, float]:
    """Of a choice's first token, see Completion."""
    try:
        first = choice["logprobs"]["content"][0]
        found = {str(e["token"]): e["logprob"] for e in [first, *(first.get("top_logprobs") or ())]}
    except (AttributeError, IndexError, KeyError, TypeError):
        return {}
    # p == p: a NaN counts as not sent.
    return {t: max(min(p, 0.0), LEAST_LOGPROB) for t, p in found.items() if isinstance(p, int | float) and p == p}


def read_error(body: str) -> tuple[str, str]:
    """What the body of an error says, in whichever of the usual places, and the field of the request that it names."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body, ""
    field = ""
    if isinstance(found, list) and len(found) == 1:  # Gemini's
        found = found[0]
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            field = found.get("param") or field
            relayed = found.get("metadata")  # OpenRouter's: what the provider says
            if isinstance(relayed, dict) and isinstance(relayed.get("raw"), str):
                return read_error(relayed["raw"])
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False), str(field)


def make_reply(request: Request, completion: Completion, warn: Callable[[str], None]) -> Reply:
    """The reply to a request. With choices, the probability of each is its tokens' share of all choices' tokens."""
    counts = {"tokens": completion.tokens, "prompt_tokens": completion.prompt_tokens}
    text, logprobs = completion.text, completion.logprobs
    if not request.choices:
        if completion.finish == "content_filter":
            return Reply(request, text, "refused", error="the server's content filter cut the reply off", **counts)
        return Reply(request, text, "length" if completion.finish == "length" else "stop", **counts)
    shares = dict.fromkeys(request.choices, 0.0)
    if logprobs:
        for token, logprob in logprobs.items():
            if token.strip() in shares:  # vocabularies have a token with a space before it and one without
                shares[token.strip()] += math.exp(logprob)
        if len(logprobs) == 1:
            warn("sends logprobs of the written token alone; what the judge writes counts as certain")
        missing = f"is among the {len(logprobs)} likeliest tokens; the likeliest is {max(logprobs, key=logprobs.get)!r}"
    else:
        warn("sends no logprobs; what the judge writes counts as certain")
        shares |= {choice: 1.0 for choice in shares if text.strip(" \n\"'*") == choice}
        missing = f"was written; {quote_reply(text)} was"
    total = sum(shares.values())
    if not total:
        return Reply(request, text, "refused", error=f"none of {', '.join(request.choices)} {missing}", **counts)
    return Reply(request, text, "stop", probabilities={c: p / total for c, p in shares.items()}, **counts)


def kind_of(request: Request) -> str:
    """What a server may take while it refuses the others."""
    return "choices" if request.choices else "form" if request.form and request.form.schema else "text"


Ways = dict[str, list[tuple[dict, str]]]


def ways_to_ask(request: Request, sampling: dict[str, float]) -> Ways:
    """What a request asks for, by name: the arguments that do so, the best first, and what is told of the later ones.

    The cap on tokens is never left out: replies might have no end.
    """
    ways: Ways = {
        "system": [({"messages": request.messages}, "")],
        "seed": [({"seed": request.seed % 2**31}, ""), ({}, "takes no seed: another run will get other replies")],
        "max_tokens": [
            ({"max_tokens": request.max_tokens}, ""),
            ({"max_completion_tokens": request.max_tokens}, "takes max_completion_tokens in place of max_tokens"),
        ],
    }
    if request.messages[0]["role"] == "system":
        system, first, *others = request.messages
        joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        told = "takes no system message, which stands before the first question instead"
        ways["system"].append(({"messages": [joined, *others]}, told))
    for name, value in ({"temperature": 0.0} if request.choices else sampling).items():
        told = f"takes no {name} {value:g}, which is left to the server"
        ways[f"{name} {value:g}"] = [({name: value}, ""), ({}, told)]
    if request.choices:
        counts = [({"logprobs": True, "top_logprobs": most}, "") for most in (20, 5)]
        ways["logprobs"] = [*counts, ({}, "")]  # what then comes is told
    if request.form and request.form.schema:
        schema = request.form.schema
        named = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}
        llama_cpps = {"type": "json_object", "schema": schema}  # and Together's
        told = "takes no response_format json_schema, so {} asks for the form; replies are checked"
        ways["response_format"] = [
            ({"response_format": named}, ""),
            ({"response_format": llama_cpps}, told.format("json_object with a schema")),
            ({}, told.format("nothing")),
        ]
    return ways


def find_refused(refusal: Failure, sent: dict[str, dict]) -> str | None:
    """Which of the things that were asked for a refusal names; the first, as lists of what is supported may follow."""
    text = f"{refusal.field} {ECHO.split(refusal.message)[0]}"
    found = {name: NAMES[name.split()[0]].search(text) for name, arguments in sent.items() if arguments}
    places = {name: match.start() for name, match in found.items() if match}
    if not NOT_TAKEN.search(text):
        places.pop("max_tokens", None)
    first = min(places, key=places.__getitem__, default="")
    if first.startswith("temperature"):  # Anthropic's models take one of the two, and temperature says more
        return next((name for name in places if name.startswith("top_p")), first)
    return first or None


def check_url(url: str) -> str:
    """The URL without what may be secret, to show. Raises: GradretError when it is not an HTTP URL."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise GradretError(f"{re.sub('//[^/]*@', '//', url)}: not a server's URL; expected http://HOST:PORT/v1")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def name_model(served: str) -> str:
    """A model's name without the directories of the server's machine."""
    is_path = re.match(r"[/\\.~]|[A-Za-z]:[/\\]", served) or served.lower().endswith(".gguf")
    return re.split(r"[/\\]", served.rstrip("/\\"))[-1] if is_path else served


def name_variables(variables: tuple[str, ...]) -> str:
    """Those that the environment sets, as the end of a message; their values may be secret."""
    found = [name for name in os.environ if name.upper() in variables]
    return f"; the environment sets {', '.join(found)}" if {name.upper() for name in found} - {"NO_PROXY"} else ""


class Endpoint:
    """An engine.Engine over HTTP.

    A try has `timeout` seconds from first to last byte. The openai client repeats it, `retries` times at most, after a
    connection error, a timeout, a body without a reply (see PatientClient), HTTP 408, 409, 429 or 5xx: after 0.5, 1, 2,
    ... 8 s, or what Retry-After says. What then still fails ends as "error", and so do at once HTTP 425 and what
    Retry-After puts off for more than two minutes.

    Some fields of a request are optional, and not every server takes them: what a refusal names, or of a first request
    the form or the probabilities, is asked for in another way or not at all. Where a request then succeeds, all later
    ones are made so, which is told once; where one had succeeded in the way that is refused, only this request is.

    HTTP 400, 413, 422 and 501, 403 and 500 whose message names such a field, a content filter, and a judge's answer
    without a grade refuse one request; so does any 403 once the server has taken a request. "refused" if the server
    took the one of its kind that ended before. Otherwise "error", as the fault may lie in what all requests share.
    After max(8, concurrency) failures in a row collect raises. Any other status would meet every request, and collect
    raises at once.

    Requests run in an event loop in a thread of its own: an interruption of the caller cannot hit the middle of one.

    Args:
        url: the protocol's root, such as http://localhost:8000/v1; /v1 is added where the server needs it. Its query
            goes with each request.
        model: as the server calls it; None for the only one it has.
        concurrency: requests that run at once.
        timeout: seconds that a try may take.
        retries: further tries.
        request_options: go into each request's body as they are, over what stands there; None leaves a field out.
        key: the server's; None for that of the environment. No message shows it.

    Raises: GradretError when the server cannot be reached, refuses the key, or has several models and none is named;
        when the environment names a proxy or certificates that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 600,
        retries: int = 6,
        temperature: float = 0.8,
        top_p: float = 0.95,
        request_options: dict | None = None,
        key: str | None = None,
    ):
        self._url = check_url(url)
        self._key = os.environ.get(KEY_VARIABLE, "").strip() or NO_KEY if key is None else key
        if not (self._key.isascii() and self._key.isprintable()):  # it could not be sent, and the error would show it
            raise GradretError(f"{KEY_VARIABLE}: expected letters, digits and signs, got others; set it again")
        self._model, self._concurrency, self._timeout_s = model, concurrency, timeout
        self._sampling, self._options = {"temperature": temperature, "top_p": top_p}, request_options or {}
        self._ways: Counter[str] = Counter()  # which of ways_to_ask the server takes, by name
        self._proven: set[str] = set()  # kinds of request that the server has taken
        self._proven_ways: set[tuple[str, int]] = set()  # as in _ways
        self._said: set[str] = set()
        self._running: set[Future] = set()
        self._failed_in_a_row: Counter[str] = Counter()  # by kind of request
        self._last_failed: Reply | None = None
        self._end: GradretError | None = None
        self._client = self._open_client(url, retries)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self._model = self._start(self._find_model()).result()
        except BaseException:
            self.close()
            raise
        self.identity = name_model(self._model)

    @property
    def free(self) -> int:
        return self._concurrency - len(self._running)

    def describe(self) -> str:
        return f"{self._model} at {self._url}, {self._concurrency} requests at once"

    def submit(self, request: Request) -> None:
        self._running.add(self._start(self._answer(request)))

    def collect(self) -> list[Reply]:
        replies: list[Reply] = []
        while not replies:
            if not any(future.done() for future in self._running):  # nothing that came is lost to the end of a run
                self._check_end()
            if not self._running:
                break
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                answer = future.result()
                if isinstance(answer, Reply):
                    replies.append(self._count_failures(answer))
                else:
                    self._end = self._make_end(answer)
        return replies

    def close(self) -> None:
        """Abandon what runs, at once."""
        if self._thread.is_alive():
            with suppress(TimeoutError):
                self._start(self._abandon()).result(2)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2)
        self._running = set()

    def _open_client(self, url: str, retries: int) -> openai.AsyncOpenAI:
        parts = urlsplit(url)
        try:
            transport = PatientClient(params=parse_qsl(parts.query, keep_blank_values=True))
            root = parts._replace(query="", fragment="").geturl().rstrip("/")
            return openai.AsyncOpenAI(api_key=self._key, base_url=root, max_retries=retries, http_client=transport)
        except Exception as error:  # whatever it likes, with a part of a URL where a password may stand
            why = "invalid URL" if isinstance(error, httpx2.InvalidURL) else error
            told = name_variables(CERTIFICATES if isinstance(error, OSError) else PROXIES)
            raise GradretError(f"{self._url}: no HTTP client can be made ({why}{told})") from None

    def _start(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _abandon(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _check_end(self) -> None:
        if self._end is not None:
            raise self._end
        failed = max(self._failed_in_a_row.values(), default=0)
        if failed >= max(8, self._concurrency):
            last = self._last_failed
            advice = REFUSED_ALL if last.lasting else KEPT
            raise GradretError(f"{self._url}: {failed} requests in a row failed (last: {last.error}); {advice}")

    def _count_failures(self, reply: Reply) -> Reply:
        kind = kind_of(reply.request)
        if reply.error is None:
            self._failed_in_a_row[kind] = 0
            return reply
        self._failed_in_a_row[kind] += 1
        if reply.finish == "refused" and self._failed_in_a_row[kind] > 1:
            # The second in a row: the fault may lie in what all requests share, such as an account without credit.
            reply = replace(reply, finish="error", lasting=True)
        self._last_failed = reply
        return reply

    async def _call(self, method, timeout_s: float, **arguments) -> bytes | Failure:
        """The body of the server's answer, or why there is none.

        A value, not an exception: those of the client hold the request, and with it the key.
        """
        timeout = openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        try:
            raw = await method(timeout=timeout, **arguments)
        except openai.APIError as error:
            tries = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
            if isinstance(error, openai.APIStatusError):
                message, field = read_error(error.response.text)
                return Failure(error.status_code, message, tries, field)
            return Failure(None, str(error.__cause__) or type(error.__cause__).__name__, tries)
        return raw.http_response.content

    async def _find_model(self) -> str:
        """The model to ask for; the client is set to the root where the server lists its models."""
        names: list[str] | None = None
        url = str(self._client.base_url).rstrip("/")
        for root in [url] if re.search(r"/v\d+$", url) else [url, f"{url}/v1"]:
            client = self._client.with_options(base_url=root)
            names = await self._list_models(client)
            if names is not None:
                self._client = client
                break
        if self._model is not None:
            return self._model
        if not names:
            raise GradretError(f"{self._url}: lists no models; name one with --model ({ADVICE})")
        if len(names) > 1:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise GradretError(f"{self._url}: serves {len(names)} models ({shown}); choose one with --model")
        return names[0]

    async def _list_models(self, client: openai.AsyncOpenAI) -> list[str] | None:
        """None where the server has no such list, or none for this key, of which a model that is named needs none."""
        patient = client.with_options(max_retries=min(CHECK_RETRIES, client.max_retries))
        answer = await self._call(patient.models.with_raw_response.list, CHECK_TIMEOUT_S)
        if isinstance(answer, Failure):
            # A key may be good for completions alone.
            needless = self._model is not None and not answer.passing and answer.status != 401
            if needless or answer.status in (404, 405, 501):
                return None
            if answer.passing:
                told = self._tell(answer) + name_variables(CERTIFICATES if "certificate" in answer.message else PROXIES)
                raise GradretError(f"{self._url}: cannot be reached ({told}); {ADVICE}")
            raise self._make_end(answer)
        try:
            return [entry["id"] for entry in json.loads(answer)["data"] if isinstance(entry["id"], str)]
        except (KeyError, RecursionError, TypeError, ValueError):
            return None

    async def _answer(self, request: Request) -> Reply | Failure:
        """The reply to a request, asked for as strictly as the server takes it; a failure that would meet all."""
        kind, ways, taken = kind_of(request), ways_to_ask(request, self._sampling), Counter(self._ways)
        while True:  # each time some number in `taken` is larger, and none is without end
            sent = {
                name: {k: v for k, v in ways[name][taken[name]][0].items() if k not in self._options} for name in ways
            }
            body = {k: v for arguments in sent.values() for k, v in arguments.items()}
            body["extra_body"] = {k: v for k, v in self._options.items() if v is not None}
            create = self._client.chat.completions.with_raw_response.create
            answer = await self._call(create, self._timeout_s, model=self._model, **body)
            if not isinstance(answer, Failure):
                self._learn(kind, ways, taken)
                return make_reply(request, read_completion(answer), self._say_once)
            if not answer.refused:
                if answer.status == 403 and self._proven:  # the key is good: moderation of what this request says
                    return Reply(request, "", "refused", error=self._tell(answer))
                return Reply(request, "", "error", error=self._tell(answer)) if answer.passing else answer
            if taken != taken | self._ways:
                taken |= self._ways  # which a request that began beside this one has found
                continue
            name = find_refused(answer, sent)
            if name is None and kind not in self._proven:
                name = next((n for n in ("logprobs", "response_format") if sent.get(n)), None)
            if name is None or taken[name] + 1 == len(ways[name]):
                finish, lasting = ("refused", False) if kind in self._proven else ("error", True)
                return Reply(request, "", finish, error=self._tell(answer), lasting=lasting)
            taken[name] += 1

    def _learn(self, kind: str, ways: Ways, taken: Counter[str]) -> None:
        """Keep to the way in which a request succeeded, unless others had succeeded in the present one."""
        self._proven.add(kind)
        for name in ways:
            if taken[name] > self._ways[name] and (name, self._ways[name]) not in self._proven_ways:
                self._ways[name] = taken[name]
                if told := ways[name][taken[name]][1]:
                    self._say_once(told)
            self._proven_ways.add((name, taken[name]))

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(f"{self._url}: {line}")

    def _make_end(self, why: Failure) -> GradretError:
        if why.status in (401, 403):
            which = "the server's key" if self._key == NO_KEY else "another key"
            return GradretError(
                f"{self._url}: refuses the key ({self._tell(why)}); put {which} into the environment as {KEY_VARIABLE}"
            )
        model = f" for model {self._model}" if self._model else ""
        return GradretError(f"{self._url}: {self._tell(why)}{model}; check --model and the URL; {KEPT}")

    def _tell(self, why: Failure) -> str:
        """A failure in one short line. The key is hidden first, in both its spellings, and then the line is cut."""
        text = why.message
        for secret in {self._key, json.dumps(self._key)[1:-1]} - {NO_KEY}:
            text = text.replace(secret, "[key]")
        text = " ".join(text.split())
        text = text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."
        status = f"HTTP {why.status}: " if why.status else ""
        return status + text + (f" (after {why.tries} tries)" if why.tries > 1 else "")
