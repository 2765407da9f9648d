"""The bi-encoder: tokenize, pool, encode, and save as a sentence-transformers directory."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as nnf
from tokenizers import normalizers
from torch import Tensor, nn

from gradret.data.lists import HALF_A_PAIR, HALVES
from gradret.encoder.directory import EncoderConfig, write_description

# Of a chunk's longest text. At 0.7 padding adds 17 % to passages of 12 to 200 words, and more chunks cost little.
LIKE = 0.7
# Lengths are padded to a multiple: for each new shape libraries compile and keep kernels, and GPUs like it, too.
MULTIPLE = 8


def plan_chunks(lengths: Sequence[int], chunk: int) -> list[np.ndarray]:
    """Positions of texts of these lengths in tokens, cut into chunks of like length, the longest texts first.

    A chunk, padded to its longest text, holds at most as many tokens as `chunk` texts of the longest length there is:
    more texts where they are shorter. It ends before a text much shorter than its longest.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    sorted_lengths = np.asarray(lengths)[order]
    start, plan = 0, []
    while start < len(order):
        longest = sorted_lengths[start]
        alike = int(np.searchsorted(-sorted_lengths, -LIKE * longest, side="right"))
        end = min(start + chunk * round_up(sorted_lengths[0]) // round_up(longest), alike)
        plan.append(order[start:end])
        start = end
    return plan


def round_up(length: int) -> int:
    return -(-int(length) // MULTIPLE) * MULTIPLE


def deal_chunks(plan: Sequence[np.ndarray], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The chunks of each process, by their numbers: each to the process with the fewest padded tokens so far."""
    load = np.zeros(processes, np.int64)
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for number, rows in enumerate(plan):
        process = int(load.argmin())
        dealt[process].append(number)
        load[process] += len(rows) * lengths[rows[0]]
    return dealt


def pad_tokens(tokens: Sequence[np.ndarray], padding: int, most: int) -> tuple[Tensor, Tensor]:
    """(n, T) int64 token ids and attention mask of n texts; T is a multiple of MULTIPLE, but at most `most`.

    Padding stands on the right whatever the tokenizer says: on the left it would shift absolute positions.
    """
    longest = max(len(row) for row in tokens)
    width = max(longest, min(round_up(longest), most))
    ids = np.full((len(tokens), width), padding, np.int64)
    mask = np.zeros((len(tokens), width), np.int64)
    for i, row in enumerate(tokens):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


Kind = Literal["query", "document"]

# A text is cut before it is tokenized, generously: twice as many characters again and again, until there are tokens
# beyond those that are read (words at the cut may be halves), or the text has next to none, such as one of blanks.
CHARACTERS_PER_TOKEN, SPARSE = 8, 64
FURTHER_TOKENS = 128
LEAST_CHARACTERS = 1 << 16

# No part of what an embedding depends on.
UNCOUNTED_SETTINGS = ("other_prompts", "default_prompt_name")
UNCOUNTED_CONFIG = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class Encoder(nn.Module):
    """A transformer with pooling; calling it gives (n, D) embeddings with gradients.

    `transformer` is any of transformers' models that gives last_hidden_state (n, T, D).
    """

    __call__: Callable[..., Tensor]  # forward's; nn.Module says Any

    def __init__(self, transformer: Any, tokenizer: Any, config: EncoderConfig):
        super().__init__()
        self.transformer: Any  # a module with more than nn.Module has
        self.transformer, self.tokenizer, self.config = transformer, tokenizer, config
        if config.lower_case:
            lose_capitals(tokenizer)
        if tokenizer.pad_token is None:  # padding is masked out: any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        # Decoders keep keys and values for the next token, which never comes.
        cached = "use_cache" in inspect.signature(transformer.forward).parameters
        self._options = {"use_cache": False} if cached else {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    @property
    def dimension(self) -> int:
        return int(self.transformer.config.hidden_size)

    @property
    def longest_text(self) -> int:
        """Characters of a text that are looked at, at most, from its one end or the other; see _cut."""
        longest = max(self.config.query_max_length, self.config.document_max_length)
        return 2 * max(SPARSE * (longest + FURTHER_TOKENS), LEAST_CHARACTERS)

    def tokenize(self, texts: Iterable[str], kind: Kind) -> list[np.ndarray]:
        """Token ids of n queries or documents, with prefix and special tokens, cut to the maximum length; int32.

        Raises: as check_texts.
        """
        texts = check_texts(texts, kind)
        prefix = self.config.query_prefix if kind == "query" else self.config.document_prefix
        longest = self.config.query_max_length if kind == "query" else self.config.document_max_length
        if not texts:
            return []
        read = [prefix + self._cut(text, longest) for text in texts]
        ids = self.tokenizer(read, truncation=True, max_length=longest)["input_ids"]
        # An empty text of a tokenizer without special tokens has no token: a vector needs one.
        return [np.array(row or [self.tokenizer.pad_token_id], np.int32) for row in ids]

    def _cut(self, text: str, longest: int) -> str:
        """The side of the text that the first `longest` tokens are in: tokenizers look at all of it, in much memory."""
        needed = longest + FURTHER_TOKENS
        most = max(SPARSE * needed, LEAST_CHARACTERS)
        size = CHARACTERS_PER_TOKEN * needed
        while size < len(text):
            cut = text[-size:] if self.tokenizer.truncation_side == "left" else text[:size]
            found = self.tokenizer(cut, add_special_tokens=False, truncation=True, max_length=needed)["input_ids"]
            if len(found) == needed or size >= most:
                return cut
            size *= 2
        return text

    def embed_tokens(self, tokens: Sequence[np.ndarray]) -> Tensor:
        """(n, D) float32 embeddings of n tokenized texts, with gradients; float64 those of a float64 model."""
        if not tokens:
            return torch.zeros(0, self.dimension, dtype=self.dtype, device=self.device)
        most = max(self.config.query_max_length, self.config.document_max_length)
        ids, mask = pad_tokens(tokens, self.tokenizer.pad_token_id, most)
        ids, mask = ids.to(self.device), mask.to(self.device)
        hidden = self.transformer(input_ids=ids, attention_mask=mask, **self._options).last_hidden_state  # (n, T, D)
        hidden = hidden.to(self.dtype)
        embeddings = pool_tokens(hidden, mask, self.config.pooling)  # (n, D)
        return nnf.normalize(embeddings, dim=-1) if self.config.normalize else embeddings

    def forward(self, texts: Iterable[str], kind: Kind) -> Tensor:
        """(n, D) float32 embeddings of n queries or documents, with gradients. Raises: as check_texts."""
        return self.embed_tokens(self.tokenize(texts, kind))

    def score(self, queries: Tensor | np.ndarray, documents: Tensor | np.ndarray) -> Tensor:
        """(B, D) and (N, D) embeddings, tensors or arrays, to (B, N) scores under the encoder's similarity.

        Raises: TypeError for something else, such as texts.
        """
        for name, given in (("queries", queries), ("documents", documents)):
            if not isinstance(given, Tensor | np.ndarray):
                raise TypeError(f"{name} must be embeddings, a tensor or an array, got {given!r:.100}")
        queries, documents = torch.as_tensor(queries), torch.as_tensor(documents)
        return self.search_vectors(queries) @ self.search_vectors(documents).T

    def search_vectors(self, embeddings: Tensor) -> Tensor:
        """Embeddings whose dot product is the encoder's similarity."""
        if self.config.similarity == "cosine" and not self.config.normalize:
            return nnf.normalize(embeddings, dim=-1)
        return embeddings

    def encode(
        self, texts: Iterable[str], kind: Kind = "document", *, batch_size: int = 32, precision: str = "float32"
    ) -> np.ndarray:
        """(n, D) float32 embeddings without gradients, in evaluation mode, in chunks of like length.

        Args:
            texts: n strings, as a list, an array or whatever gives them one by one; () gives (0, D).
            kind: "query" or "document", chooses prefix and maximum length.
            batch_size: texts at once if all are as long as the longest; more of shorter ones.
            precision: "float32" or "bfloat16" (autocast).
        Raises: as check_texts; ValueError for another precision or batch size.
        """
        check_embedding_options(batch_size, precision)
        tokens = self.tokenize(texts, kind)
        result = np.zeros((len(tokens), self.dimension), np.float32)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode(), autocast(self.device, precision):
                for rows in plan_chunks([len(t) for t in tokens], batch_size):
                    result[rows] = self.embed_tokens([tokens[i] for i in rows]).float().cpu().numpy()
        finally:
            self.train(was_training)
        return result

    def fingerprint(self, *, queries: bool = True) -> str:
        """Hex digest of all an embedding depends on: weights, tokenizer, settings (documents' alone if asked)."""
        digest = hashlib.blake2b(digest_size=16)
        model = {k: v for k, v in self.transformer.config.to_dict().items() if k not in UNCOUNTED_CONFIG}
        counted = {k: v for k, v in asdict(self.config).items() if k not in UNCOUNTED_SETTINGS}
        ours = {k: v for k, v in counted.items() if queries or not k.startswith("query_")}
        tokenizer = [self.tokenizer.padding_side, self.tokenizer.special_tokens_map, self.tokenizer.get_vocab()]
        if self.tokenizer.is_fast:
            rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
            tokenizer.append({k: v for k, v in rules.items() if k not in ("padding", "truncation")})  # set by each call
        digest.update(json.dumps([ours, model, tokenizer], default=str, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write a sentence-transformers directory, whose `encode` gives these embeddings.

        Query and document prefixes become its prompts `query` and `document`. Different maximum lengths need
        sentence-transformers 6.2 and its encode_query and encode_document.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.model_max_length = max(self.config.query_max_length, self.config.document_max_length)
        self.transformer.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        write_description(directory, self.config, self.dimension)


def check_texts(texts: Iterable[str], kind: str) -> list[str]:
    """The texts as a list.

    Raises: TypeError when they are no strings, a single one or a set; ValueError for an unknown kind, or half of a
        surrogate pair in a text.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'query' or 'document', got {kind!r}")
    try:
        listed = None if isinstance(texts, str | bytes | Set) else list(texts)  # a set has no order
    except TypeError:  # cannot be gone through
        listed = None
    if listed is None:
        raise TypeError(f"texts must be several strings, such as [text], got {texts!r:.100}")
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, got {text!r:.100} at position {place}")
        if not text.isascii() and HALVES.search(text):
            raise ValueError(f"text at position {place} {HALF_A_PAIR}")
    return listed


def check_embedding_options(batch_size: int, precision: str) -> None:
    """Raises: ValueError unless batch_size is a whole number from 1 on and precision "float32" or "bfloat16"."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")


def lose_capitals(tokenizer: Any) -> None:
    """Have a fast tokenizer write every text small first, whatever else it does to it."""
    found = tokenizer.backend_tokenizer.normalizer
    steps = [] if found is None else [found]
    if isinstance(found, normalizers.Sequence):
        steps = [found[place] for place in range(len(found))]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def pool_tokens(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(n, T, D) token vectors to (n, D), over real tokens; padding may stand on either side."""
    if pooling == "mean":
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
    if pooling == "cls":
        position = attention_mask.int().argmax(1)
    else:
        position = attention_mask.shape[1] - 1 - attention_mask.flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on the device, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
