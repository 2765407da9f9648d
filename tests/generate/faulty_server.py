"""A local server of OpenAI's chat protocol that fails in ways a test writes down."""

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        body: sent as it is if it is bytes, else as JSON; None for an error body that names the status.
        wait_s: before the answer; a server that closes does not wait on.
        half: only half of the body goes out before the connection is closed.
        drip_s: before each byte of the body.
    """

    status: int = 200
    body: object = None
    headers: dict = field(default_factory=dict)
    wait_s: float = 0.0
    half: bool = False
    drip_s: float = 0.0


def make_completion(text: str | None, *, finish: str | None = "stop", logprobs=None, **message) -> dict:
    return {
        "id": "c",
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish,
                "logprobs": logprobs,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def make_logprobs(token: str, top: dict[str, float]) -> dict:
    """Of one token, as the protocol has them."""
    entries = [{"token": t, "logprob": p, "bytes": None} for t, p in top.items()]
    return {"content": [{"token": token, "logprob": top.get(token, -9.0), "bytes": None, "top_logprobs": entries}]}


class FaultyServer:
    """Runs while it is entered.

    Args:
        script: what the first requests for chat get, in order of arrival (None: a fine reply), or a function of the
            request's JSON that gives it.
        write: the text of a fine reply, from the request's JSON; by default what the user's last message holds.
        models: the names GET /models lists, or its Answer.
        root: before /models and /chat/completions.
        delay_s: that each fine reply takes.

    Attributes:
        requests: the JSON of each request for chat, with its headers, in lower case, as "headers".
        most_at_once: requests for chat that were being answered at the same time, at most.
    """

    def __init__(
        self,
        script: Iterable[Answer | None] | Callable[[dict], Answer | None] = (),
        *,
        write: Callable[[dict], str] = lambda request: request["messages"][-1]["content"],
        models: Iterable[str] | Answer = ("tiny",),
        root: str = "/v1",
        delay_s: float = 0.0,
    ):
        self._script = script if callable(script) else iter(script)
        self._write = write
        self._models, self._root, self._delay_s = models, root, delay_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._now = 0
        self.requests: list[dict] = []
        self.most_at_once = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def url(self) -> str:
        return self.address + self._root

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer on a kept connection takes 40 ms

            def do_GET(self):
                server._send(self, server._list_models(self.path))

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server._send(self, server._chat(self.path, request, {k.lower(): v for k, v in self.headers.items()}))

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # clients that hang up are part of the tests
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _list_models(self, path: str) -> Answer:
        if path != f"{self._root}/models":
            return Answer(404)
        if isinstance(self._models, Answer):
            return self._models
        return Answer(body={"object": "list", "data": [{"id": name, "object": "model"} for name in self._models]})

    def _chat(self, path: str, request: dict, headers: dict) -> Answer:
        if path != f"{self._root}/chat/completions":
            return Answer(404)
        with self._lock:
            self.requests.append({**request, "headers": headers})
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            answer = self._script(request) if callable(self._script) else next(self._script, None)
        try:
            if answer is None:
                answer = Answer(body=make_completion(self._write(request)), wait_s=self._delay_s)
            self._closing.wait(answer.wait_s)
        finally:
            with self._lock:
                self._now -= 1
        return answer

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if self._closing.is_set():  # a kept connection outlives the server
            handler.close_connection = True
            return
        body = {"error": {"message": f"status {answer.status}"}} if answer.body is None else answer.body
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            handler.send_response(answer.status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            if answer.drip_s:
                for byte in content:
                    self._closing.wait(answer.drip_s)
                    handler.wfile.write(bytes([byte]))
            else:
                handler.wfile.write(content[: len(content) // 2] if answer.half else content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has gone, as a test may want
        if answer.half:
            handler.close_connection = True
