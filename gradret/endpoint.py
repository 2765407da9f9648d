"""An engine that asks any server of OpenAI's chat protocol: many requests at once, again when a try fails."""

import asyncio
import random
import re
import threading
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from urllib.parse import urlsplit

from gradret.chat_protocol import (
    ADVICE,
    FORMATS,
    KEY_VARIABLE,
    NO_KEY,
    Dialect,
    Failure,
    check_url,
    choose_model,
    kind_of,
    name_model,
    read_body,
    read_key,
    read_message,
    read_models,
    read_reply,
    read_retry_after,
    tell_failure,
)
from gradret.console import say
from gradret.errors import GradretError
from gradret.llm import Reply, Request

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
