"""Loading an encoder from a directory or the hub, whole and on a device."""

import re
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
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

from gradret.console import GradretError, count_of, is_first_process, say, show_wait
from gradret.encoder.directory import Description, EncoderConfig, find_transformer, locate_encoder, read_description
from gradret.encoder.model import Encoder
from gradret.settings import DEFAULT_ENCODER, POOLINGS, SIMILARITIES

LONGEST = 8192  # tokens that are read where neither directory nor tokenizer nor model says how many
POSITIONS = re.compile(r"(position\w*|wpe)$")  # the path of a table of positions in a model
UNLIMITED = 10**9  # a tokenizer's maximum length from here on says that it has none


def load_encoder(
    name: str | Path = DEFAULT_ENCODER,
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

    Raises: GradretError when there are no safetensors weights, something that the directory says is not supported or a
        value is wrong; TypeError or ValueError for an argument of another kind.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be a directory or a hub repository's name, got {name!r:.100}")
    if weights not in ("float32", "bfloat16"):
        raise ValueError(f"weights must be 'float32' or 'bfloat16', got {weights!r}")
    if layers is not None and (not isinstance(layers, Integral) or layers < 1):
        raise ValueError(f"layers must be a whole number from 1 on, got {layers!r}")
    overrides = {key: value for key, value in overrides.items() if value is not None}
    _check_overrides(overrides)
    name = str(name)
    directory = locate_encoder(name, trust_remote_code=trust_remote_code)
    device = choose_device(device)
    description = read_description(directory)
    with show_wait(f"loading {name}"):
        place = find_transformer(directory)
        transformer, tokenizer = _load_parts(place, description, name, weights, layers, trust_remote_code)
    query_length, document_length, most = _find_lengths(description, transformer, tokenizer)
    config = replace(description.config, query_max_length=query_length, document_max_length=document_length)
    config = replace(config, **overrides)
    if config.pooling not in POOLINGS:
        raise GradretError(f"{name}: pooling '{config.pooling}' is not one of {', '.join(POOLINGS)}")
    if config.similarity not in SIMILARITIES:
        raise GradretError(f"{name}: similarity '{config.similarity}' is not one of {', '.join(SIMILARITIES)}")
    shortest = tokenizer.num_special_tokens_to_add() + 1
    for length in (config.query_max_length, config.document_max_length):
        if length not in range(shortest, most + 1):
            raise GradretError(f"{name}: maximum length {length} is not between {shortest} and {most} tokens")
    return Encoder(transformer, tokenizer, config).to(device).eval()


def _check_overrides(overrides: dict[str, Any]) -> None:
    """Whole numbers become int, in place. Raises: TypeError for another field, or a value of another kind."""
    defaults = asdict(EncoderConfig())
    for key, value in overrides.items():
        if key not in defaults:
            raise TypeError(f"'{key}' is no field of EncoderConfig; those are {', '.join(defaults)}")
        kind = str if key == "default_prompt_name" else type(defaults[key])
        if isinstance(value, np.generic):
            overrides[key] = value = value.item()
        if type(value) is not kind:
            raise TypeError(f"{key} must be a {kind.__name__}, got {value!r:.100}")


def _load_parts(
    place: Path, description: Description, name: str, weights: str, layers: int | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The transformer, all of whose weights were found, and its tokenizer."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    if layers is not None:  # it would list the weights of the others
        transformers_logging.set_verbosity_error()
    try:
        model_config = AutoConfig.from_pretrained(place, **{**description.model_options, **options})
        if layers is not None:
            _keep_layers(model_config, int(layers), name)
        tokenizer = AutoTokenizer.from_pretrained(place, **{**description.tokenizer_options, **options})
        # Of an encoder-decoder such as T5 only the encoder is wanted.
        auto = AutoModelForTextEncoding if type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        transformer, info = auto.from_pretrained(
            place,
            config=model_config,
            use_safetensors=True,
            dtype=getattr(torch, weights),
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise GradretError(
                f"{name}: needs model code of its own; read that code, then allow it with --trust-remote-code"
            ) from error
        raise GradretError(f"{name}: cannot be loaded as an encoder: {' '.join(str(error).split())[:300]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(model_config, "auto_map", None) and not trust_remote_code and is_first_process():
        kind = type(transformer).__name__
        say(f"{name}: its own model code is not run, transformers' {kind} is; for the former, --trust-remote-code")
    # A pooler is no part of an embedding here; anything else that is missing would be random.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise GradretError(f"{name}: {len(missing)} weights are not in its safetensors, {missing[0]} among them")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise GradretError(
            f"{name}: its tokenizer knows no words; expected tokenizer.json or a vocabulary beside the model"
        )
    if description.config.lower_case and not tokenizer.is_fast:
        raise GradretError(f"{name}: do_lower_case is not supported with a tokenizer that is written in Python")
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


def _find_lengths(description: Description, transformer: nn.Module, tokenizer: Any) -> tuple[int, int, int]:
    """How many tokens of a query and of a document are read, and how many the model can take."""
    stated = getattr(transformer.config, "max_position_embeddings", None)
    if stated == -1:  # XLNet has no limit
        stated = None
    usual = tokenizer.model_max_length
    if stated is not None and "model_max_length" not in description.tokenizer_options:
        usual = min(usual, stated)
    if usual >= UNLIMITED:
        usual = LONGEST
    query, document = (usual if n is None else n for n in (description.query_length, description.document_length))
    # Where there is no table, positions are computed, and a directory may name a greater length than the model does.
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)  # as RoBERTa counts
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Embedding) and POSITIONS.search(path)
    ]
    if tables and stated is not None:
        tables.append(stated)
    most = min(tables) if tables else max(query, document, stated or 0)
    return min(query, most), min(document, most), most


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that is there.

    Raises: GradretError when there is no such device; TypeError for something else.
    """
    if not isinstance(device, str | torch.device | None):
        raise TypeError(f"device must be a name such as 'cpu', or a torch.device, got {device!r:.100}")
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
