"""A GGUF model in llama.cpp: loading, its vocabulary, its chat template, what tells it from another."""

import ctypes
import hashlib
import re
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from gradret.console import show_wait
from gradret.errors import GradretError

try:
    import jinja2
    from llama_cpp import llama_cpp as api
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
except ModuleNotFoundError as error:
    if error.name not in ("llama_cpp", "jinja2"):
        raise
    raise GradretError(
        "gen --model needs the package llama-cpp-python: pip install 'gradret[gen]', or use --endpoint"
    ) from None

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


def avoid_amx() -> None:
    """Have llama-cpp-python load models without llama.cpp's kernels for Intel's AMX, if it was built with them.

    They can end the process at the first matrix product (ggml-org/llama.cpp #20824; seen with GCC 12): the kernels for
    AVX-512 then serve.
    """
    defaults = api.llama_model_default_params
    if b"AMX" in api.llama_print_system_info() and defaults().use_extra_bufts:

        def without_extra_buffers():
            parameters = defaults()
            parameters.use_extra_bufts = False
            return parameters

        api.llama_model_default_params = without_extra_buffers


class LlamaModel:
    """Weights and vocabulary of a GGUF file.

    Args:
        path: of the file; of the first one if it was split.
        gpu_layers: how many go to a GPU if llama.cpp was built for one; -1 for all.
    Attributes:
        pointer, vocab: llama.cpp's own.
        identity: the model's name and a digest of its content, the same wherever the file lies.
        vocabulary_size, trained_context: tokens.
    Raises: GradretError when it is no GGUF file, llama.cpp can not load it, or it has no chat template.
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
        avoid_amx()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        with show_wait(f"loading {path.name}"):
            self.pointer = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise GradretError(f"{path}: llama.cpp can not load it ({last_error('no reason given')})")
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
            raise GradretError(f"{path}: its chat template can not be read ({error}); use another model") from None
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
        """A grammar's sampler in its first state, to be cloned. Raises: ValueError when llama.cpp can not parse it."""
        if grammar not in self._grammars:
            parsed = api.llama_sampler_init_grammar(self.vocab, grammar.encode(), b"root")
            if not parsed:
                raise ValueError(f"llama.cpp can not parse the grammar: {last_error('no reason given')}")
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
        it can not become markup. A system message that the template refuses or ignores joins the message after it.

        Raises: GradretError when the template can not render a chat.
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
                f"{self.path}: its chat template can not write this chat ({reason or 'it leaves a message out'}); "
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
