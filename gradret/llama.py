"""llama.cpp as an engine: many sequences decoded in one batch, a finished one replaced at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradret.errors import GradretError
from gradret.llama_model import LlamaModel, api, forget_errors, last_error
from gradret.llama_sampler import LlamaSampler, Sampling
from gradret.llm import Reply, Request

BATCH_TOKENS = 2048  # that one call may decode: all sequences' next tokens and a share of the waiting prompts
QUERY_TOKENS = 512  # room for a query, and for a passage to judge, in a context of the default size
CONTEXT_STEP = 256  # llama.cpp rounds a sequence's context up to it


@dataclass(slots=True)
class Head:
    """What all prompts of a kind share: its tokens, evaluated in a sequence of their own, and those after the query."""

    sequence: int
    before: list[int]
    after: list[int]


@dataclass(slots=True)
class Slot:
    """A sequence and the request it works on."""

    sequence: int
    request: Request | None = None
    sampler: LlamaSampler | None = None
    waiting: list[int] = field(default_factory=list)  # tokens that are not yet evaluated
    position: int = 0
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)


class LlamaEngine:
    """Continuous batching over llama.cpp's low-level API.

    Every kind of prompt is evaluated once up to the query and copied from there in the KV cache. A reply's sampling
    stream comes from its request's seed alone; its logits depend on the other sequences of a batch by rounding.

    Args:
        path: GGUF file.
        kinds: a request of each kind that will be submitted (same messages but for the last).
        sequences: replies written at once.
        context: tokens of one sequence, prompt and reply; None for what the kinds need.
        gpu_layers: -1 for all, if llama.cpp was built for a GPU.
        threads: None for the processor's cores.
    Raises: GradretError when the model can not be used, or the context is too small for a prompt and its reply.
    """

    def __init__(
        self,
        path: Path,
        kinds: Sequence[Request],
        *,
        sequences: int = 16,
        context: int | None = None,
        gpu_layers: int = -1,
        threads: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ):
        self.model = LlamaModel(path, gpu_layers=gpu_layers)
        self.identity = self.model.identity
        self._sampling, self._context, self._batch = sampling, None, None
        try:
            chats = {_head_key(kind): kind.messages for kind in kinds}
            self._heads = {
                key: Head(number, *self.model.split_prompt(messages))
                for number, (key, messages) in enumerate(chats.items())
            }
            self.context_tokens = self._choose_context(kinds, context)
            self._slots = [Slot(len(self._heads) + i) for i in range(sequences)]
            labels = {kind.choices for kind in kinds if kind.choices}
            self._choices = {choices: self.model.find_choices(choices) for choices in labels}
            self._open_context(threads or count_cores())
        except BaseException:
            self.close()
            raise
        self._done: list[Reply] = []

    def _choose_context(self, kinds: Sequence[Request], context: int | None) -> int:
        heads = [self._heads[_head_key(kind)] for kind in kinds]
        needed = max(
            len(head.before) + len(head.after) + kind.max_tokens for head, kind in zip(heads, kinds, strict=True)
        )
        trained = self.model.trained_context
        chosen = context or min(trained, needed + QUERY_TOKENS)
        if chosen > trained:
            raise GradretError(f"{self.model.path}: was trained on {trained} tokens of context; --context is {chosen}")
        if chosen <= needed:
            raise GradretError(
                f"{self.model.path}: a context of {chosen} tokens is too small: the prompt and its reply need {needed} "
                "besides the query; "
                + ("raise --context, or lower --max-tokens" if context else "lower --max-tokens, or use another model")
            )
        return chosen

    def _open_context(self, threads: int) -> None:
        parameters = api.llama_context_default_params()
        total = len(self._slots) + len(self._heads)
        if total > api.llama_max_parallel_sequences():
            raise GradretError(
                f"--sequences {len(self._slots)}: llama.cpp decodes at most "
                f"{api.llama_max_parallel_sequences() - len(self._heads)} at once"
            )
        parameters.n_seq_max = total
        parameters.n_ctx = total * -(-self.context_tokens // CONTEXT_STEP) * CONTEXT_STEP
        parameters.n_batch = BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = False  # attention then reads a sequence's own cells only
        forget_errors()
        self._context = api.llama_init_from_model(self.model.pointer, parameters)
        if not self._context:
            raise GradretError(
                f"{self.model.path}: no memory for {len(self._slots)} sequences of {self.context_tokens} tokens "
                f"({last_error('llama.cpp gives no reason')}); lower --sequences or --context"
            )
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        for head in self._heads.values():
            for start in range(0, len(head.before), BATCH_TOKENS):
                part = head.before[start : start + BATCH_TOKENS]
                self._decode([(token, start + i, head.sequence, False) for i, token in enumerate(part)])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Evaluate (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        forget_errors()
        status = api.llama_decode(self._context, batch)
        if status:
            raise GradretError(
                f"{self.model.path}: llama.cpp could not decode a batch of {len(rows)} tokens (status {status}, "
                f"{last_error('no reason given')}); lower --sequences or --gpu-layers"
            )

    def count_shared(self, kind: Request) -> int:
        """Tokens of the prompt that requests of a kind share."""
        head = self._heads[_head_key(kind)]
        return len(head.before) + len(head.after)

    @property
    def free(self) -> int:
        """How many more requests can run now."""
        return sum(slot.request is None for slot in self._slots)

    def describe(self) -> str:
        """The engine in words."""
        return f"{self.identity}, {len(self._slots)} sequences of {self.context_tokens} tokens"

    def submit(self, request: Request) -> None:
        """Start a request. Raises: KeyError for a kind the engine was not made for."""
        head = self._heads[_head_key(request)]
        waiting = self.model.tokenize(request.messages[-1]["content"], special=False, after=head.before)
        waiting += head.after
        room = self.context_tokens - len(head.before) - (1 if request.choices else request.max_tokens)
        if len(waiting) > room:
            error = (
                f"the query's part of the prompt has {len(waiting)} tokens, and {room} are left for it in a context "
                f"of {self.context_tokens}; raise --context and pass --retry-rejects"
            )
            self._done.append(Reply(request, "", "refused", error=error))
            return
        slot = next(slot for slot in self._slots if slot.request is None)
        slot.request, slot.waiting, slot.position, slot.tokens = request, waiting, len(head.before), []
        slot.prompt_tokens = len(head.before) + len(waiting)
        if not request.choices:
            slot.sampler = LlamaSampler(self.model, self._sampling, request.seed, request.form)
        api.llama_memory_seq_rm(self._memory, slot.sequence, -1, -1)
        api.llama_memory_seq_cp(self._memory, head.sequence, slot.sequence, -1, -1)

    def collect(self) -> list[Reply]:
        """Decode until a reply is done; those that are. [] only when none runs. Raises: GradretError."""
        while not self._done and any(slot.request for slot in self._slots):
            self._step()
        done, self._done = self._done, []
        return done

    def _step(self) -> None:
        rows: list[tuple[int, int, int, bool]] = []
        ready: list[tuple[int, Slot]] = []  # row of the logits, whose
        busy = [slot for slot in self._slots if slot.request]
        for left, slot in zip(range(len(busy), 0, -1), busy, strict=True):
            count = min(len(slot.waiting), BATCH_TOKENS - len(rows) - left + 1)  # one row for each that follows
            for token in slot.waiting[:count]:
                rows.append((token, slot.position, slot.sequence, False))
                slot.position += 1
            del slot.waiting[:count]
            if not slot.waiting:
                rows[-1] = (*rows[-1][:3], True)
                ready.append((len(rows) - 1, slot))
        self._decode(rows)
        for row, slot in ready:
            if slot.request.choices:
                self._finish(slot, "stop", self._weigh_choices(row, slot.request.choices))
                continue
            token = slot.sampler.sample(self._context, row)
            if api.llama_vocab_is_eog(self.model.vocab, token):
                self._finish(slot, "stop")
                continue
            slot.tokens.append(token)
            slot.waiting = [token]
            if len(slot.tokens) == slot.request.max_tokens:
                self._finish(slot, "length")

    def _weigh_choices(self, row: int, choices: tuple[str, ...]) -> dict[str, float]:
        logits = self.model.read_logits(self._context, row)
        chosen = [logits[tokens].astype(np.float64) for tokens in self._choices[choices]]
        highest = max(values.max() for values in chosen)
        weights = np.array([np.exp(values - highest).sum() for values in chosen])
        return dict(zip(choices, (weights / weights.sum()).tolist(), strict=True))

    def _finish(self, slot: Slot, finish: str, probabilities: dict[str, float] | None = None) -> None:
        # A token can end within a character, and the cap after it: what is no UTF-8 then shows as U+FFFD.
        text = b"".join(map(self.model.piece, slot.tokens)).decode(errors="replace")
        self._done.append(Reply(slot.request, text, finish, len(slot.tokens), slot.prompt_tokens, probabilities))
        if slot.sampler:
            slot.sampler.close()
        slot.request = slot.sampler = None
        slot.waiting = []

    def close(self) -> None:
        """Free the context and the model."""
        for slot in getattr(self, "_slots", ()):
            if slot.sampler:
                slot.sampler.close()
            slot.request = slot.sampler = None
        if self._batch is not None:
            api.llama_batch_free(self._batch)
        if self._context:
            api.llama_free(self._context)
        self._batch = self._context = None
        self.model.close()


def _head_key(request: Request) -> str:
    return (
        "\0".join(f"{m['role']}\0{m['content']}" for m in request.messages[:-1]) + f"\0{request.messages[-1]['role']}"
    )


def count_cores() -> int:
    """Cores this process may use; two threads of one core count once, since they share what arithmetic needs."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        shared = Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        shared = False
    return max(1, threads // 2 if shared else threads)
