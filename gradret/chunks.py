"""Tokenized texts in chunks of like length: which texts together, in which order, and which process has which."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
