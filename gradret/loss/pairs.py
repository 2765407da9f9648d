"""Graded pairs of queries and documents, where every other pair has one default grade."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradret.loss.grades import (
    PreparedGrades,
    check_targets,
    check_tensors,
    prepare_grades,
    weigh_grades,
)
from gradret.settings import DEFAULT_GROUND, DEFAULT_TARGETS


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
    rows, columns, real = rows[by_row], columns[by_row], grades.detach().double()[by_row]
    number = torch.bincount(rows, minlength=count)  # (B,)
    offsets = torch.cat([number.new_zeros(1), number.cumsum(0)])
    weights = targets.detach().double()[by_row] if isinstance(targets, Tensor) else targets
    doublings = number.double().log2().clamp_min(-1).ceil()  # lists of a group have the same, so none is half empty
    lists, others_weigh = [], False
    for doubling in doublings.unique().tolist():
        chosen = doublings == doubling
        members = chosen[rows].nonzero()[:, 0]
        group, weigh = _make_lists(
            chosen.nonzero()[:, 0], members, rows, real, number, documents, float(default_grade), weights, ground
        )
        lists.append(group)
        others_weigh |= weigh
    return PreparedPairs((count, documents), offsets, columns.int(), tuple(lists), others_weigh)


def _make_lists(
    chosen: Tensor,
    members: Tensor,
    rows: Tensor,
    grades: Tensor,
    number: Tensor,
    documents: int,
    default_grade: float,
    targets: str | Tensor,
    ground: str,
) -> tuple[ShortLists, bool]:
    """The lists of the chosen rows, whose pairs are the members, of all rows (M,) and grades (M,).

    Also whether their other documents have target mass.
    """
    number = number[chosen]  # (R,)
    width = int(number.max()) + 1
    row = torch.searchsorted(chosen, rows[members])  # of each member, among the chosen
    slots = row * width + torch.arange(len(members), device=rows.device) - (number.cumsum(0) - number)[row]
    others = documents - number  # documents of the default grade
    short = torch.full((len(chosen), width), default_grade, dtype=torch.float64, device=rows.device)
    short.view(-1)[slots] = grades[members]
    present = torch.zeros_like(short, dtype=torch.bool)
    present.view(-1)[slots] = True
    present[:, -1] = others > 0
    if isinstance(targets, Tensor):
        weights = torch.zeros_like(short)
        weights.view(-1)[slots] = targets[members]
    else:
        weights = weigh_grades(short, present, targets, torch.float64)
        weights[:, -1] *= others
    weights = weights.masked_fill(~present, 0)
    prepared = prepare_grades(short, targets=weights, ground=ground, mask=present)
    return ShortLists(chosen, members, slots, prepared), bool(weights[:, -1].any())
