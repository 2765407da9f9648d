"""Tokenized texts in chunks of like length: which texts together, in which order, and which process has which."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def plan_chunks(lengths: Sequence[int], chunk: int) -> list[np.ndarray]:
    """Positions of texts, cut into chunks of like length, the longest texts first.

    A chunk, padded to its longest text, holds at most as many tokens as `chunk` texts of the longest length there is:
    more texts where they are shorter.

    Args:
        lengths: tokens of each text, above 0.
        chunk: texts, above 0.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return []
    order = np.argsort(-lengths, kind="stable")
    budget, start, plan = chunk * int(lengths.max()), 0, []
    while start < len(order):
        size = budget // int(lengths[order[start]])
        plan.append(order[start : start + size])
        start += size
    return plan


def deal_chunks(plan: Sequence[np.ndarray], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The chunks of each process, by their numbers: each to the process with the fewest padded tokens so far."""
    load = np.zeros(processes, np.int64)
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for number, rows in enumerate(plan):
        process = int(load.argmin())
        dealt[process].append(number)
        load[process] += len(rows) * lengths[rows[0]]
    return dealt


def pad_tokens(tokens: Sequence[np.ndarray], padding: int, side: str) -> tuple[Tensor, Tensor]:
    """(n, T) int64 token ids and attention mask of n texts; padding stands on the "left" or "right"."""
    longest = max(len(row) for row in tokens)
    ids = np.full((len(tokens), longest), padding, np.int64)
    mask = np.zeros((len(tokens), longest), np.int64)
    for i, row in enumerate(tokens):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
