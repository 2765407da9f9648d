"""What `gen` asks of a language model and what comes back, whichever engine answers.

A new engine is one more file beside llama.py and endpoint.py, a branch of run.open_engine, and its options in cli.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Form:
    """The form of a reply, in both ways that engines take it.

    Attributes:
        grammar: GBNF, for llama.cpp.
        schema: a JSON schema, for endpoints; None where none says it.
    """

    grammar: str
    schema: dict | None = field(hash=False)


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        key: names the request to the caller; the engine does not look at it.
        messages: chat messages {"role", "content"}. The last is the user's. All before it are the same for every
            request of a kind, so that an engine can evaluate them once. Contents are data: an engine never reads chat
            markup in them.
        max_tokens: the longest reply.
        seed: of this reply's own sampling stream, 64 bits. It depends only on what the reply is for.
        form: the form that the reply must have; None for free text.
        choices: one-token answers. With them no text is sampled: the reply holds the probability of each.
    """

    key: object
    messages: tuple[dict, ...]
    max_tokens: int
    seed: int = 0
    form: Form | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        finish: "stop"; "length" when the token cap cut the text off; "refused" when the engine will never serve this
            request; "error" when another run may get a reply.
        tokens, prompt_tokens: written and read; 0 where the engine does not say.
        probabilities: of each choice, summing to 1; None without choices.
        error: with "error" and "refused", one line that says why there is no reply.
        lasting: with "error", whether another run gets the same unless its options or the model are changed.
    """

    request: Request
    text: str
    finish: str
    tokens: int = 0
    prompt_tokens: int = 0
    probabilities: dict[str, float] | None = None
    error: str | None = None
    lasting: bool = False


class Engine(Protocol):
    """Answers many requests at once. Submit while `free` is above 0; collect replies in whatever order they come.

    Attributes:
        identity: names the model in records; the same wherever its file lies.
        free: how many more requests can run now.
    """

    identity: str
    free: int

    def describe(self) -> str:
        """The engine in words, for the user."""

    def submit(self, request: Request) -> None:
        """Start a request; it counts against `free` until its reply is handed out."""

    def collect(self) -> Sequence[Reply]:
        """Wait until at least one request is done, and return all that are. Empty only when none runs.

        Raises: GradretError when going on makes no sense: the server refuses the key, or has gone away; never before
            all that came is handed out.
        """

    def close(self) -> None:
        """Stop what runs and free what is held."""
