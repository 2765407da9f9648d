"""The Wasserstein list loss from embeddings, without the matrix of scores between all queries and documents.

Every document that has no grade of its own for a query has the default grade, so the loss depends on their scores
through one log-sum-exp a query. Scores are made a tile at a time, folded into it, and forgotten; backward makes each
tile again. What is left for the loss is a short list a query: its graded documents, and one for all others.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.loss.grades import FLOATS, accumulation_dtype, check_temperature, result_dtype
from gradret.loss.kernels import address, backend, compiled, current_stream
from gradret.loss.pairs import PreparedPairs, ShortLists, prepare_pairs
from gradret.loss.reference import masked_softmax
from gradret.loss.transport import check_options, first_derivatives_only, transport
from gradret.settings import DEFAULT_GROUND, DEFAULT_ORDER, DEFAULT_TARGETS, DEFAULT_TEMPERATURE, parse_loss


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
    arguments = compiled.Tile(
        address(tile),
        *tile.shape,
        tile.stride(0),
        first_column,
        address(pairs.offsets[first_row:]),
        address(pairs.columns),
        address(pairs.values),
        temperature,
        address(folded.top[first_row:]),
        address(folded.sum[first_row:]),
        address(None if weight is None else weight[first_row:]),
    )
    where = (tile.device.index, current_stream(tile.device)) if path == "cuda" else (torch.get_num_threads(),)
    getattr(compiled, f"{name}_{path}")(arguments, *where)
    return True


TILE_ROWS = 2048
TILE_ELEMENTS = 1 << 20  # of a tile of scores: 4 MiB in float32


def wasserstein_retrieval_loss(
    query_embeddings: Tensor,
    document_embeddings: Tensor,
    grades: tuple[Tensor, Tensor, Tensor] | PreparedPairs,
    *,
    loss: str = "wasserstein",
    default_grade: float = 0.0,
    order: int = DEFAULT_ORDER,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    ground: str = DEFAULT_GROUND,
    reduction: str = "mean",
) -> Tensor:
    """wasserstein_loss(query_embeddings @ document_embeddings.T, ...), in memory that grows with B + N, not with B x N.

    Args:
        query_embeddings: (B, D) float.
        document_embeddings: (N, D), same type and device.
        grades: (rows, columns, grades), three (M,) tensors: the grade of document columns[i] for query rows[i]. Or what
            prepare_pairs made of them, default_grade, targets and ground.
        loss: "wasserstein", or a mixture of it, "kl" and "contrast" (gradret.kl_loss and contrast_loss), as
            "wasserstein:.15+contrast:.85". These two keep pulling where the softmax has collapsed on a wrong document.
            Documents of the default grade must then have no target mass.
        default_grade: of every other document.
        order, temperature, ground, reduction: see gradret.wasserstein_loss.
        targets: "gain", "softmax", "sqrt", or weights (M,) of the pairs.

    Returns: scalar, or (B,) for "none"; float64 for float64 embeddings, else float32, as are the scores in it.
    Raises: ValueError as wasserstein_loss and prepare_pairs, and where the loss cannot be computed.
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
    check_options(order, reduction)
    check_temperature(temperature)
    weights = parse_loss(loss)
    if not weights.keys() <= FUSED.keys():
        raise ValueError(f"loss '{loss}': only wasserstein, kl and contrast are computed from embeddings")
    shape = (len(queries), len(documents))
    if not isinstance(grades, PreparedPairs):
        grades = prepare_pairs(*grades, shape, default_grade=default_grade, targets=targets, ground=ground)
    elif default_grade != 0 or targets != DEFAULT_TARGETS or ground != DEFAULT_GROUND:
        raise ValueError("default_grade, targets and ground are part of prepared pairs: give them to prepare_pairs")
    if grades.shape != shape:
        raise ValueError(f"the prepared pairs are of {grades.shape} queries and documents, the embeddings of {shape}")
    if grades.offsets.device != queries.device:
        raise ValueError(f"grades must be on the embeddings' device, {queries.device}; got {grades.offsets.device}")
    if grades.others_weigh and weights.keys() != {"wasserstein"}:
        raise ValueError(
            f"loss '{loss}': kl and contrast need targets that give documents of the default grade no mass, as gain "
            "and sqrt give those of grade 0"
        )
    mixture = [weights.get(name, 0.0) for name in FUSED]
    options = (mixture, int(order), float(temperature), reduction)
    value: Tensor = _RetrievalTransport.apply(queries, documents, grades, *options)  # type: ignore[no-untyped-call]
    return value


def _score_tiles(queries: Tensor, documents: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
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
    lists: Sequence[Tensor],
    mixture: Sequence[float],
    order: int,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss; its gradients in the scores of pairs (M,) and in the log-sum-exp of others (B,); top and sum.

    `lists` are the tensors of all ShortLists, one after the other; `mixture` holds the weight of each of FUSED.
    """
    rows = len(queries)
    new: dict[str, Any] = {"dtype": result_dtype(queries), "device": queries.device}
    folded = Folded(
        torch.full((rows,), -torch.inf, **new),
        torch.zeros(rows, dtype=accumulation_dtype(queries.device), device=queries.device),
    )
    pairs = Pairs(offsets, columns, torch.empty(columns.shape, **new))
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, new["dtype"]):
            fold_tile(tile, r.start, c.start, pairs, folded, temperature)
    others = (folded.top + temperature * folded.sum.log()).to(new["dtype"])
    loss, of_pairs, of_others = torch.zeros(rows, **new), torch.zeros_like(pairs.values), torch.zeros(rows, **new)
    for group in _regroup(lists):
        short = torch.full(group.targets.shape, -torch.inf, **new)  # (R, K + 1)
        short.view(-1)[group.slots] = pairs.values[group.members]
        short[:, -1] = others[group.rows]
        value, gradient = torch.zeros(len(short), **new), torch.zeros_like(short)
        for weight, term in zip(mixture, FUSED.values(), strict=True):
            if weight:
                more, slope = term(short, group, order, temperature)
                value, gradient = value.add(more, alpha=weight), gradient.add(slope, alpha=weight)
        loss[group.rows] = value
        of_pairs[group.members] = gradient.view(-1)[group.slots]
        of_others[group.rows] = gradient[:, -1]
    if reduction == "mean":
        return loss.mean(), of_pairs / max(rows, 1), of_others / max(rows, 1), *folded
    return loss if reduction == "none" else loss.sum(), of_pairs, of_others, *folded


# The terms of a loss, of lists in scores (R, K + 1) where -inf stands for no document: each list's value, (R,), and its
# gradient in the scores.


def _move_mass(scores: Tensor, group: ShortLists, order: int, temperature: float) -> tuple[Tensor, Tensor]:
    """wasserstein_loss."""
    value, gradient = transport(scores, group.tables, order, temperature, "none", True)
    return value, cast(Tensor, gradient)


def _diverge(scores: Tensor, group: ShortLists, order: int, temperature: float) -> tuple[Tensor, Tensor]:
    """kl_loss."""
    logits = scores.to(group.targets.dtype) / temperature
    there = logits != -torch.inf
    q = group.targets * there.any(-1, keepdim=True)
    log_p = torch.where(q > 0, logits - logits.logsumexp(-1, keepdim=True), 0)
    value = (torch.xlogy(q, q) - q * log_p).sum(-1)
    slope = (masked_softmax(logits, there) - q) * (q.sum(-1, keepdim=True) > 0) / temperature
    return value.to(scores.dtype), slope.to(scores.dtype)


def _contrast(scores: Tensor, group: ShortLists, order: int, temperature: float) -> tuple[Tensor, Tensor]:
    """contrast_loss."""
    q = group.targets
    logits, positive = scores.to(q.dtype) / temperature, q > 0
    negatives = logits.masked_fill(positive, -torch.inf)
    there = negatives != -torch.inf
    gaps = negatives.logsumexp(-1, keepdim=True) - logits.masked_fill(~positive, 0)
    pull = q * torch.sigmoid(gaps)  # on each document with target mass, and 0 on the others
    slope = masked_softmax(negatives, there) * pull.sum(-1, keepdim=True) - pull
    return (q * -nnf.logsigmoid(-gaps)).sum(-1).to(scores.dtype), (slope / temperature).to(scores.dtype)


FUSED = {"wasserstein": _move_mass, "kl": _diverge, "contrast": _contrast}  # the losses that are computed here


def _regroup(lists: Sequence[Tensor]) -> list[ShortLists]:
    size = len(ShortLists._fields)
    return [ShortLists(*lists[i : i + size]) for i in range(0, len(lists), size)]


def _transport_backward(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    of_pairs: Tensor,
    of_others: Tensor,
    top: Tensor,
    total: Tensor,
    grad_loss: Tensor,
    temperature: float,
    needs_queries: bool = True,
    needs_documents: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (B, D) and (N, D); None for what is not needed."""
    dtype = of_others.dtype
    weight = of_others * grad_loss
    by_pair = grad_loss.repeat_interleave(offsets.diff(), output_size=len(columns)) if grad_loss.dim() else grad_loss
    pairs = Pairs(offsets, columns, of_pairs * by_pair)
    # Sums over tiles are made in `dtype`, also for embeddings of half precision.
    of_queries = torch.zeros(queries.shape, dtype=dtype, device=queries.device) if needs_queries else None
    of_documents = torch.zeros(documents.shape, dtype=dtype, device=queries.device) if needs_documents else None
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, dtype):
            unfold_tile(tile, r.start, c.start, pairs, Folded(top, total), temperature, weight)
            if of_queries is not None:
                of_queries[r].addmm_(tile, documents[c].to(dtype))
            if of_documents is not None:
                of_documents[c].addmm_(tile.T, queries[r].to(dtype))
    return (
        of_queries.to(queries.dtype) if of_queries is not None else None,
        of_documents.to(documents.dtype) if of_documents is not None else None,
    )


@torch.library.custom_op("gradret::retrieval_transport", mutates_args=())
def retrieval_transport_op(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    lists: Sequence[Tensor],
    mixture: Sequence[float],
    order: int,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _transport(queries, documents, offsets, columns, lists, mixture, order, temperature, reduction)


@retrieval_transport_op.register_fake
def _(queries, documents, offsets, columns, lists, mixture, order, temperature, reduction):  # type: ignore[no-untyped-def]
    new, rows = {"dtype": result_dtype(queries), "device": queries.device}, queries.shape[:1]
    total = torch.empty(rows, dtype=accumulation_dtype(queries.device), device=queries.device)
    loss = torch.empty(rows if reduction == "none" else (), **new)
    return loss, torch.empty(columns.shape, **new), torch.empty(rows, **new), torch.empty(rows, **new), total


@torch.library.custom_op("gradret::retrieval_transport_backward", mutates_args=())
def retrieval_transport_backward_op(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    of_pairs: Tensor,
    of_others: Tensor,
    top: Tensor,
    total: Tensor,
    grad_loss: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    saved = (of_pairs, of_others, top, total)
    found = _transport_backward(queries, documents, offsets, columns, *saved, grad_loss, temperature)
    return cast(tuple[Tensor, Tensor], found)  # both are made by default


@retrieval_transport_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    queries, documents, offsets, columns, of_pairs, of_others, top, total, grad_loss, temperature
):
    return queries.new_empty(queries.shape), documents.new_empty(documents.shape)


class _RetrievalTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, documents, prepared, mixture, order, temperature, reduction):  # type: ignore[no-untyped-def]
        run = retrieval_transport_op if torch.compiler.is_compiling() else _transport
        lists = [tensor for group in prepared.lists for tensor in group]
        where = (prepared.offsets, prepared.columns)
        loss, *saved = run(queries, documents, *where, lists, mixture, order, temperature, reduction)
        ctx.save_for_backward(queries, documents, *where, *saved)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @first_derivatives_only
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling():
            found = retrieval_transport_backward_op(*ctx.saved_tensors, grad_loss, ctx.temperature)
        else:
            options = (grad_loss, ctx.temperature, *ctx.needs_input_grad[:2])
            found = _transport_backward(*ctx.saved_tensors, *options)
        return *found, *(None,) * 5
