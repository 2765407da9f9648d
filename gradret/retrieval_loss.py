"""The Wasserstein list loss from embeddings, without the matrix of scores between all queries and documents.

Every document that has no grade of its own for a query has the default grade, so the loss depends on their scores
through one log-sum-exp a query. Scores are made a tile at a time, folded into it, and forgotten; backward makes each
tile again. What is left for the loss is a short list a query: its graded documents, and one for all others.
"""

import torch
from torch import Tensor

from gradret.grades import FLOATS, Tables, check_temperature
from gradret.ops import first_derivatives_only, transport
from gradret.pairs import PreparedPairs, prepare_pairs
from gradret.reference import accumulation_dtype, result_dtype
from gradret.tiles import Folded, Pairs, fold_tile, unfold_tile

TILE_ROWS = 2048
TILE_ELEMENTS = 1 << 20  # of a tile of scores: 4 MiB in float32


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

    And with B x K, K the largest number of graded documents of a query.

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
    if queries.dtype != documents.dtype or queries.device != documents.device or queries.dtype not in FLOATS:
        raise ValueError(
            "embeddings must be floating point, of one type and on one device; "
            f"got {queries.dtype} on {queries.device}, {documents.dtype} on {documents.device}"
        )
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    check_temperature(temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not torch.is_grad_enabled():
        queries, documents = queries.detach(), documents.detach()  # then no gradient is computed
    shape = (len(queries), len(documents))
    if not isinstance(grades, PreparedPairs):
        grades = prepare_pairs(*grades, shape, default_grade=default_grade, targets=targets)
    elif default_grade != 0 or targets != "gain":
        raise ValueError("default_grade and targets are part of prepared pairs: give them to prepare_pairs")
    if grades.shape != shape:
        raise ValueError(f"the prepared pairs are of {grades.shape} queries and documents, the embeddings of {shape}")
    if grades.offsets.device != queries.device:
        raise ValueError(f"grades must be on the embeddings' device, {queries.device}; got {grades.offsets.device}")
    return _RetrievalTransport.apply(queries, documents, grades, int(order), float(temperature), reduction)


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


def _transport(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    slots: Tensor,
    index: Tensor,
    values: Tensor,
    mass: Tensor,
    counts: Tensor,
    order: int,
    temperature: float,
    reduction: str,
    needs_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss, its gradient in the short lists' scores (B, K + 1), and the folded scores' top and sum (B,)."""
    dtype, new = result_dtype(queries), {"dtype": result_dtype(queries), "device": queries.device}
    wide = new | {"dtype": accumulation_dtype(queries.device)}
    folded = Folded(torch.full(queries.shape[:1], -torch.inf, **new), torch.zeros(queries.shape[:1], **wide))
    pairs = Pairs(offsets, columns, torch.empty(columns.shape, **new))
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, dtype):
            fold_tile(tile, r.start, c.start, pairs, folded, temperature)
    short = torch.zeros(index.shape, **new)  # (B, K + 1)
    short.view(-1)[slots] = pairs.values
    short[:, -1] = folded.top + temperature * folded.sum.log()
    tables = Tables(index, values, mass, counts)
    loss, gradient = transport(short, tables, order, temperature, reduction, needs_gradient)
    return loss, gradient, *folded


def _transport_backward(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    slots: Tensor,
    gradient: Tensor,
    top: Tensor,
    total: Tensor,
    grad_loss: Tensor,
    temperature: float,
    needs_queries: bool = True,
    needs_documents: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients (B, D) and (N, D); None for what is not needed."""
    dtype = gradient.dtype
    gradient = gradient * (grad_loss[:, None] if grad_loss.dim() else grad_loss)  # (B, K + 1)
    weight = gradient[:, -1].contiguous()
    pairs = Pairs(offsets, columns, gradient.view(-1)[slots])
    # Sums over tiles are made in `dtype`, also for embeddings of half precision.
    of_queries = torch.zeros(queries.shape, dtype=dtype, device=queries.device) if needs_queries else None
    of_documents = torch.zeros(documents.shape, dtype=dtype, device=queries.device) if needs_documents else None
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, dtype):
            unfold_tile(tile, r.start, c.start, pairs, Folded(top, total), temperature, weight)
            if needs_queries:
                of_queries[r].addmm_(tile, documents[c].to(dtype))
            if needs_documents:
                of_documents[c].addmm_(tile.T, queries[r].to(dtype))
    return (
        of_queries.to(queries.dtype) if needs_queries else None,
        of_documents.to(documents.dtype) if needs_documents else None,
    )


@torch.library.custom_op("gradret::retrieval_transport", mutates_args=())
def retrieval_transport_op(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    slots: Tensor,
    index: Tensor,
    values: Tensor,
    mass: Tensor,
    counts: Tensor,
    order: int,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables = (index, values, mass, counts)
    return _transport(queries, documents, offsets, columns, slots, *tables, order, temperature, reduction)


@retrieval_transport_op.register_fake
def _(queries, documents, offsets, columns, slots, index, values, mass, counts, order, temperature, reduction):
    new = {"dtype": result_dtype(queries), "device": queries.device}
    rows = queries.shape[:1]
    loss = torch.empty(rows if reduction == "none" else (), **new)
    total = torch.empty(rows, dtype=accumulation_dtype(queries.device), device=queries.device)
    return loss, torch.empty(index.shape, **new), torch.empty(rows, **new), total


@torch.library.custom_op("gradret::retrieval_transport_backward", mutates_args=())
def retrieval_transport_backward_op(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    slots: Tensor,
    gradient: Tensor,
    top: Tensor,
    total: Tensor,
    grad_loss: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    folded = (gradient, top, total)
    return _transport_backward(queries, documents, offsets, columns, slots, *folded, grad_loss, temperature)


@retrieval_transport_backward_op.register_fake
def _(queries, documents, offsets, columns, slots, gradient, top, total, grad_loss, temperature):
    return queries.new_empty(queries.shape), documents.new_empty(documents.shape)


class _RetrievalTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, documents, prepared, order, temperature, reduction):
        places = (prepared.offsets, prepared.columns, prepared.slots)
        options = (order, temperature, reduction)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if torch.compiler.is_compiling():
            loss, *saved = retrieval_transport_op(queries, documents, *places, *prepared.grades.tables, *options)
        else:
            loss, *saved = _transport(queries, documents, *places, *prepared.grades.tables, *options, needs)
        ctx.save_for_backward(queries, documents, *places, *saved)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @first_derivatives_only
    def backward(ctx, grad_loss):
        if torch.compiler.is_compiling():
            found = retrieval_transport_backward_op(*ctx.saved_tensors, grad_loss, ctx.temperature)
        else:
            found = _transport_backward(*ctx.saved_tensors, grad_loss, ctx.temperature, *ctx.needs_input_grad[:2])
        return *found, None, None, None, None
