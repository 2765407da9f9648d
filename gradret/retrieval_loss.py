"""The Wasserstein list loss from embeddings, without the matrix of scores between all queries and documents.

Every document that has no grade of its own for a query has the default grade, so the loss depends on their scores
through one log-sum-exp a query. Scores are made a tile at a time, folded into it, and forgotten; backward makes each
tile again. What is left for the loss is a short list a query: its graded documents, and one for all others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradret.grades import PreparedGrades, prepare_grades, target_weights
from gradret.ops import first_derivatives_only, transport
from gradret.tiles import Folded, Pairs, fold_tile, unfold_tile

TILE_ROWS = 2048
TILE_ELEMENTS = 1 << 20  # of a tile of scores: 4 MiB in float32


@dataclass(frozen=True)
class PreparedPairs:
    """Graded pairs of a batch, ready for wasserstein_retrieval_loss; made by prepare_pairs.

    shape: (B, N). offsets (B + 1,), columns (M,), slots (M,): the pairs by row, and their places in the short lists
    (B, K + 1), whose last document stands for all those of the default grade.
    """

    shape: tuple[int, int]
    offsets: Tensor
    columns: Tensor
    slots: Tensor
    grades: PreparedGrades

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PreparedPairs":
        """The same on another device."""
        tensors = (t.to(device, non_blocking=non_blocking) for t in (self.offsets, self.columns, self.slots))
        return PreparedPairs(self.shape, *tensors, self.grades.to(device, non_blocking=non_blocking))


def prepare_pairs(
    rows: Tensor,
    columns: Tensor,
    grades: Tensor,
    shape: tuple[int, int],
    *,
    default_grade: float = 0.0,
    targets: str | Tensor = "gain",
) -> PreparedPairs:
    """Everything of wasserstein_retrieval_loss that does not depend on the embeddings. Waits for the device on CUDA.

    Args:
        rows, columns: (M,) integer, which query and document a grade is for; in any order, no pair twice.
        grades: (M,) real.
        shape: (B, N), numbers of queries and documents.
        default_grade: of all other pairs.
        targets: "gain", "softmax", or weights (M,) >= 0 of the pairs, all others having none; see gradret.losses.

    Raises: ValueError when shapes differ, a row or column is out of range, a pair comes twice, or targets are unknown.
    """
    count, documents = shape
    if rows.dim() != 1 or rows.shape != columns.shape or rows.shape != grades.shape:
        raise ValueError(
            "rows, columns and grades must be three vectors of one length; "
            f"got {tuple(rows.shape)}, {tuple(columns.shape)} and {tuple(grades.shape)}"
        )
    if isinstance(targets, Tensor) and targets.shape != grades.shape:
        raise ValueError(f"targets must be {tuple(grades.shape)}, got {tuple(targets.shape)}")
    if not isinstance(targets, Tensor) and targets not in ("gain", "softmax"):
        raise ValueError(f"targets must be 'gain', 'softmax' or weights, got {targets!r}")
    for name, index, limit in (("row", rows, count), ("column", columns, documents)):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ValueError(f"{name}s must be integer, got {index.dtype}")
        if len(index) and not (0 <= index.min() and index.max() < limit):
            raise ValueError(f"{name}s must be 0 to {limit - 1}; got {index.min().item()} to {index.max().item()}")
    rows, columns = rows.long(), columns.long()
    key, by_row = (rows * documents + columns).sort()
    twice = (key.diff() == 0).nonzero()
    if len(twice):
        pair = divmod(key[twice[0, 0]].item(), documents)
        raise ValueError(f"the pair of row {pair[0]} and column {pair[1]} has more than one grade")
    rows, columns, real = rows[by_row], columns[by_row], grades.detach().double()[by_row]
    number = torch.bincount(rows, minlength=count)  # (B,)
    offsets = torch.cat([number.new_zeros(1), number.cumsum(0)])
    width = (int(number.max()) if count else 0) + 1
    slots = rows * width + torch.arange(len(rows), device=rows.device) - offsets[rows]

    others = documents - number  # (B,) documents of the default grade
    short = torch.full((count, width), float(default_grade), dtype=torch.float64, device=rows.device)
    short.view(-1)[slots] = real
    present = torch.zeros_like(short, dtype=torch.bool)
    present.view(-1)[slots] = True
    present[:, -1] = others > 0
    if isinstance(targets, Tensor):
        weights = torch.zeros_like(short)
        weights.view(-1)[slots] = targets.detach().double()[by_row]
    else:
        top = short.masked_fill(~present, -torch.inf).amax(-1, keepdim=True)
        weights = target_weights(short, targets, torch.where(top == -torch.inf, 0, top))
        weights[:, -1] *= others
    prepared = prepare_grades(short, targets=weights.masked_fill(~present, 0), mask=present)
    return PreparedPairs((count, documents), offsets, columns.int(), slots, prepared)


def wasserstein_retrieval_loss(
    query_embeddings: Tensor,
    document_embeddings: Tensor,
    grades: tuple[Tensor, Tensor, Tensor] | PreparedPairs,
    *,
    default_grade: float = 0.0,
    order: int = 1,
    temperature: float = 1.0,
    targets: str | Tensor = "gain",
    reduction: str = "mean",
) -> Tensor:
    """wasserstein_loss(query_embeddings @ document_embeddings.T, ...), in memory that grows with B + N, not with B x N.

    Args:
        query_embeddings: (B, D) float.
        document_embeddings: (N, D), same type and device.
        grades: (rows, columns, grades), three (M,) tensors: the grade of document columns[i] for query rows[i]. Or what
            prepare_pairs made of them, default_grade and targets.
        default_grade: of every other document.
        order, temperature, reduction: see gradret.losses.wasserstein_loss.
        targets: "gain", "softmax", or weights (M,) of the pairs.

    Returns: scalar, or (B,) for "none"; float64 for float64 embeddings, else float32, as are the scores in it.
    Raises: ValueError as wasserstein_loss and prepare_pairs.
    Source: the tiling after Inf-CL, arXiv 2410.17243, and Cut Cross-Entropy, arXiv 2411.09009; the loss as
        wasserstein_loss.
    """
    queries, documents = query_embeddings, document_embeddings
    if queries.dim() != 2 or documents.dim() != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"embeddings must be (B, D) and (N, D), got {tuple(queries.shape)}, {tuple(documents.shape)}")
    if queries.dtype != documents.dtype or queries.device != documents.device or not queries.is_floating_point():
        raise ValueError(
            "embeddings must be floating point, of one type and on one device; "
            f"got {queries.dtype} on {queries.device}, {documents.dtype} on {documents.device}"
        )
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    shape = (len(queries), len(documents))
    if not isinstance(grades, PreparedPairs):
        grades = prepare_pairs(*grades, shape, default_grade=default_grade, targets=targets)
    elif default_grade != 0 or targets != "gain":
        raise ValueError("default_grade and targets are part of prepared pairs: give them to prepare_pairs")
    if grades.shape != shape:
        raise ValueError(f"the prepared pairs are of {grades.shape} queries and documents, the embeddings of {shape}")
    if grades.offsets.device != queries.device:
        raise ValueError(f"grades must be on the embeddings' device, {queries.device}; got {grades.offsets.device}")
    return _RetrievalTransport.apply(queries, documents, grades, order, float(temperature), reduction)


def _score_tiles(queries: Tensor, documents: Tensor, dtype: torch.dtype):
    """Yields (rows, columns, their scores in `dtype`), rows outermost; each tile in the memory of the one before."""
    height = max(min(len(queries), TILE_ROWS), 1)
    width = max(min(len(documents), TILE_ELEMENTS // height), 1)
    buffer = torch.empty(height * width, dtype=dtype, device=queries.device)
    for row in range(0, len(queries), height):
        r = slice(row, min(row + height, len(queries)))
        for column in range(0, len(documents), width):
            c = slice(column, min(column + width, len(documents)))
            shape = (r.stop - r.start, c.stop - c.start)
            tile = buffer[: shape[0] * shape[1]].view(shape)
            yield r, c, torch.mm(queries[r].to(dtype), documents[c].to(dtype).T, out=tile)


class _RetrievalTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, documents, prepared, order, temperature, reduction):
        queries, documents = queries.detach(), documents.detach()
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        rows = len(queries)
        new = {"dtype": dtype, "device": queries.device}
        folded = Folded(torch.full((rows,), -torch.inf, **new), torch.zeros(rows, **new))
        pairs = Pairs(prepared.offsets, prepared.columns, torch.empty(len(prepared.columns), **new))
        with torch.autocast(queries.device.type, enabled=False):
            for r, c, tile in _score_tiles(queries, documents, dtype):
                fold_tile(tile, r.start, c.start, pairs, folded, temperature)
        short = torch.zeros(prepared.grades.shape, **new)  # (B, K + 1)
        short.view(-1)[prepared.slots] = pairs.values
        short[:, -1] = folded.top + temperature * folded.sum.log()
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss, gradient = transport(short, prepared.grades.tables, order, temperature, reduction, needs_gradient)
        ctx.save_for_backward(queries, documents, gradient, *folded)
        ctx.prepared, ctx.temperature = prepared, temperature
        return loss

    @staticmethod
    @first_derivatives_only
    def backward(ctx, grad_loss):
        queries, documents, gradient, *folded = ctx.saved_tensors
        dtype = gradient.dtype
        gradient = gradient * (grad_loss[:, None] if grad_loss.dim() else grad_loss)  # (B, K + 1)
        weight = gradient[:, -1].contiguous()
        pairs = Pairs(ctx.prepared.offsets, ctx.prepared.columns, gradient.view(-1)[ctx.prepared.slots])
        needs = ctx.needs_input_grad
        # Sums over tiles are made in `dtype`, also for embeddings of half precision.
        query_gradient = torch.zeros_like(queries, dtype=dtype) if needs[0] else None
        document_gradient = torch.zeros_like(documents, dtype=dtype) if needs[1] else None
        with torch.autocast(queries.device.type, enabled=False):
            for r, c, tile in _score_tiles(queries, documents, dtype):
                unfold_tile(tile, r.start, c.start, pairs, Folded(*folded), ctx.temperature, weight)
                if query_gradient is not None:
                    query_gradient[r].addmm_(tile, documents[c].to(dtype))
                if document_gradient is not None:
                    document_gradient[c].addmm_(tile.T, queries[r].to(dtype))
        return (
            None if query_gradient is None else query_gradient.to(queries.dtype),
            None if document_gradient is None else document_gradient.to(documents.dtype),
            *(None,) * 4,
        )
