"""llama.cpp as an engine: many sequences decoded in one batch, a finished one replaced at once."""

import ctypes
import hashlib
import os
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from gradret.console import GivenUp, GradretError, Interrupted, StopRequest, needing, say, show_wait
from gradret.encoder.directory import HUB_TIMEOUT_S, asking_hub, tell_reason
from gradret.generate.engine import Reply, Request

# GNU's OpenMP reads this once, when it is loaded with llama_cpp. Otherwise its threads spin at every barrier: on a busy
# machine that can cost llama.cpp most of its speed (benchmarks/README.md), and it slows down all the rest.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with needing("gen without --endpoint", "llama-cpp-python", "gen", "llama_cpp", "jinja2"):
    import jinja2
    from llama_cpp import llama_cpp as api
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

SPLIT = re.compile(r"-[0-9]{5}-of-([0-9]{5})(?=\.gguf$)")  # a model in several files
OTHER_MODELS = "pass --model FILE.gguf, or --endpoint URL"
SHOWN = 8  # files of a repository that a message names
ERROR_LEVEL = 3  # of ggml's log
# Templates that print the date would make a reply depend on the day: they get this one.
TEMPLATE_DATE = datetime(2025, 1, 1)
EDGE_BYTES = 4 << 20  # a fingerprint reads so much at a file's beginning and end,
PROBE_BYTES, PROBES = 1 << 16, 64  # and so much at so many places between
OPEN, CLOSE = "\ue000", "\ue001"  # stand around a message's number where the template puts its content

_messages: deque[str] = deque(maxlen=20)


@api.llama_log_callback
def _keep_errors(level, text, _):
    if level == ERROR_LEVEL:
        _messages.append(text.decode(errors="replace").strip())


def last_error(default: str) -> str:
    """What llama.cpp said last as an error, since forget_errors."""
    return _messages[-1] if _messages else default


def forget_errors() -> None:
    """Before a call whose own errors are wanted."""
    _messages.clear()


def locate_gguf(name: str) -> Path:
    """The local path of a GGUF model: a file, or HUB_REPO[:FILE], fetched when it is not in the local hub cache.

    Of a model split into several files the first is returned, and all are fetched.

    Raises: GradretError when there is no such file, the repository has several models and none is named, the hub does
        not answer, or what is fetched does not arrive; Interrupted on SIGINT or SIGTERM in the meantime.
    """
    if Path(name).is_file():
        return Path(name)
    repository, _, file = name.partition(":")
    if Path(name).exists() or name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise GradretError(f"{name}: no such file; give a GGUF file, or a hub repository as OWNER/NAME[:FILE.gguf]")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with asking_hub(name, "file", OTHER_MODELS):
        with suppress(LocalEntryNotFoundError):
            cached = Path(snapshot_download(repository, local_files_only=True))
            if parts := choose_files([str(path.relative_to(cached)) for path in cached.rglob("*.gguf")], file):
                return cached / parts[0]
        there = HfApi().model_info(repository, timeout=HUB_TIMEOUT_S, files_metadata=True).siblings
    sizes = {f.rfilename: f.size or 0 for f in there}
    parts = choose_files(list(sizes), file)
    if not parts:
        models = [f for f in sizes if f.endswith(".gguf")]
        shown = ", ".join(models[:SHOWN]) + (f" and {len(models) - SHOWN} more" if len(models) > SHOWN else "")
        raise GradretError(
            f"{name}: name one of the repository's GGUF files as {repository}:FILE; there: {shown or 'none'}"
        )
    return fetch_files(repository, {part: sizes[part] for part in parts})


def fetch_files(repository: str, sizes: dict[str, int]) -> Path:
    """Files of a hub repository, with the bytes of each, fetched into the local cache; the path of the first."""
    from huggingface_hub import hf_hub_download

    what = f"{repository}:{next(iter(sizes))}"
    say(f"gen: fetching {what} ({sum(sizes.values()) / 1e9:.1f} GB) from the hub, once")
    with StopRequest() as stop:
        with suppress(GivenUp, KeyboardInterrupt), stop.give_up(0):  # the hub's client has a handler of SIGINT, too
            try:
                fetched = [hf_hub_download(repository, file, etag_timeout=HUB_TIMEOUT_S) for file in sizes]
            except Exception as error:
                raise GradretError(
                    f"{what}: could not be fetched ({tell_reason(error)}); run the command again, or {OTHER_MODELS}"
                ) from error
        if stop.signal is not None:
            raise Interrupted(f"stopped while {what} was fetched; run the same command again")
    return Path(fetched[0])


def choose_files(files: list[str], file: str) -> list[str]:
    """The files of the one model that is meant, all parts in order; [] when it is not there or several could be."""
    models: dict[str, list[str]] = {}
    for found in sorted(files):
        if found.endswith(".gguf") and "mmproj" not in found:  # an image encoder beside the model
            models.setdefault(SPLIT.sub("", found), []).append(found)
    if not file and len(models) > 1:
        return []
    parts = models.get(SPLIT.sub("", file), []) if file else next(iter(models.values()), [])
    split = SPLIT.search(parts[0]) if parts else None
    return parts if not split or len(parts) == int(split.group(1)) else []


def make_parameters() -> "api.llama_model_params":
    """llama.cpp's defaults for loading a model, but without its kernels for Intel's AMX, if it was built with them.

    They can end the process at the first matrix product (ggml-org/llama.cpp #20824; seen with GCC 12). They are among
    the extra buffer types; without these AVX-512 serves.
    """
    parameters = api.llama_model_default_params()
    if b"AMX" in api.llama_print_system_info():
        parameters.use_extra_bufts = False
    return parameters


class LlamaModel:
    """Weights and vocabulary of a GGUF file.

    Args:
        path: of the file; of the first one if it was split.
        gpu_layers: how many go to a GPU if llama.cpp was built for one; -1 for all.
    Attributes:
        pointer, vocab: llama.cpp's own.
        identity: the model's name and a digest of its content, the same wherever the file lies.
        vocabulary_size, trained_context: tokens.
    Raises: GradretError when it is no GGUF file, llama.cpp cannot load it, or it has no chat template.
    """

    def __init__(self, path: Path, *, gpu_layers: int = -1):
        self.path, self.pointer = path, None
        self._grammars: dict[str, object] = {}
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise GradretError(
                f"{path}: is not a GGUF file (it begins with {magic!r}); convert the model to GGUF first"
            )
        forget_errors()
        api.llama_log_set(_keep_errors, None)
        api.llama_backend_init()
        parameters = make_parameters()
        parameters.n_gpu_layers = gpu_layers
        with show_wait(f"loading {path.name}"):
            self.pointer = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise GradretError(f"{path}: llama.cpp cannot load it ({last_error('no reason given')})")
        self.vocab = api.llama_model_get_vocab(self.pointer)
        self.vocabulary_size = api.llama_vocab_n_tokens(self.vocab)
        self.trained_context = api.llama_model_n_ctx_train(self.pointer)
        self._adds_space, self._newline = False, []
        if api.llama_vocab_type(self.vocab) == api.LLAMA_VOCAB_TYPE_SPM:
            self._newline = self.tokenize("\n", special=False)
            # With the space before it: what stands in front of a text after a line break.
            self._adds_space = self.tokenize("\na", special=False)[: len(self._newline)] == self._newline
        template = api.llama_model_chat_template(self.pointer, None)
        if not template:
            self.close()
            raise GradretError(f"{path}: has no chat template; use an instruction-tuned model's GGUF file")
        try:
            self._formatter = self._make_formatter(template.decode())
        except jinja2.TemplateError as error:
            self.close()
            raise GradretError(f"{path}: its chat template cannot be read ({error}); use another model") from None
        self.identity = f"{self._read_meta('general.name') or 'unnamed'} {fingerprint(path)}"

    def _make_formatter(self, template: str) -> Jinja2ChatFormatter:
        special = (api.llama_vocab_eos(self.vocab), api.llama_vocab_bos(self.vocab))
        texts = [api.llama_vocab_get_text(self.vocab, t).decode() if t >= 0 else "" for t in special]
        formatter = Jinja2ChatFormatter(template, *texts)
        formatter.strftime_now = TEMPLATE_DATE.strftime
        return formatter

    def _read_meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        found = api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if found >= 0 else ""

    def parse_grammar(self, grammar: str) -> object:
        """A grammar's sampler in its first state, to be cloned. Raises: ValueError when llama.cpp cannot parse it."""
        if grammar not in self._grammars:
            parsed = api.llama_sampler_init_grammar(self.vocab, grammar.encode(), b"root")
            if not parsed:
                raise ValueError(f"llama.cpp cannot parse the grammar: {last_error('no reason given')}")
            self._grammars[grammar] = parsed
        return self._grammars[grammar]

    def close(self) -> None:
        """Free the weights."""
        for parsed in self._grammars.values():
            api.llama_sampler_free(parsed)
        self._grammars.clear()
        if self.pointer:
            api.llama_model_free(self.pointer)
            self.pointer = None

    def tokenize(self, text: str, *, special: bool, after: Sequence[int] = ()) -> list[int]:
        """Tokens of a text; only with `special` does chat markup in it become control tokens.

        SentencePiece vocabularies put a space before a text; that is theirs to do at a prompt's start and after markup,
        but not where a part of the prompt goes on: see what stands before it, `after`.
        """
        markup = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_USER_DEFINED
        goes_on = after and not api.llama_vocab_get_attr(self.vocab, after[-1]) & markup
        spaced = self._adds_space and goes_on
        data = ("\n" + text if spaced else text).encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        count = api.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), False, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize wants room for {-count} tokens of {len(data)} bytes")
        return tokens[len(self._newline) : count] if spaced else tokens[:count]

    def read_logits(self, context, row: int) -> np.ndarray:
        """(vocabulary,) float32, of a row of the last batch; a view that the next batch overwrites."""
        address = api.llama_get_logits_ith(context, row)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self.vocabulary_size,))

    def piece(self, token: int) -> bytes:
        """What a token writes; nothing if it is a control token."""
        buffer = ctypes.create_string_buffer(64)
        size = api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size]

    def find_choices(self, choices: Sequence[str]) -> list[list[int]]:
        """Of each one-token answer the tokens that write it, with a space before it or without.

        Raises: GradretError when one has none.
        """
        found: dict[bytes, list[int]] = {choice.encode(): [] for choice in choices}
        for token in range(self.vocabulary_size):
            piece = self.piece(token).strip()
            if piece in found:
                found[piece].append(token)
        for choice, tokens in zip(choices, found.values(), strict=True):
            if not tokens:
                raise GradretError(
                    f"{self.path}: its vocabulary has no token '{choice}' to judge with; use another --scale or model, "
                    "or leave --judge out"
                )
        return list(found.values())

    def split_prompt(self, messages: tuple[dict, ...]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt before and after the last message's content.

        The template is rendered with stand-ins, and each content is tokenized by itself: whatever a content spells,
        it cannot become markup. A system message that the template refuses or ignores joins the message after it.

        Raises: GradretError when the template cannot render a chat.
        """
        contents = [f"{OPEN}{i}{CLOSE}" for i in range(len(messages))]
        chats = [[{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]]
        if messages[0]["role"] == "system" and len(messages) > 1:
            joined = {"role": messages[1]["role"], "content": f"{contents[0]}\n\n{contents[1]}"}
            chats.append([joined, *chats[0][2:]])
        for chat in chats:
            text, reason = self._render(chat)
            if all(text.count(content) == 1 for content in contents):
                break
        else:
            raise GradretError(
                f"{self.path}: its chat template cannot write this chat ({reason or 'it leaves a message out'}); "
                "use another model"
            )
        tokens: list[int] = []
        for number, part in enumerate(re.split(f"{OPEN}([0-9]+){CLOSE}", text)):
            if number % 2 == 0:  # after the last content, which is no markup, `tokens` is empty
                tokens += self.tokenize(part, special=True, after=tokens or self._newline * number)
            elif int(part) == len(messages) - 1:
                before, tokens = tokens, []
            else:
                tokens += self.tokenize(messages[int(part)]["content"], special=False, after=tokens)
        bos = api.llama_vocab_bos(self.vocab)
        if api.llama_vocab_get_add_bos(self.vocab) and before[:1] != [bos]:
            before.insert(0, bos)
        return before, tokens

    def _render(self, chat: list[dict]) -> tuple[str, str]:
        """The prompt, or "" and why there is none."""
        reason = ""
        for tools in (None, []):  # most templates ask whether there are any, some take the list for granted
            try:
                # Reasoning models would think aloud first, which the reply's grammar does not let them.
                return self._formatter(messages=chat, tools=tools, functions=tools, enable_thinking=False).prompt, ""
            except Exception as error:  # a template raises what it likes, and Jinja its own errors
                reason = reason or str(error) or type(error).__name__
        return "", reason


def fingerprint(path: Path) -> str:
    """Hex digest of a file's size and samples of it, ends and places between: models of gigabytes are known at once."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        places = [(0, EDGE_BYTES), *((size * i // PROBES, PROBE_BYTES) for i in range(1, PROBES))]
        for place, length in [*places, (max(0, size - EDGE_BYTES), EDGE_BYTES)]:
            file.seek(place)
            digest.update(file.read(length))
    return digest.hexdigest()


TOP_K = 40  # llama.cpp's own default
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
RANDOM_SEED = 0xFFFFFFFF  # asks llama.cpp for a seed of its choice


class LlamaSampler:
    """Samples one reply: of the likeliest TOP_K tokens the fewest that hold top_p, at a temperature; 0 is greedy.

    The grammar is asked about the sampled token alone; only when it refuses is the whole vocabulary constrained and
    sampled from again, since that costs as much as a small model's decoding.
    """

    def __init__(self, model: LlamaModel, request: Request, temperature: float, top_p: float):
        self._model = model
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature > 0:
            for step in (
                api.llama_sampler_init_top_k(TOP_K),
                api.llama_sampler_init_top_p(top_p, 1),
                api.llama_sampler_init_temp(temperature),
                api.llama_sampler_init_dist(request.seed % RANDOM_SEED),
            ):
                api.llama_sampler_chain_add(self._chain, step)
        else:
            api.llama_sampler_chain_add(self._chain, api.llama_sampler_init_greedy())
        self._grammar = None
        if request.form:
            self._grammar = api.llama_sampler_clone(model.parse_grammar(request.form.grammar))

    def sample(self, context, row: int) -> int:
        """The next token after a row of the last batch."""
        token = api.llama_sampler_sample(self._chain, context, row)
        if self._grammar is None:
            return token
        if not self._allows(token):
            token = self._sample_allowed(context, row)
        if not api.llama_vocab_is_eog(self._model.vocab, token):
            api.llama_sampler_accept(self._grammar, token)
        return token

    def _allows(self, token: int) -> bool:
        # A grammar sets the logit of what it refuses to -inf and leaves the others.
        one = np.array([(token, 0, 0)], CANDIDATE)
        api.llama_sampler_apply(self._grammar, ctypes.byref(_as_candidates(one)))
        return one["logit"][0] == 0

    def _sample_allowed(self, context, row: int) -> int:
        every = np.zeros(self._model.vocabulary_size, CANDIDATE)
        every["id"] = np.arange(len(every))
        every["logit"] = self._model.read_logits(context, row)
        candidates = _as_candidates(every)
        api.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        api.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                api.llama_sampler_free(sampler)
        self._chain = self._grammar = None


def _as_candidates(array: np.ndarray) -> "api.llama_token_data_array":
    """llama.cpp's view of the array, which must outlive it."""
    data = array.ctypes.data_as(api.llama_token_data_p)
    return api.llama_token_data_array(data, len(array), -1, False)


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
        temperature, top_p: of sampling, see LlamaSampler.
    Raises: GradretError when the model cannot be used, or the context is too small for a prompt and its reply.
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
        temperature: float = 0.8,
        top_p: float = 0.95,
    ):
        self.model = LlamaModel(path, gpu_layers=gpu_layers)
        self.identity = self.model.identity
        self._temperature, self._top_p = temperature, top_p
        self._context = self._batch = None
        self._slots: list[Slot] = []
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

    @property
    def free(self) -> int:
        return sum(slot.request is None for slot in self._slots)

    def describe(self) -> str:
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
            slot.sampler = LlamaSampler(self.model, request, self._temperature, self._top_p)
        # The shared part is not evaluated again: its cells of the KV cache are copied over the last request's.
        api.llama_memory_seq_rm(self._memory, slot.sequence, -1, -1)
        api.llama_memory_seq_cp(self._memory, head.sequence, slot.sequence, -1, -1)

    def collect(self) -> list[Reply]:
        while not self._done and any(slot.request for slot in self._slots):
            self._step()
        done, self._done = self._done, []
        return done

    def _step(self) -> None:
        """Decode one batch: the next token of every sequence that writes, and what fits of the prompts that wait."""
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
            slot.waiting = [token]  # to be evaluated with the next batch, which gives the token after it
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
        for slot in self._slots:
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
    return repr(request.messages[:-1])  # messages are no keys themselves


def count_cores() -> int:
    """Cores this process may use; two threads of one core count once, since they share what arithmetic needs."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        shared = Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        shared = False
    return max(1, threads // 2 if shared else threads)
