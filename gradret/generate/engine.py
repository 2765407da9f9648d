"""What is asked of a language model and what comes back, whichever engine answers."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Form:
    """The form of a reply, as engines take it: a GBNF grammar (llama.cpp) and a JSON schema (endpoints)."""

    grammar: str
    schema: dict = field(hash=False)


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        key: what the caller knows it by; the engine hands it back.
        messages: chat messages {"role", "content"}; the last is the user's, and all before it are the same for
            every request of a kind, so that an engine evaluates them once. Contents are data: an engine never
            reads chat markup in them.
        max_tokens: of the reply, at most.
        seed: of its own sampling stream, 64 bits; depends on nothing but what the reply is for.
        form: that the reply must have; None for free text.
        choices: one-token answers; if there are some, no text is sampled, and the reply holds their probabilities.
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
        finish: "stop", "length" (the token cap cut it off), "refused" (for what is in the request: asked again it is
            refused again), or "error" (for what may be over the next time: not final).
        tokens, prompt_tokens: written, and read (0 where the engine does not say).
        probabilities: of each choice, summing to 1; None without choices.
        error: with finish "error" or "refused", why there is no reply, in one line.
    """

    request: Request
    text: str
    finish: str
    tokens: int = 0
    prompt_tokens: int = 0
    probabilities: dict[str, float] | None = None
    error: str | None = None


class Engine(Protocol):
    """Answers many requests at once. Submit while `free` is above 0; collect what is ready, in any order.

    Attributes:
        identity: names the model in records: the same wherever its file lies.
        free: how many more requests can run now.
    """

    identity: str
    free: int

    def describe(self) -> str:
        """The engine in words, for the user."""

    def submit(self, request: Request) -> None:
        """Start a request. Raises: GradretError when the engine can serve none like it."""

    def collect(self) -> list[Reply]:
        """Wait until at least one request is done; those that are. [] only when none runs.

        Raises: GradretError when going on makes no sense: a refused key, a server that stays away.
        """

    def close(self) -> None:
        """Stop what runs and free what is held."""
