"""The Wasserstein list loss from embeddings, without the matrix of scores between all queries and documents.

Every document that has no grade of its own for a query has the default grade, so the loss depends on their scores
through one log-sum-exp per query. Scores are made a tile at a time, folded into it, and forgotten; backward makes each
tile again. What is left for the loss is a short list per query: its graded documents, and one for all others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradret.loss.grades import (
    FLOATS,
    PreparedGrades,
    accumulation_dtype,
    check_targets,
    check_temperature,
    check_tensors,
    prepare_grades,
    result_dtype,
    weigh_grades,
)
from gradret.loss.kernels import address, backend, compiled, current_stream
from gradret.loss.one_pass import ONE_PASS, check_options, first_derivatives_only, one_pass_loss, reduce_lists
from gradret.settings import DEFAULT_GROUND, DEFAULT_ORDER, DEFAULT_TARGETS, DEFAULT_TEMPERATURE, parse_loss

TILE_ROWS = 2048
TILE_ELEMENTS = 1 << 20  # of a tile of scores: 4 MiB in float32


class ShortLists(NamedTuple):
    """R queries of a batch, each as a list of its graded documents and one document for all others.

    rows: (R,) which queries. members: (m,) which pairs. slots: (m,) their places in the lists (R, K + 1), flat; the
    last place of a list is that of all other documents. grades: the lists' grades.
    """

    rows: Tensor
    members: Tensor
    slots: Tensor
    grades: PreparedGrades


@dataclass(frozen=True)
class PreparedPairs:
    """Graded pairs of a batch, ready for wasserstein_retrieval_loss; made by prepare_pairs.

    shape: (B, N). offsets (B + 1,), columns (M,): the pairs by row. lists: the same by query, queries with about as
    many pairs together, so that all of it grows with B + M. others_weigh: whether documents of the default grade have
    target mass.
    """

    shape: tuple[int, int]
    offsets: Tensor
    columns: Tensor
    lists: tuple[ShortLists, ...]
    others_weigh: bool

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PreparedPairs":
        """The same on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        lists = []
        for part in self.lists:
            grades = part.grades.to(device, non_blocking=non_blocking)
            lists.append(ShortLists(move(part.rows), move(part.members), move(part.slots), grades))
        where = move(self.offsets), move(self.columns)
        return PreparedPairs(self.shape, *where, tuple(lists), self.others_weigh)


def prepare_pairs(
    rows: Tensor,
    columns: Tensor,
    grades: Tensor,
    shape: tuple[int, int],
    *,
    default_grade: float = 0.0,
    targets: str | Tensor = DEFAULT_TARGETS,
    ground: str = DEFAULT_GROUND,
) -> PreparedPairs:
    """Everything of wasserstein_retrieval_loss that does not depend on the embeddings. Waits for the device on CUDA.

    Args:
        rows, columns: (M,) integer, which query and document a grade is for; in any order, no pair twice.
        grades: (M,) real.
        shape: (B, N), numbers of queries and documents.
        default_grade: of all other pairs.
        targets: "gain", "softmax", "sqrt", or weights (M,) >= 0 of the pairs, all others having none; see
            gradret.loss.functions.
        ground: "grade", "gain" or "sqrt"; see gradret.loss.functions.

    Raises: ValueError when shapes differ, a row or column is out of range, a pair comes twice, or targets or ground are
        unknown; TypeError for rows, columns or grades that are no tensors.
    """
    check_tensors(rows=rows, columns=columns, grades=grades)
    count, documents = shape
    if rows.dim() != 1 or rows.shape != columns.shape or rows.shape != grades.shape:
        raise ValueError(
            "rows, columns and grades must be three vectors of one length; "
            f"got {tuple(rows.shape)}, {tuple(columns.shape)} and {tuple(grades.shape)}"
        )
    check_targets(targets, grades.shape)
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
    dtype = accumulation_dtype(grades.device)
    real = grades.detach() if grades.is_floating_point() else grades.to(dtype)  # default_grade is rounded as they are
    rows, columns, real = rows[by_row], columns[by_row], real[by_row]
    counts = torch.bincount(rows, minlength=count)  # (B,)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    doublings = counts.to(dtype).log2().clamp_min(-1).ceil()  # lists of a group have the same, so none is half empty
    lists, others_weigh = [], False
    for doubling in doublings.unique().tolist():
        chosen = (doublings == doubling).nonzero()[:, 0]  # (R,)
        members = (doublings == doubling)[rows].nonzero()[:, 0]  # (m,)
        number = counts[chosen]
        width = int(number.max()) + 1
        row = torch.searchsorted(chosen, rows[members])  # of each member, among the chosen
        slots = row * width + torch.arange(len(members), device=rows.device) - (number.cumsum(0) - number)[row]
        others = documents - number  # documents of the default grade
        short = real.new_full((len(chosen), width), float(default_grade))
        short.view(-1)[slots] = real[members]
        short = short.to(dtype)
        present = torch.zeros_like(short, dtype=torch.bool)
        present.view(-1)[slots] = True
        present[:, -1] = others > 0
        if isinstance(targets, Tensor):
            weights = torch.zeros_like(short)
            weights.view(-1)[slots] = targets.detach().to(dtype)[by_row][members]
        else:
            weights = weigh_grades(short, present, targets, dtype)
            weights[:, -1] *= others
        weights = weights.masked_fill(~present, 0)
        prepared = prepare_grades(short, targets=weights, ground=ground, mask=present)
        lists.append(ShortLists(chosen, members, slots, prepared))
        others_weigh |= bool(weights[:, -1].any())
    return PreparedPairs((count, documents), offsets, columns.int(), tuple(lists), others_weigh)


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
    check_tensors(query_embeddings=query_embeddings, document_embeddings=document_embeddings)
    if not isinstance(grades, tuple | PreparedPairs) or (isinstance(grades, tuple) and len(grades) != 3):
        raise TypeError(f"grades must be three tensors (rows, columns, grades), or prepared, got {grades!r:.100}")
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
    if not weights.keys() <= set(ONE_PASS):
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
    of_pairs, others = _ScorePairs.apply(  # type: ignore[no-untyped-call]
        queries, documents, grades.offsets, grades.columns, float(temperature)
    )
    each = others  # of no lists, as the loss
    if grades.lists:
        values = [_compute_lists(group, of_pairs, others, weights, order, temperature) for group in grades.lists]
        each = torch.zeros_like(others).index_copy(0, torch.cat([g.rows for g in grades.lists]), torch.cat(values))
    return reduce_lists(each, reduction)


def _compute_lists(
    group: ShortLists, of_pairs: Tensor, others: Tensor, weights: dict[str, float], order: int, temperature: float
) -> Tensor:
    """The losses (R,) of short lists, from the scores of all pairs (M,) and of all rows' other documents (B,)."""
    rows, width = group.grades.shape
    short = of_pairs.new_full((rows * width,), -torch.inf)  # stands for no document
    short = short.index_copy(0, group.slots, of_pairs.index_select(0, group.members)).view(rows, width)
    short = torch.cat([short[:, :-1], others.index_select(0, group.rows)[:, None]], 1)  # (R, K + 1)
    return one_pass_loss(weights, short, group.grades, order=order, temperature=temperature, reduction="none")


class Folded(NamedTuple):
    """What tiles of scores are folded into: M graded pairs, by row, and one log-sum-exp of all others for each row.

    offsets: (B + 1,) int64. columns: (M,) int32, ascending in a row. values: (M,), the pairs' scores, or gradients on
    the way back. top: (B,), the highest score so far. sum: (B,) of exp((s - top) / temperature), float64 where the
    device has it. weight: (B,), the gradients in the log-sum-exps on the way back.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    top: Tensor
    sum: Tensor
    temperature: float
    weight: Tensor | None = None


def fold_tile(tile: Tensor, first_row: int, first_column: int, folded: Folded) -> None:
    """Take a tile of scores (R, C), which is overwritten, into `folded`."""
    if _call_kernel("fold_tile", tile, first_row, first_column, folded):
        return
    rows = slice(first_row, first_row + len(tile))
    index, row, column = _find_pairs(tile, first_row, first_column, folded)
    folded.values[index] = tile[row, column]
    tile[row, column] = -torch.inf
    top = torch.maximum(folded.top[rows], tile.amax(-1))
    base = torch.where(top == -torch.inf, 0, top)
    before = folded.sum[rows] * ((folded.top[rows] - base) / folded.temperature).exp()
    folded.sum[rows] = before + ((tile - base[:, None]) / folded.temperature).exp_().sum(-1, dtype=folded.sum.dtype)
    folded.top[rows] = top


def unfold_tile(tile: Tensor, first_row: int, first_column: int, folded: Folded) -> None:
    """Overwrite a tile of scores (R, C) with gradients: values for pairs, else weight times the softmax."""
    if _call_kernel("unfold_tile", tile, first_row, first_column, folded):
        return
    rows = slice(first_row, first_row + len(tile))
    share = cast(Tensor, folded.weight)[rows] / torch.where(folded.sum[rows] == 0, 1, folded.sum[rows])
    base = torch.where(folded.top[rows] == -torch.inf, 0, folded.top[rows])
    tile.sub_(base[:, None]).div_(folded.temperature).clamp_max_(0).exp_().mul_(share[:, None].to(tile.dtype))
    tile[share == 0] = 0
    index, row, column = _find_pairs(tile, first_row, first_column, folded)
    tile[row, column] = folded.values[index]


def _find_pairs(tile: Tensor, first_row: int, first_column: int, folded: Folded) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs lie in the tile, and where in it."""
    begin, end = folded.offsets[first_row].item(), folded.offsets[first_row + len(tile)].item()
    column = folded.columns[begin:end].long() - first_column
    index = ((column >= 0) & (column < tile.shape[1])).nonzero()[:, 0]
    column = column[index]
    index += begin
    row = torch.searchsorted(folded.offsets, index, right=True) - 1 - first_row
    return index, row, column


def _call_kernel(name: str, tile: Tensor, first_row: int, first_column: int, folded: Folded) -> bool:
    """Whether a kernel serves the tile; then it has done its work."""
    path = backend(tile.device)
    if path == "torch" or tile.dtype != torch.float32:
        return False
    arguments = compiled.Tile(
        address(tile),
        *tile.shape,
        tile.stride(0),
        first_column,
        address(folded.offsets[first_row:]),
        address(folded.columns),
        address(folded.values),
        folded.temperature,
        address(folded.top[first_row:]),
        address(folded.sum[first_row:]),
        address(None if folded.weight is None else folded.weight[first_row:]),
    )
    where = (tile.device.index, current_stream(tile.device)) if path == "cuda" else (torch.get_num_threads(),)
    getattr(compiled, f"{name}_{path}")(arguments, *where)
    return True


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


def _score_pairs(
    queries: Tensor, documents: Tensor, offsets: Tensor, columns: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of the pairs (M,), and of all other documents of a row as one (B,); top and sum behind the latter."""
    rows = len(queries)
    new: dict[str, Any] = {"dtype": result_dtype(queries), "device": queries.device}
    values, top = torch.empty(columns.shape, **new), torch.full((rows,), -torch.inf, **new)
    total = torch.zeros(rows, dtype=accumulation_dtype(queries.device), device=queries.device)
    folded = Folded(offsets, columns, values, top, total, temperature)
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, new["dtype"]):
            fold_tile(tile, r.start, c.start, folded)
    return values, (top + temperature * total.log()).to(new["dtype"]), top, total


score_pairs_op = torch.library.custom_op("gradret::score_pairs", _score_pairs, mutates_args=())


def _score_pairs_backward(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    top: Tensor,
    total: Tensor,
    of_pairs: Tensor,
    of_others: Tensor,
    temperature: float,
    *,
    needs_queries: bool = True,
    needs_documents: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (B, D) and (N, D) from those in the scores of _score_pairs; None for what is not needed."""
    dtype = of_others.dtype
    folded = Folded(offsets, columns, of_pairs.contiguous(), top, total, temperature, of_others.contiguous())
    # Sums over tiles are made in `dtype`, also for embeddings of half precision.
    of_queries = torch.zeros(queries.shape, dtype=dtype, device=queries.device) if needs_queries else None
    of_documents = torch.zeros(documents.shape, dtype=dtype, device=queries.device) if needs_documents else None
    with torch.autocast(queries.device.type, enabled=False):
        for r, c, tile in _score_tiles(queries, documents, dtype):
            unfold_tile(tile, r.start, c.start, folded)
            if of_queries is not None:
                of_queries[r].addmm_(tile, documents[c].to(dtype))
            if of_documents is not None:
                of_documents[c].addmm_(tile.T, queries[r].to(dtype))
    return (
        of_queries.to(queries.dtype) if of_queries is not None else None,
        of_documents.to(documents.dtype) if of_documents is not None else None,
    )


@score_pairs_op.register_fake
def _(
    queries: Tensor, documents: Tensor, offsets: Tensor, columns: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = queries.shape[0], result_dtype(queries)
    of_pairs, others, top = (queries.new_empty(size, dtype=dtype) for size in (columns.shape[0], rows, rows))
    return of_pairs, others, top, queries.new_empty(rows, dtype=accumulation_dtype(queries.device))


@torch.library.custom_op("gradret::score_pairs_backward", mutates_args=())
def score_pairs_backward_op(
    queries: Tensor,
    documents: Tensor,
    offsets: Tensor,
    columns: Tensor,
    top: Tensor,
    total: Tensor,
    of_pairs: Tensor,
    of_others: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    where = (queries, documents, offsets, columns)
    found = _score_pairs_backward(*where, top, total, of_pairs, of_others, temperature)
    return cast(tuple[Tensor, Tensor], found)  # both are made by default


@score_pairs_backward_op.register_fake
def _(queries: Tensor, documents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), documents.new_empty(documents.shape)


class _ScorePairs(torch.autograd.Function):
    """What _score_pairs gives, but for the last two, under autograd; backward makes each tile of scores again."""

    @staticmethod
    def forward(ctx, queries, documents, offsets, columns, temperature):  # type: ignore[no-untyped-def]
        run = score_pairs_op if torch.compiler.is_compiling() else _score_pairs
        of_pairs, others, *folded = run(queries, documents, offsets, columns, temperature)
        ctx.save_for_backward(queries, documents, offsets, columns, *folded)
        ctx.temperature = temperature
        return of_pairs, others

    @staticmethod
    @first_derivatives_only
    def backward(ctx, of_pairs, of_others):  # type: ignore[no-untyped-def]
        arguments = (*ctx.saved_tensors, of_pairs, of_others, ctx.temperature)
        if torch.compiler.is_compiling():
            return *score_pairs_backward_op(*arguments), None, None, None
        queries, documents = ctx.needs_input_grad[:2]
        found = _score_pairs_backward(*arguments, needs_queries=queries, needs_documents=documents)
        return *found, None, None, None
