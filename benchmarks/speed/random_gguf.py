"""GGUF files with random weights: models of any size that say nothing, to measure and to test an engine with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np

from gradret.console import GradretError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BLOCK = 32  # numbers of a Q8_0 block: a float16 scale and as many int8
BIAS_DIMENSION = 0  # of the residual stream, which no layer writes to, so that it can carry a logit bias


@dataclass(frozen=True)
class Size:
    """Of a Qwen2 model; the default is that of Qwen2-0.5B."""

    layers: int = 24
    width: int = 896
    heads: int = 14
    kv_heads: int = 2
    feed_forward: int = 4864
    vocabulary: int = 151_936
    context: int = 32_768


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE vocabulary (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]


def make_vocabulary(size: int, words: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: every byte, the words with a space before them, groups of letters.

    Raises: ValueError when the bytes and words do not fit.
    """
    space = byte_characters()[32]
    pairs = [a + b for a in ascii_lowercase for b in ascii_lowercase]
    pieces = [((space + word)[:end], word[end - 1]) for word in words for end in range(1, len(word) + 1)]
    groups = [(p[0], p[1]) for p in pairs] + [(space, p) for p in pairs] + [(p, q) for p in pairs for q in pairs]
    tokens = dict.fromkeys(byte_characters())
    merges: list[str] = []
    for number, (left, right) in enumerate(pieces + groups):
        if len(tokens) == size - len(CONTROL):
            if number < len(pieces):
                raise ValueError(f"a vocabulary of {size} has no room for {len(words)} words")
            break
        if left + right not in tokens:
            tokens[left + right] = None
            merges.append(f"{left} {right}")
    spare = [f"<unused {i}>" for i in range(size - len(CONTROL) - len(tokens))]
    return [*tokens, *spare, *CONTROL], merges


def write_random_gguf(
    path: Path,
    size: Size = Size(),
    *,
    words: Sequence[str] = (),
    bias: Mapping[str, float] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    quantized: bool = True,
    seed: int = 0,
) -> None:
    """Write a Qwen2 model with random weights.

    Args:
        words: that the vocabulary knows as one token each, with a space before them.
        bias: logits added to some tokens (as the vocabulary spells them; the others get that of ""), so that a
            random model writes what a test needs; then the output has a matrix of its own, in float32.
        chat_template: Jinja, None for a model without one.
        quantized: Q8_0 weights, otherwise float32.
    Raises: GradretError when the package gguf is missing or the file cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise GradretError(
            "a model with random weights needs the package gguf: pip install 'gradret[gen]', or give --model"
        ) from None
    tokens, merges = make_vocabulary(size.vocabulary, words)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(None, "qwen2")
    writer.add_name(f"random weights, {size.layers} layers of {size.width}")
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.feed_forward)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL)) + [gguf.TokenType.CONTROL] * len(CONTROL)
    writer.add_token_types(
        [gguf.TokenType.UNUSED if t.startswith("<unused") else k for t, k in zip(tokens, kinds, strict=True)]
    )
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)  # <|im_end|>
    writer.add_pad_token_id(len(tokens) - 3)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    def add(name: str, rows: int, columns: int, scale: float, silent: bool = False) -> None:
        if not quantized:
            weights = rng.normal(size=(rows, columns)) * scale
            weights[BIAS_DIMENSION] *= not silent
            writer.add_tensor(name, weights.astype(np.float32))
            return
        blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK), np.uint8)
        blocks[..., :2] = np.array([scale / 73], np.float16).view(np.uint8)  # int8 is 73 wide, its standard deviation
        blocks[..., 2:] = rng.integers(0, 256, (rows, columns // BLOCK, BLOCK), np.uint8)
        if silent:  # the row that would write to the bias dimension
            blocks[BIAS_DIMENSION, :, 2:] = 0
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def add_vector(name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    width, kv_width = size.width, size.width // size.heads * size.kv_heads
    if bias is None:  # tied to the output: small, or each token would call for itself
        add("token_embd.weight", size.vocabulary, width, 0.02)
    else:
        embeddings = rng.normal(size=(size.vocabulary, width)).astype(np.float32)
        embeddings[:, BIAS_DIMENSION] = np.sqrt(width)  # about as long as all the others
        add_vector("token_embd.weight", embeddings)
        output = rng.normal(size=(size.vocabulary, width)).astype(np.float32) / np.sqrt(width)
        output[:, BIAS_DIMENSION] = [bias.get(t, bias.get("", 0.0)) for t in tokens]
        output[:, BIAS_DIMENSION] /= np.sqrt(width / 2)  # what the last norm leaves of that dimension
        add_vector("output.weight", output)
    for layer in range(size.layers):
        block = f"blk.{layer}."
        add_vector(block + "attn_norm.weight", np.ones(width))
        add_vector(block + "ffn_norm.weight", np.ones(width))
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            add(f"{block}attn_{name}.weight", rows, width, width**-0.5)
            add_vector(f"{block}attn_{name}.bias", np.zeros(rows))
        add(block + "attn_output.weight", width, width, width**-0.5, silent=True)
        add(block + "ffn_gate.weight", size.feed_forward, width, width**-0.5)
        add(block + "ffn_up.weight", size.feed_forward, width, width**-0.5)
        add(block + "ffn_down.weight", width, size.feed_forward, size.feed_forward**-0.5, silent=True)
    add_vector("output_norm.weight", np.ones(width))
    try:
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise GradretError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        writer.close()
