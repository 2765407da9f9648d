"""The bi-encoder: tokenize, pool, encode, and save as a sentence-transformers directory."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from gradret.console import GradretError
from gradret.files import read_json, write_json

FOREIGN_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # sentence-transformers' names and ours


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors and vectors scores.

    Attributes:
        pooling: "mean", "cls" or "last", over the real tokens.
        normalize: whether embeddings have length 1.
        similarity: "cosine" or "dot".
        query_prefix, document_prefix: put before every query or document.
        query_max_length, document_max_length: tokens, special ones and prefix included; the rest is cut off.
    """

    pooling: str = "mean"
    normalize: bool = True
    similarity: str = "cosine"
    query_prefix: str = ""
    document_prefix: str = ""
    query_max_length: int = 512
    document_max_length: int = 512


def read_config(directory: Path, name: str, longest: int) -> EncoderConfig:
    """The configuration of a sentence-transformers directory, as sentence-transformers reads it.

    A plain transformers directory has none: then mean pooling, normalised, cosine.

    Args:
        directory: the encoder's files.
        name: how the user named it.
        longest: tokens that tokenizer and model can take.
    Raises: GradretError when a part is not supported.
    """
    if not (directory / "modules.json").is_file():
        return EncoderConfig(query_max_length=longest, document_max_length=longest)
    modules = read_json(directory / "modules.json")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        raise GradretError(
            f"{name}: sentence-transformers module '{(unknown or kinds or ['none'])[0]}' is not supported there; "
            "expected Transformer, Pooling and Normalize"
        )
    files = sorted((directory / modules[0]["path"]).glob("sentence_*_config.json"))  # bert, or an older name
    lengths = read_json(files[0]) if files else {}
    longest = min(lengths.get("max_seq_length") or longest, longest)
    whole = read_json(directory / "config_sentence_transformers.json")
    if whole.get("truncate_dim"):
        raise GradretError(f"{name}: truncate_dim {whole['truncate_dim']} is not supported; expected whole embeddings")
    prompts = whole.get("prompts") or {}
    return EncoderConfig(
        _read_pooling(read_json(directory / modules[1]["path"] / "config.json"), name),
        "Normalize" in kinds,
        whole.get("similarity_fn_name") or "cosine",
        prompts.get("query", ""),
        prompts.get("document", ""),
        min(lengths.get("query_length") or longest, longest),
        min(lengths.get("document_length") or longest, longest),
    )


def _read_pooling(config: dict[str, Any], name: str) -> str:
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in FOREIGN_POOLINGS or not config.get("include_prompt", True):
        raise GradretError(
            f"{name}: pooling {'+'.join(modes) or 'none'} is not supported; "
            f"expected one of {', '.join(FOREIGN_POOLINGS)}, over the prompt too"
        )
    return FOREIGN_POOLINGS[modes[0]]


# Of a chunk's longest text. At 0.7 padding adds 17 % to passages of 12 to 200 words, and more chunks cost little.
LIKE = 0.7
# Lengths are padded to a multiple: for each new shape libraries compile and keep kernels, and GPUs like it, too.
MULTIPLE = 8


def plan_chunks(lengths: Sequence[int], chunk: int) -> list[np.ndarray]:
    """Positions of texts, cut into chunks of like length, the longest texts first.

    A chunk, padded to its longest text, holds at most as many tokens as `chunk` texts of the longest length there is:
    more texts where they are shorter. It ends before a text much shorter than its longest.

    Args:
        lengths: tokens of each text, above 0.
        chunk: texts, above 0.
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
    """The next multiple of MULTIPLE."""
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

UNCOUNTED_CONFIG = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # not content


class Encoder(nn.Module):
    """A transformer with pooling; calling it gives (n, D) embeddings with gradients.

    Args:
        transformer: any transformers model that gives last_hidden_state (n, T, D).
        tokenizer: its tokenizer.
        config: see EncoderConfig.
    """

    __call__: Callable[..., Tensor]  # forward's; nn.Module says Any

    def __init__(self, transformer: Any, tokenizer: Any, config: EncoderConfig):
        super().__init__()
        self.transformer: Any  # a module with more than nn.Module has
        self.transformer, self.tokenizer, self.config = transformer, tokenizer, config
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

    def tokenize(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        """Token ids of n queries or documents, with prefix and special tokens, cut to the maximum length; int32."""
        prefix = self.config.query_prefix if kind == "query" else self.config.document_prefix
        longest = self.config.query_max_length if kind == "query" else self.config.document_max_length
        if not texts:
            return []
        ids = self.tokenizer([prefix + text for text in texts], truncation=True, max_length=longest)["input_ids"]
        # An empty text of a tokenizer without special tokens has no token: a vector needs one.
        return [np.array(row or [self.tokenizer.pad_token_id], np.int32) for row in ids]

    def embed_tokens(self, tokens: Sequence[np.ndarray]) -> Tensor:
        """(n, D) float32 embeddings of n tokenized texts, with gradients; float64 those of a float64 model."""
        most = max(self.config.query_max_length, self.config.document_max_length)
        ids, mask = pad_tokens(tokens, self.tokenizer.pad_token_id, most)
        ids, mask = ids.to(self.device), mask.to(self.device)
        hidden = self.transformer(input_ids=ids, attention_mask=mask, **self._options).last_hidden_state  # (n, T, D)
        hidden = hidden.to(self.dtype)
        embeddings = pool_tokens(hidden, mask, self.config.pooling)  # (n, D)
        return nnf.normalize(embeddings, dim=-1) if self.config.normalize else embeddings

    def forward(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """(n, D) float32 embeddings of n queries or documents, with gradients."""
        return self.embed_tokens(self.tokenize(texts, kind))

    def score(self, queries: Tensor, documents: Tensor) -> Tensor:
        """(B, D) and (N, D) embeddings to (B, N) scores under the encoder's similarity."""
        return self.search_vectors(queries) @ self.search_vectors(documents).T

    def search_vectors(self, embeddings: Tensor) -> Tensor:
        """Embeddings whose dot product is the encoder's similarity."""
        if self.config.similarity == "cosine" and not self.config.normalize:
            return nnf.normalize(embeddings, dim=-1)
        return embeddings

    def encode(
        self, texts: Sequence[str], kind: Kind = "document", *, batch_size: int = 32, precision: str = "float32"
    ) -> np.ndarray:
        """(n, D) float32 embeddings without gradients, in evaluation mode, in chunks of like length.

        Args:
            texts: n strings; () gives (0, D).
            kind: "query" or "document", chooses prefix and maximum length.
            batch_size: texts at once if all are as long as the longest; more of shorter ones.
            precision: "float32" or "bfloat16" (autocast).
        """
        result = np.zeros((len(texts), self.dimension), np.float32)
        tokens = self.tokenize(texts, kind)
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
        ours = {k: v for k, v in asdict(self.config).items() if queries or not k.startswith("query_")}
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
        directory, config = Path(directory), self.config
        directory.mkdir(parents=True, exist_ok=True)
        max_length = max(config.query_max_length, config.document_max_length)
        self.tokenizer.model_max_length = max_length
        self.transformer.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        modules = ["Transformer", "Pooling", *["Normalize"] * config.normalize]
        paths = ["", *(f"{i}_{name}" for i, name in enumerate(modules) if i)]
        for path in paths:
            (directory / path).mkdir(exist_ok=True)
        write_json(
            directory / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                for i, (name, path) in enumerate(zip(modules, paths, strict=True))
            ],
        )
        lengths = {"query_length": config.query_max_length, "document_length": config.document_max_length}
        write_json(
            directory / "sentence_bert_config.json",
            {"max_seq_length": max_length, "do_lower_case": False}
            | {key: length for key, length in lengths.items() if length != max_length},
        )
        write_json(
            directory / "1_Pooling" / "config.json",
            {"word_embedding_dimension": self.dimension}
            | {
                f"pooling_mode_{key}": config.pooling == name
                for key, name in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last"))
            }
            | {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False},
        )
        write_json(
            directory / "config_sentence_transformers.json",
            {
                "model_type": "SentenceTransformer",
                "prompts": {"query": config.query_prefix, "document": config.document_prefix},
                "default_prompt_name": None,
                "similarity_fn_name": config.similarity,
            },
        )


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
