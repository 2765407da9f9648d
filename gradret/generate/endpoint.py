"""An engine that asks any server of OpenAI's chat protocol: many requests at once, again when a try fails."""

import asyncio
import json
import math
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from time import time
from urllib.parse import urlsplit

from gradret.console import GradretError, say
from gradret.generate.engine import Reply, Request

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"  # local servers want none, but the client insists on one
PASSING = {200, 408, 409, 425, 429}  # and 500 to 599: may be gone the next time (200: a body that is no reply)
REFUSED = {400, 413, 422}  # this request, not every request
FORMATS = ("json_schema", "json_object with a schema", "json_object", None)  # what asks for a form, strictest first
ADVICE = "is the server running, and is the URL the protocol's root, which usually ends in /v1?"
LEAST = -9999.0  # as a log-probability, that of what can not be, in vLLM's and llama.cpp's way
SHOWN = 200  # characters of a server's message,
MOST_SHOWN = 20_000  # of which so many are looked at: whoever sends more is no chat server


class Failure(Exception):
    """One try that brought no reply. The message is the server's, and may hold what it was sent: never show it whole.

    Attributes:
        status: of HTTP; None when nothing answered.
        retry_after_s: that the server asks for; 0 for none.
        passing: another try may succeed.
        refused: for something in the request.
    """

    def __init__(self, status: int | None, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        # llama_cpp.server answers 500 where others answer 400 to what they do not know.
        names_it = status == 500 and re.search("response_format|logprobs", message) is not None
        self.refused = status in REFUSED or status == 501 or names_it
        self.passing = status is None or status in PASSING or (status >= 500 and not self.refused)


@dataclass(frozen=True)
class Dialect:
    """What a server takes of the protocol: the most to begin with, less where it refuses."""

    format: int = 0
    tokens: str = "max_tokens"
    top_logprobs: int = 20

    def step_down(self, request: Request, message: str) -> "Dialect | None":
        """What to try after a refusal; None when less can not be asked for."""
        if "max_completion_tokens" in message and self.tokens == "max_tokens":
            return replace(self, tokens="max_completion_tokens")
        if request.choices and self.top_logprobs:
            return replace(self, top_logprobs=5 if self.top_logprobs > 5 else 0)
        if request.form and not request.choices and FORMATS[self.format]:
            return replace(self, format=self.format + 1)
        return None

    def take_over(self, request: Request, found: "Dialect") -> "Dialect":
        """This dialect with what a request of one kind says about the server."""
        if request.choices:
            return replace(self, tokens=found.tokens, top_logprobs=found.top_logprobs)
        return replace(self, tokens=found.tokens, format=found.format if request.form else self.format)

    def say_request(self, request: Request) -> dict:
        """The arguments of a chat completion, without model and sampling."""
        said: dict = {self.tokens: 1 if request.choices else request.max_tokens, "seed": request.seed % 2**31}
        if request.choices and self.top_logprobs:
            said |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if request.form and not request.choices and FORMATS[self.format]:
            schema = request.form.schema
            said["response_format"] = (
                {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}},
                {"type": "json_object", "schema": schema},  # llama.cpp's and Together's own
                {"type": "json_object"},
            )[self.format]
        return said | {"messages": [{**m, "content": mend_text(m["content"])} for m in request.messages]}


def read_body(content: bytes) -> dict:
    """The JSON object of an answer. Raises: Failure when it is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Failure(200, f"no JSON object, but {content[:MOST_SHOWN].decode(errors='replace')}")
    return body


def read_reply(body: dict, request: Request, warn: Callable[[str], None]) -> Reply:
    """The reply in a chat completion's JSON. Raises: Failure when there is none."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Failure(200, f"no reply, but {read_message(json.dumps(body))}")
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = {"tokens": to_count(usage.get("completion_tokens")), "prompt_tokens": to_count(usage.get("prompt_tokens"))}
    text, finish = read_text(message), choice.get("finish_reason")
    if request.choices:
        return judge_reply(request, text or "", read_logprobs(choice), counts, warn)
    thought = message.get("reasoning_content") or message.get("reasoning")
    if text is None and finish != "length" and not thought:
        raise Failure(200, "a reply without content")
    if finish == "content_filter":
        return Reply(request, text or "", "refused", error="the server's content filter cut the reply off", **counts)
    return Reply(request, text or "", "length" if finish == "length" else "stop", **counts)


def read_text(message: dict) -> str | None:
    """What was written; a refusal that the server sets apart counts as such."""
    content = message.get("content")
    if isinstance(content, list):  # Mistral's: parts, some of them thoughts
        content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    text = content if isinstance(content, str) else message.get("refusal")
    return mend_text(text) if isinstance(text, str) else None


def read_logprobs(choice: dict) -> dict[str, float]:
    """The likeliest first tokens and their log-probabilities; {} where the server sends none."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    if not isinstance(first, dict):
        return {}
    top = first.get("top_logprobs")
    entries = [e for e in [first, *(top if isinstance(top, list) else [])] if isinstance(e, dict)]
    found = {str(e.get("token")): e.get("logprob") for e in entries}
    return {t: max(min(p, 0.0), LEAST) for t, p in found.items() if isinstance(p, int | float) and p == p}


def judge_reply(request: Request, text: str, logprobs: dict[str, float], counts: dict, warn) -> Reply:
    """A reply with the probability of each choice: its tokens' share, with spaces around or none, of all choices'."""
    if logprobs:
        shares = dict.fromkeys(request.choices, 0.0)
        for token, logprob in logprobs.items():
            if token.strip() in shares:
                shares[token.strip()] += math.exp(logprob)
        likeliest = max(logprobs, key=logprobs.__getitem__)
        missing = f"is among the {len(logprobs)} likeliest tokens; the likeliest is {likeliest!r}"
    else:
        warn("sends no probabilities of tokens; what the judge writes counts as certain")
        shares = {c: float(text.strip(" \n\"'*") == c) for c in request.choices}
        missing = f"was written; {text!r} was"
    total = sum(shares.values())
    if not total:
        return Reply(request, text, "refused", error=f"none of {', '.join(request.choices)} {missing}", **counts)
    return Reply(request, text, "stop", probabilities={c: p / total for c, p in shares.items()}, **counts)


def read_message(text: str) -> str:
    """What an error's body says, whichever of the usual forms it has."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def tell_failure(why: Failure, tries: int, secret: str | None) -> str:
    """A failure in one short line; tries: 0 leaves them unsaid. The secret is hidden first, then the line is cut."""
    text = why.message
    for form in {secret, json.dumps(secret)[1:-1]} if secret else ():
        text = text.replace(form, "[key]")
    text = " ".join(text.split())
    text = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    after = "" if not tries else " after 1 try" if tries == 1 else f" after {tries} tries"
    return f"{text}{after}" if why.status is None else f"HTTP {why.status}{after}: {text}"


def read_retry_after(headers) -> float:
    """Seconds that Retry-After asks for, as a number or a date; 0 when it asks for none."""
    value = headers.get("retry-after", "")
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, OverflowError):
            return 0.0
    return max(wait_s, 0.0) if math.isfinite(wait_s) else 0.0


def mend_text(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 can not."""
    return text.encode(errors="replace").decode()


def to_count(value: object) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def check_url(url: str) -> str:
    """The URL without what may be secret, to show.

    Raises: GradretError when it is no HTTP URL.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise GradretError(f"{re.sub('//[^/]*@', '//', url)}: not a server's URL; expected http://HOST:PORT/v1")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def read_models(body: dict) -> list[str] | None:
    """The names in a list of models; None when it is none."""
    data = body.get("data")
    return (
        [m["id"] for m in data if isinstance(m, dict) and isinstance(m.get("id"), str)]
        if isinstance(data, list)
        else None
    )


def choose_model(url: str, names: list[str], wanted: str | None) -> str:
    """The model to ask for. Raises: GradretError when none is wanted and the server has not just one."""
    if wanted is not None:
        return wanted
    if not names:
        raise GradretError(f"{url}: lists no models; name one with --model ({ADVICE})")
    if len(names) > 1:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise GradretError(f"{url}: serves {len(names)} models ({shown}); choose one with --model")
    return names[0]


def name_model(served: str) -> str:
    """A name without the directories of the server's machine."""
    is_path = re.match(r"[/\\.~]|[A-Za-z]:[/\\]", served) or served.lower().endswith(".gguf")
    return re.split(r"[/\\]", served.rstrip("/\\"))[-1] if is_path else served


def read_key() -> str:
    """The server's key, from the environment only; "none" when there is none."""
    return os.environ.get(KEY_VARIABLE, "").strip() or NO_KEY


def kind_of(request: Request) -> str:
    """What a server may take while it refuses the others: "choices", "form" or "text"."""
    return "choices" if request.choices else "form" if request.form else "text"


CHECK_TIMEOUT_S, CHECK_TRIES = 5, 3  # a server that has not listed its models by then counts as out of reach
CONNECT_TIMEOUT_S = 20
FIRST_DELAY_S, MOST_DELAY_S = 0.5, 30.0
MOST_RETRY_AFTER_S = 600.0  # who asks for more (a day's quota) is not waited for
KEPT = "what is written is kept, run the same command again to go on"


class Endpoint:
    """An llm.Engine over HTTP.

    Every try has `timeout_s` from first to last byte. Connection errors, timeouts, HTTP 408, 409, 425, 429 and 5xx,
    and bodies without a reply are tried again up to `retries` times, after 0.5, 1, 2, ... 30 s (a quarter more or less)
    or what Retry-After says; then the reply's finish is "error". The client's own retries are off: they take a body
    that is no JSON for an answer, and repeat what llama_cpp.server answers 500 to for good.

    HTTP 400, 413 and 422, a content filter, and a judge's answer without a grade refuse one request, and its reply's
    finish is "refused" - if the server took the one of its kind that ended before. Otherwise it is "error", as the
    fault may lie in what all requests share. After max(8, concurrency) failures in a row, collect raises. Any other
    status would meet every request, and collect raises at once.

    Args:
        url: the protocol's root, such as http://localhost:8000/v1; /v1 is added where the server needs it.
        model: as the server calls it; None for the only one it has.
        concurrency: requests that run at once.
        options: goes into each request as it is, over what stands there.
        key: the server's, of read_key(); no message shows it.

    Raises: GradretError when openai is not installed, the server can not be reached, refuses the key, or has
        several models and none is named.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 120,
        retries: int = 6,
        temperature: float = 0.8,
        top_p: float = 0.95,
        options: dict | None = None,
        key: str | None = None,
    ):
        self._url = check_url(url)
        self._key = read_key() if key is None else key
        if not (self._key.isascii() and self._key.isprintable()):  # it could not be sent, and the error would show it
            raise GradretError(f"{KEY_VARIABLE}: expected letters, digits and signs, got others; set it again")
        self._concurrency, self._timeout_s, self._retries = concurrency, timeout_s, retries
        self._sampling, self._options = {"temperature": temperature, "top_p": top_p}, options or {}
        self._random = random.Random()  # the global one is the caller's
        self._dialect = Dialect()
        self._proven: set[str] = set()  # kinds of request that the server has taken
        self._said: set[str] = set()
        self._done: SimpleQueue[Future] = SimpleQueue()
        self._running = 0
        self._failed_in_a_row: Counter[str] = Counter()  # by kind of request
        self._last_error: str | None = None
        self._end: BaseException | None = None
        self._client = self._make_client(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self._model = self._start(self._find_model(url, model)).result()
        except BaseException:
            self.close()
            raise
        self.identity = name_model(self._model)

    @property
    def free(self) -> int:
        return self._concurrency - self._running

    def describe(self) -> str:
        return f"{self._model} at {self._url}, {self._concurrency} requests at once"

    def submit(self, request: Request) -> None:
        """Start a request; it counts against `free` until collect hands its reply out."""
        future = self._start(self._answer(request))
        self._running += 1
        future.add_done_callback(self._done.put)

    def collect(self) -> list[Reply]:
        """Wait until at least one request is done; those that are. [] only when none runs.

        Raises: GradretError when the server refuses the key, the model or the path, or stays away; never before
            all that came is handed out.
        """
        replies: list[Reply] = []
        while self._running and not (replies and self._done.empty()):
            if self._done.empty():
                self._raise_end()
            self._take(self._done.get(), replies)
        if not replies:
            self._raise_end()
        return replies

    def close(self) -> None:
        """Abandon what runs, at once."""
        if self._thread.is_alive():
            with suppress(TimeoutError, asyncio.TimeoutError):
                self._start(self._abandon()).result(2)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2)
        self._running, self._done = 0, SimpleQueue()

    def _start(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _take(self, future: Future, replies: list[Reply]) -> None:
        self._running -= 1
        if error := future.exception():
            self._end = self._end or error
            return
        reply = future.result()
        kind = kind_of(reply.request)
        if reply.error is None:
            self._failed_in_a_row[kind] = 0
        else:
            if self._failed_in_a_row[kind]:  # the second in a row: the fault may lie in what all requests share
                reply = replace(reply, finish="error")
            self._failed_in_a_row[kind] += 1
            self._last_error = reply.error
        replies.append(reply)

    def _raise_end(self) -> None:
        if self._end is not None:
            raise self._end
        failed = max(self._failed_in_a_row.values(), default=0)
        if failed >= max(8, self._concurrency):
            raise GradretError(f"{self._url}: {failed} requests in a row failed (last: {self._last_error}); {KEPT}")

    async def _abandon(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _make_client(self, url: str):
        try:
            import openai
        except ModuleNotFoundError as error:
            if error.name != "openai":
                raise
            raise GradretError("gen --endpoint needs the openai package: pip install 'gradret[gen]'") from None
        self._openai = openai
        return openai.AsyncOpenAI(api_key=self._key, base_url=url, max_retries=0)

    async def _call(self, method, timeout_s: float, **arguments) -> dict:
        """The JSON object that a server answers with. Raises: Failure"""
        openai = self._openai
        try:
            # The client's own timeout starts anew with each byte.
            timeout = openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
            raw = await asyncio.wait_for(method(timeout=timeout, **arguments), timeout_s)
        except openai.APIStatusError as error:
            message = read_message(error.response.text)
            failure = Failure(error.status_code, message, read_retry_after(error.response.headers))
        except (asyncio.TimeoutError, openai.APITimeoutError):
            failure = Failure(None, f"no answer within {timeout_s:g} s")
        except openai.APIConnectionError as error:
            failure = Failure(None, str(error.__cause__) or type(error.__cause__).__name__)
        else:
            return read_body(raw.http_response.content)
        raise failure  # outside of the handlers, whose exceptions hold the request and with it the key

    async def _find_model(self, url: str, wanted: str | None) -> str:
        clients = [self._client]
        if not re.search(r"/v\d+/?$", urlsplit(url).path):
            clients.append(self._client.with_options(base_url=url.rstrip("/") + "/v1"))
        names: list[str] | None = None
        for client in clients:
            names = await self._list_models(client, wanted is not None)
            if names is not None:
                self._client = client
                break
        return choose_model(self._url, names or [], wanted)

    async def _list_models(self, client, named: bool) -> list[str] | None:
        """None where the server has no such list, or none for this key, of which a model that is named needs none."""
        tries = 0
        while True:
            try:
                body = await self._call(client.models.with_raw_response.list, CHECK_TIMEOUT_S)
            except Failure as failure:
                why = failure
            else:
                return read_models(body)
            tries += 1
            if why.status in (200, 404, 405, 501) or (named and not why.passing and why.status != 401):
                return None  # a key may be good for completions alone
            if not why.passing:
                raise self._make_end(why)
            if tries == CHECK_TRIES:
                raise GradretError(f"{self._url}: can not be reached ({self._tell(why)}); {ADVICE}")
            await asyncio.sleep(FIRST_DELAY_S)

    async def _answer(self, request: Request) -> Reply:
        kind = kind_of(request)
        sampling = {"temperature": 0.0} if request.choices else self._sampling
        dialect, tries = self._dialect, 0
        while True:
            ask = self._client.chat.completions.with_raw_response.create
            asked = {"model": self._model, "extra_body": self._options, **sampling, **dialect.say_request(request)}
            try:
                body = await self._call(ask, self._timeout_s, **asked)
                reply = read_reply(body, request, self._say_once)
            except Failure as failure:
                why = failure
            else:
                self._learn(request, kind, dialect)
                return reply
            if why.refused:
                lower = self._find_dialect(request, kind, dialect, why)
                if lower is None:
                    finish = "refused" if kind in self._proven else "error"
                    return Reply(request, "", finish, error=self._tell(why))
                dialect = lower
                continue
            if not why.passing:
                raise self._make_end(why)
            tries += 1
            if tries > self._retries or why.retry_after_s > MOST_RETRY_AFTER_S:
                return Reply(request, "", "error", error=self._tell(why, tries))
            delay_s = min(FIRST_DELAY_S * 2 ** (tries - 1), MOST_DELAY_S) * self._random.uniform(0.75, 1.25)
            if why.retry_after_s:  # not all of them at the same moment, either
                delay_s = why.retry_after_s + FIRST_DELAY_S * self._random.random()
            await asyncio.sleep(delay_s)

    def _find_dialect(self, request: Request, kind: str, dialect: Dialect, why: Failure) -> Dialect | None:
        """In which to ask again after a refusal; None when the request itself is at fault."""
        if kind not in self._proven:
            return dialect.step_down(request, why.message)
        known = dialect.take_over(request, self._dialect)  # which another request may have found meanwhile
        return known if known != dialect else None

    def _learn(self, request: Request, kind: str, dialect: Dialect) -> None:
        """Keep to the dialect that the first request of a kind succeeded in."""
        if kind in self._proven:
            return
        self._proven.add(kind)
        self._dialect = self._dialect.take_over(request, dialect)
        if kind == "form" and dialect.format:
            instead = FORMATS[dialect.format] or "nothing"
            self._say_once(f"takes no response_format json_schema, so {instead} asks for the form; replies are checked")

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
        model = f" for model {self._model}" if hasattr(self, "_model") else ""
        return GradretError(f"{self._url}: {self._tell(why)}{model}; check --model and the URL; {KEPT}")

    def _tell(self, why: Failure, tries: int = 0) -> str:
        return tell_failure(why, tries, secret=None if self._key == NO_KEY else self._key)
