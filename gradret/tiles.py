"""Tiles of the score matrix between queries and documents: folded into one log-sum-exp a query, and unfolded again.

Pairs with a grade of their own are no part of the log-sum-exp: folding takes their scores out of the tile, unfolding
puts their gradients in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradret.kernels import backend, compiled, current_stream


class Pairs(NamedTuple):
    """M graded pairs by row. offsets: (B + 1,) int64. columns: (M,) int32, ascending in a row. values: (M,) float."""

    offsets: Tensor
    columns: Tensor
    values: Tensor


class Folded(NamedTuple):
    """The log-sum-exp of each row so far: top, (B,), the highest score; sum, (B,), of exp((s - top) / temperature).

    The sum is float64 where the device has it."""

    top: Tensor
    sum: Tensor


def fold_tile(tile: Tensor, first_row: int, first_column: int, pairs: Pairs, folded: Folded, temperature: float):
    """Take a tile (R, C) into rows first_row to first_row + R of `folded`, and its pairs' scores into pairs.values.

    The tile is overwritten.
    """
    rows = slice(first_row, first_row + len(tile))
    if _call_kernel("fold_tile", tile, first_row, first_column, pairs, folded, temperature, None):
        return
    index, row, column = _find_pairs(tile, first_row, first_column, pairs)
    pairs.values[index] = tile[row, column]
    tile[row, column] = -torch.inf
    top = torch.maximum(folded.top[rows], tile.amax(-1))
    base = torch.where(top == -torch.inf, 0, top)
    before = folded.sum[rows] * ((folded.top[rows] - base) / temperature).exp()
    folded.sum[rows] = before + ((tile - base[:, None]) / temperature).exp_().sum(-1, dtype=folded.sum.dtype)
    folded.top[rows] = top


def unfold_tile(
    tile: Tensor, first_row: int, first_column: int, pairs: Pairs, folded: Folded, temperature: float, weight: Tensor
):
    """Overwrite a tile of scores (R, C) with gradients: pairs.values for pairs, else weight (B,) times the softmax."""
    rows = slice(first_row, first_row + len(tile))
    if _call_kernel("unfold_tile", tile, first_row, first_column, pairs, folded, temperature, weight):
        return
    share = weight[rows] / torch.where(folded.sum[rows] == 0, 1, folded.sum[rows])
    base = torch.where(folded.top[rows] == -torch.inf, 0, folded.top[rows])
    tile.sub_(base[:, None]).div_(temperature).clamp_max_(0).exp_().mul_(share[:, None].to(tile.dtype))
    tile[share == 0] = 0
    index, row, column = _find_pairs(tile, first_row, first_column, pairs)
    tile[row, column] = pairs.values[index]


def _find_pairs(tile: Tensor, first_row: int, first_column: int, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs lie in the tile, and where in it."""
    begin, end = pairs.offsets[first_row].item(), pairs.offsets[first_row + len(tile)].item()
    column = pairs.columns[begin:end].long() - first_column
    index = ((column >= 0) & (column < tile.shape[1])).nonzero()[:, 0]
    column = column[index]
    index += begin
    row = torch.searchsorted(pairs.offsets, index, right=True) - 1 - first_row
    return index, row, column


def _call_kernel(name, tile, first_row, first_column, pairs, folded, temperature, weight) -> bool:
    path = backend(tile.device)
    if path == "torch" or tile.dtype != torch.float32:
        return False
    where = (tile.device.index, current_stream(tile.device)) if path == "cuda" else (torch.get_num_threads(),)
    getattr(compiled, f"{name}_{path}")(
        *where,
        tile.data_ptr(),
        *tile.shape,
        tile.stride(0),
        first_column,
        pairs.offsets[first_row:].data_ptr(),
        pairs.columns.data_ptr(),
        pairs.values.data_ptr(),
        temperature,
        folded.top[first_row:].data_ptr(),
        folded.sum[first_row:].data_ptr(),
        0 if weight is None else weight[first_row:].data_ptr(),
    )
    return True
