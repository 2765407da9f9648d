"""The bi-encoder: load, pool, encode, and save as a sentence-transformers directory."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from gradret.encoder_config import EncoderConfig, read_config
from gradret.errors import GradretError
from gradret.files import write_json
from gradret.hub import find_weights, locate_encoder
from gradret.settings import DEFAULT_ENCODER, POOLINGS, SIMILARITIES

Kind = Literal["query", "document"]

UNCOUNTED_CONFIG = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # not content
MAX_LENGTH_CAP = 8192  # where neither tokenizer nor model says how much it can read


class Encoder(nn.Module):
    """A transformer with pooling; calling it gives (n, D) embeddings with gradients.

    Args:
        transformer: any transformers model that gives last_hidden_state (n, T, D).
        tokenizer: its tokenizer.
        config: see EncoderConfig.
    """

    def __init__(self, transformer: nn.Module, tokenizer, config: EncoderConfig):
        super().__init__()
        self.transformer, self.tokenizer, self.config = transformer, tokenizer, config
        if tokenizer.pad_token is None:  # padding is masked out: any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        return self.transformer.config.hidden_size

    def forward(self, texts: Sequence[str], kind: Kind) -> Tensor:
        """(n, D) float32 embeddings of n queries or documents."""
        prefix = self.config.query_prefix if kind == "query" else self.config.document_prefix
        tokens = self.tokenizer(
            [prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.config.query_max_length if kind == "query" else self.config.document_max_length,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.transformer(**tokens).last_hidden_state.float()  # (n, T, D)
        embeddings = pool_tokens(hidden, tokens["attention_mask"], self.config.pooling)  # (n, D)
        return nnf.normalize(embeddings, dim=-1) if self.config.normalize else embeddings

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
        """(n, D) float32 embeddings without gradients, in evaluation mode, batched by like length.

        Args:
            texts: n strings; () gives (0, D).
            kind: "query" or "document", chooses prefix and maximum length.
            batch_size: texts at once.
            precision: "float32" or "bfloat16" (autocast).
        """
        result = np.zeros((len(texts), self.dimension), np.float32)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode(), autocast(self.device, precision):
                for rows in _like_lengths(texts, batch_size):
                    result[rows] = self([texts[i] for i in rows], kind).cpu().numpy()
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


def load(
    name: str = DEFAULT_ENCODER,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **overrides,
) -> Encoder:
    """An Encoder from a transformers or sentence-transformers directory or hub repository, in float32.

    Args:
        name: directory or OWNER/NAME.
        device: None picks cuda, mps or cpu, the first there is.
        trust_remote_code: run the repository's own model code.
        overrides: fields of EncoderConfig that replace what the directory says; None leaves it.

    Raises: GradretError when there are no safetensors weights, a module is not supported or a value is wrong.
    """
    directory = locate_encoder(name, trust_remote_code=trust_remote_code)
    device = choose_device(device)
    transformer, tokenizer = _load_parts(find_weights(directory), name, trust_remote_code)
    readable = _count_positions(transformer)
    config = read_config(directory, name, min(tokenizer.model_max_length, readable))
    config = replace(config, **{key: value for key, value in overrides.items() if value is not None})
    if config.pooling not in POOLINGS:
        raise GradretError(f"{name}: pooling '{config.pooling}' is not one of {', '.join(POOLINGS)}")
    if config.similarity not in SIMILARITIES:
        raise GradretError(f"{name}: similarity '{config.similarity}' is not one of {', '.join(SIMILARITIES)}")
    shortest = tokenizer.num_special_tokens_to_add() + 1
    for length in (config.query_max_length, config.document_max_length):
        if not shortest <= length <= readable:
            raise GradretError(f"{name}: maximum length {length} is not between {shortest} and {readable} tokens")
    return Encoder(transformer, tokenizer, config).to(device).eval()


def _load_parts(directory: Path, name: str, trust_remote_code: bool) -> tuple:
    """The transformer, all of whose weights were found, and its tokenizer."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(directory, **options)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        # Of an encoder-decoder such as T5 only the encoder is wanted.
        auto = AutoModelForTextEncoding if type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        transformer, info = auto.from_pretrained(
            directory,
            config=model_config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise GradretError(
                f"{name}: needs model code of its own; read that code, then allow it with --trust-remote-code"
            ) from error
        raise GradretError(f"{name}: can not be loaded as an encoder: {' '.join(str(error).split())[:300]}") from error
    # A pooler is no part of an embedding here; anything else that is missing would be random.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise GradretError(f"{name}: {len(missing)} weights are not in its safetensors, {missing[0]} among them")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise GradretError(
            f"{name}: its tokenizer knows no words; expected tokenizer.json or a vocabulary beside the model"
        )
    return transformer, tokenizer


def _count_positions(transformer: nn.Module) -> int:
    """How many tokens the model can take; RoBERTa's first positions belong to padding."""
    positions = getattr(transformer.config, "max_position_embeddings", None) or MAX_LENGTH_CAP
    for path, module in transformer.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    return min(positions, MAX_LENGTH_CAP)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that is there. Raises: GradretError."""
    try:
        found = torch.device(device or default_device())
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise GradretError(f"device '{device}' is not there ({str(error).splitlines()[0]})") from None
    return found


def default_device() -> str:
    """The first of cuda, mps and cpu that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def autocast(device: torch.device, precision: str):
    """Autocast to bfloat16 on the device, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _like_lengths(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
