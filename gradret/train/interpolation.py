"""How much of what an encoder has learnt it keeps: weights between its own and the trained ones."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradret.data.collections import ListCollection
from gradret.data.lists import RankingList
from gradret.data.sources import ListsSummary
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import evaluate

SHARES = (0.25, 0.5, 1.0)  # what is tried, of the way from the encoder's own weights to the trained ones
MEASURE, CLOSE = "nDCG@10", 0.02
POOL = 512  # passages ranked, if the lists have so many: among fewer it hardly shows what more training is worth


def make_held_out(lists: Sequence[RankingList], summary: ListsSummary) -> ListCollection | None:
    """The held-out lists as queries, and as documents their passages, filled up to POOL with those of other lists.

    Grades that are no measure's, not whole or none above 0, become their ranks.
    Returns: None where no list is held out.
    """
    if not len(summary.held_out):
        return None
    room = max(1, int(POOL * len(summary.kept) / summary.passages) - len(summary.held_out))
    held_out, others = (
        [lists[row] for row in rows.tolist()]
        for rows in (summary.held_out, summary.kept[:: math.ceil(len(summary.kept) / room)])
    )
    grades = sorted({passage.grade for entry in held_out for passage in entry.passages})
    is_measured = grades[-1] > 0 and all(float(grade).is_integer() for grade in grades)
    shown = dict(zip(grades, grades if is_measured else range(len(grades)), strict=True))

    def make_anonymous(name: str, entries: list[RankingList]) -> Iterator[RankingList]:
        """With ids of our own: those of different sources may be the same."""
        for number, entry in enumerate(entries):
            passages = [replace(p, doc_id=None, grade=shown.get(p.grade, p.grade)) for p in entry.passages]
            yield replace(entry, query_id=f"{name}{number}", passages=passages)

    return ListCollection("the held-out lists", make_anonymous("q", held_out), make_anonymous("other", others))


def measure_share(
    encoder: Encoder,
    start: dict[str, Tensor],
    share: float,
    held_out: ListCollection,
    *,
    precision: str,
    processes: Processes = ALONE,
    give_up: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """nDCG@10 of the held-out lists at a share of the way; 0 is the encoder as it came.

    Args:
        give_up: what may be cut short; the weights are then put back.
    """
    options = {"measures": [MEASURE], "precision": precision, "progress": False, "processes": processes}
    with interpolated(encoder, start, share), give_up():
        return evaluate(encoder, held_out, **options).measures[MEASURE]


def choose_share(means: Mapping[float, float]) -> float:
    """The least of SHARES whose mean is within CLOSE of the best: far weights lose what the encoder can do elsewhere.

    No test of significance, which from ten lists would show nothing but the largest differences.
    """
    return next(share for share in SHARES if means[share] >= max(means[s] for s in SHARES) - CLOSE)


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
