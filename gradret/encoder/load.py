"""Loading an encoder from a directory or the hub, whole and on a device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from gradret.console import GradretError, count_of, show_wait
from gradret.encoder.hub import find_weights, locate_encoder
from gradret.encoder.model import Encoder, read_config
from gradret.settings import DEFAULT_ENCODER, POOLINGS, SIMILARITIES

MAX_LENGTH_CAP = 8192  # where neither tokenizer nor model says how much it can read


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    device: str | torch.device | None = None,
    weights: str = "float32",
    layers: int | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Encoder:
    """An Encoder from a transformers or sentence-transformers directory or hub repository.

    Args:
        name: directory or OWNER/NAME.
        device: None picks cuda, mps or cpu, the first there is.
        weights: "float32" or "bfloat16", their type in memory.
        layers: of the transformer that are kept, from the first on; None for all.
        trust_remote_code: run the repository's own model code.
        overrides: fields of EncoderConfig that replace what the directory says; None leaves it.

    Raises: GradretError when there are no safetensors weights, a module is not supported or a value is wrong.
    """
    directory = locate_encoder(name, trust_remote_code=trust_remote_code)
    device = choose_device(device)
    place = find_weights(directory) or directory
    with show_wait(f"loading {name}"):
        transformer, tokenizer = _load_parts(place, name, weights, layers, trust_remote_code)
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


def _load_parts(
    directory: Path, name: str, weights: str, layers: int | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The transformer, all of whose weights were found, and its tokenizer."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    if layers is not None:  # it would list the weights of the others
        transformers_logging.set_verbosity_error()
    try:
        model_config = AutoConfig.from_pretrained(directory, **options)
        if layers is not None:
            _keep_layers(model_config, layers, name)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        # Of an encoder-decoder such as T5 only the encoder is wanted.
        auto = AutoModelForTextEncoding if type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        transformer, info = auto.from_pretrained(
            directory,
            config=model_config,
            use_safetensors=True,
            dtype=getattr(torch, weights),
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise GradretError(
                f"{name}: needs model code of its own; read that code, then allow it with --trust-remote-code"
            ) from error
        raise GradretError(f"{name}: cannot be loaded as an encoder: {' '.join(str(error).split())[:300]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # A pooler is no part of an embedding here; anything else that is missing would be random.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise GradretError(f"{name}: {len(missing)} weights are not in its safetensors, {missing[0]} among them")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise GradretError(
            f"{name}: its tokenizer knows no words; expected tokenizer.json or a vocabulary beside the model"
        )
    if any(tokenizer("a").get("token_type_ids", ())):
        raise GradretError(f"{name}: its tokenizer marks tokens by type, which is not supported here")
    return transformer, tokenizer


def _keep_layers(model_config: PretrainedConfig, layers: int, name: str) -> None:
    """Make the model as shallow as that; weights of later layers are then not read."""
    there = getattr(model_config, "num_hidden_layers", None)
    if there is None or layers > there:
        found = "no countable layers" if there is None else count_of(there, "layer")
        raise GradretError(f"{name}: has {found}, of which {layers} cannot be kept")
    model_config.num_hidden_layers = layers
    if getattr(model_config, "layer_types", None):  # of decoders whose layers differ
        model_config.layer_types = model_config.layer_types[:layers]


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


def choose_precision(precision: str, device: torch.device) -> str:
    """ "auto" resolved: bfloat16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and supported() else "float32"
