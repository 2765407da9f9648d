"""How much of what an encoder has learnt it keeps: weights between its own and the trained ones."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradret.data.collections import ListCollection
from gradret.data.lists import RankingList
from gradret.data.sources import ListsSummary
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import evaluate
from gradret.evaluation.significance import find_differences, randomisation_tests
from gradret.settings import AUTO, FitSettings

SHARES = (0.25, 0.5, 1.0)  # what is tried, of the way from the encoder's own weights to the trained ones
MEASURE, LEVEL = "nDCG@10", 0.05
LEAST_LISTS, MOST_HELD = 100, 256  # from so many lists on a tenth is held out, at most so many
POOL = 512  # passages that are ranked, if the lists have so many: fewer are too easy to show what training is worth


def share_held_out(settings: FitSettings, count: int) -> float:
    """Which share of so many lists is held out from training."""
    return min(0.1, MOST_HELD / count) if settings.interpolate == AUTO and count >= LEAST_LISTS else 0.0


def make_held_out(lists: Sequence[RankingList], summary: ListsSummary) -> ListCollection | None:
    """The held-out lists as queries, and as documents their passages with those of some that are trained on.

    Returns: None where no list is held out.
    """
    held_out, kept = summary.held_out, summary.kept
    if not len(held_out):
        return None
    room = max(1, int(POOL * len(kept) / summary.passages) - len(held_out))  # for so many others
    others = kept[:: math.ceil(len(kept) / room)]
    chosen = (lists[position] for position in [*held_out.tolist(), *others.tolist()])
    anonymous = (  # ids of different sources may be the same
        replace(entry, query_id=str(number), passages=[replace(p, doc_id=None) for p in entry.passages])
        for number, entry in enumerate(chosen)
    )
    collection = ListCollection("the held-out lists", anonymous)
    for number in range(len(held_out), len(held_out) + len(others)):
        del collection.queries[str(number)], collection.qrels[str(number)]
    return collection


def measure_shares(
    encoder: Encoder, start: dict[str, Tensor], held_out: ListCollection, precision: str, processes: Processes = ALONE
) -> dict[float, dict[str, float]]:
    """Share of the way -> query -> nDCG@10 of the held-out lists; 0 is the encoder as it came."""
    found = {}
    for share in (0.0, *SHARES):
        with interpolated(encoder, start, share):
            options = {"measures": [MEASURE], "precision": precision, "progress": False, "processes": processes}
            found[share] = evaluate(encoder, held_out, **options).per_query[MEASURE]
    return found


def choose_share(found: dict[float, dict[str, float]]) -> float:
    """The least of SHARES that is not measurably worse than the best of them: paired randomisation test, p < .05.

    Weights far from an encoder's own lose what it can do elsewhere, so they must be worth it. In the manner of the rule
    of one standard error, Breiman et al. (1984), Classification and Regression Trees.
    """
    best = max(SHARES, key=lambda share: float(np.mean([*found[share].values()])))
    p_values = randomisation_tests([[find_differences(found[best], found[share])] for share in SHARES])
    return next(s for s, p in zip(SHARES, p_values, strict=True) if s == best or p is None or p >= LEVEL)


def copy_trained(encoder: Encoder) -> dict[str, Tensor]:
    """The weights that are trained, on the CPU; of low-rank adapters B alone.

    B A is what an adapter adds, and B starts at 0: taken back by a share, it takes the product back by that share.
    """
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name
    }


def interpolate(encoder: Encoder, start: dict[str, Tensor], share: float) -> None:
    """Take weights back from where they are to `share` of the way from `start`, in place; those not in it stay.

    Source: Wortsman et al. (2022), Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """
    parameters = dict(encoder.named_parameters())
    with torch.no_grad():
        for name, tensor in start.items():
            parameters[name].copy_(torch.lerp(tensor.to(parameters[name].device), parameters[name], share))


@contextmanager
def interpolated(encoder: Encoder, start: dict[str, Tensor], share: float) -> Iterator[None]:
    """While the encoder has those weights; after that it has its own again, to the bit."""
    own = copy_trained(encoder) if start else {}
    try:
        interpolate(encoder, start, share)
        yield
    finally:
        parameters = dict(encoder.named_parameters())
        with torch.no_grad():
            for name, tensor in own.items():
                parameters[name].copy_(tensor)
