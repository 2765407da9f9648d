"""Weights between those that an encoder began with and those that training gave it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradret.encoder import Encoder


class Interpolation:
    """The way from the weights that an encoder has now to those that it will be given, and how far to go it.

    Of low-rank adapters, whose product is 0 at the beginning, the product goes so far.

    Args:
        encoder: as it is before training; its trained weights are copied to the CPU, unless `share` is 1.
        share: of the way, above 0; 1 for all of it.
    Source: Wortsman et al. (2022), Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """

    def __init__(self, encoder: Encoder, share: float):
        self.share = share
        self._start = _copy(encoder) if share < 1 else {}

    def apply(self, encoder: Encoder) -> None:
        """Take the encoder's weights back from where they are to `share` of the way, in place."""
        parameters = dict(encoder.named_parameters())
        with torch.no_grad():
            for name, start in self._start.items():
                parameters[name].copy_(torch.lerp(start.to(parameters[name].device), parameters[name], self.share))

    @contextmanager
    def applied(self, encoder: Encoder) -> Iterator[None]:
        """While the encoder has those weights; after that it has its own again."""
        own = _copy(encoder) if self._start else {}
        try:
            self.apply(encoder)
            yield
        finally:
            parameters = dict(encoder.named_parameters())
            with torch.no_grad():
                for name, tensor in own.items():
                    parameters[name].copy_(tensor)


def _copy(encoder: Encoder) -> dict[str, Tensor]:
    # B A is what an adapter adds: B, which starts at 0, takes it back alone.
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name
    }
