"""OpenAI's chat protocol as servers speak it: what is asked in which dialect, what answers and failures hold."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import urlsplit

from gradret.errors import GradretError
from gradret.llm import Reply, Request

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
