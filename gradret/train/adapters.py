"""What lets a large encoder be trained in little memory: low-rank adapters, and activations computed again."""

import math
import re
import warnings

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradret.console import GradretError
from gradret.data.lists import hash64
from gradret.encoder.model import Encoder
from gradret.settings import FitSettings

LINEAR = (nn.Linear, Conv1D)  # GPT-2 writes its linear layers as Conv1D


def adapt(encoder: Encoder, settings: FitSettings) -> None:
    """Make the encoder train as settings.lora* and settings.gradient_checkpointing say, in place.

    With lora, y = W x becomes y = W x + (lora_alpha / lora) B A x in the chosen linear layers: W and all other weights
    are frozen, A (lora, inputs) and B (outputs, lora) are trained in float32 whatever W's type is. B starts at zero, so
    the encoder starts unchanged; A depends on settings.seed alone. torch's global random state is left as it was.

    Raises: GradretError when peft is not installed, a name in lora_targets has no linear layer, or the model cannot
        compute its activations again.
    Source: Hu et al. (2021), LoRA, arXiv 2106.09685.
    """
    transformer = encoder.transformer
    if settings.lora:
        encoder.transformer = _add_adapters(transformer, settings)
    if settings.gradient_checkpointing:
        _recompute_activations(transformer, settings.model)


def merge_adapters(encoder: Encoder) -> None:
    """Put the adapters, if there are any, into the weights, in place; no trace of peft is left.

    W + (lora_alpha / lora) B A is computed in float32 and rounded to the type of W once. In bfloat16 that drops what is
    smaller than half of W's last digit, 1 part in 512: cast the encoder to float32 before, where this matters.
    """
    merge = getattr(encoder.transformer, "merge_and_unload", None)
    if merge is not None:
        # peft adds its float32 B A to the weight in place, where PyTorch computes in the wider of the two types.
        encoder.transformer = merge().requires_grad_(True)


def _add_adapters(transformer: nn.Module, settings: FitSettings) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise GradretError("--lora needs the package peft: pip install 'gradret[lora]'") from None
    paths = _find_targets(transformer, settings.lora_targets, settings.model)
    config = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="|".join(map(re.escape, paths)),  # a pattern has to match as a whole, names in a list do not
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # of Conv1D, which it then sets
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft reads it by its older name
        try:
            adapted = get_peft_model(transformer, config)
        except ValueError as error:  # kinds of layers that peft knows not to work
            raise GradretError(f"{settings.model}: cannot get adapters: {error}") from error
    # Drawn here once more: peft draws from the global generator, and rounds to the frozen weights' type.
    generator = torch.Generator().manual_seed(hash64("adapters", str(settings.seed)) >> 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                drawn = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
    return adapted


def _find_targets(transformer: nn.Module, names: tuple[str, ...], model: str) -> list[str]:
    """Paths of the linear layers that get adapters. Raises: GradretError when a name has none."""
    # A pooler is no part of an embedding here: it would have no gradient.
    linear = [p for p, m in transformer.named_modules() if isinstance(m, LINEAR) and "pooler" not in p]
    for name in names:
        if not any(_ends_in(path, name) for path in linear):
            last = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise GradretError(f"lora_targets {name}: matches no linear layer of {model}; it has: {', '.join(last)}")
    if not linear:
        raise GradretError(f"{model}: has no linear layers for adapters; train without --lora")
    return [path for path in linear if not names or any(_ends_in(path, name) for name in names)]


def _ends_in(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _recompute_activations(transformer: nn.Module, model: str) -> None:
    # The newer name first: under the older one transformers warns, which in time is to go.
    enable = getattr(transformer, "activation_checkpointing_enable", None)
    enable = enable or getattr(transformer, "gradient_checkpointing_enable", None)
    if not getattr(transformer, "supports_gradient_checkpointing", False) or enable is None:
        raise GradretError(
            f"{model}: {type(transformer).__name__} cannot compute its activations again; "
            "train without --gradient-checkpointing, with a smaller --chunk"
        )
    enable({"use_reentrant": False})
