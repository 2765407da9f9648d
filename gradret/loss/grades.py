"""What a list's loss depends on besides the scores, computed once: grade levels or the order of grades, target mass.

A list of at most 32 distinct grades needs no sort: each document names its level. Others are sorted by grade.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradret.loss.kernels import address, backend, compiled, current_stream
from gradret.settings import DEFAULT_GROUND, DEFAULT_TARGETS, GROUNDS, TARGETS

MAX_LEVELS = 32
ABSENT = 255
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of scores


class Tables(NamedTuple):
    """Grades in the form that kernels read; see csrc/kernels.h for the two forms.

    index: (B, N) uint8 levels, or int32 positions in ascending order of grade.
    values: (B, L) places of grades on the axis that mass moves along, ascending. mass: (B, L) target mass, 1 in all or
    0 everywhere. share: (B, L), that of one document of the level. counts: (B,) int32.
    """

    index: Tensor  # type: ignore[assignment]  # not the method of tuples
    values: Tensor
    mass: Tensor
    share: Tensor
    counts: Tensor


@dataclass(frozen=True)
class PreparedGrades:
    """Grades, targets and mask of a batch of lists, ready for losses of lists; made by prepare_grades."""

    tables: Tables

    @property
    def shape(self) -> torch.Size:
        return self.tables.index.shape

    @property
    def device(self) -> torch.device:
        return self.tables.index.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PreparedGrades":
        """The same on another device."""
        dtype = table_dtype(torch.device(device))
        tables = (t.to(dtype) if t.is_floating_point() else t for t in self.tables)
        return PreparedGrades(Tables(*(t.to(device, non_blocking=non_blocking) for t in tables)))


def prepare_grades(
    grades: Tensor,
    *,
    targets: str | Tensor = DEFAULT_TARGETS,
    ground: str = DEFAULT_GROUND,
    mask: Tensor | None = None,
) -> PreparedGrades:
    """Everything of wasserstein_loss that does not depend on the scores, for grades that serve several steps.

    On CUDA this waits for the device, to see whether grades are few enough to go without a sort; prepare on the CPU and
    move the result where that matters.

    Args:
        grades: (B, N) real.
        targets: "gain", "softmax", "sqrt", or weights (B, N), >= 0; see gradret.loss.functions.
        ground: "grade", "gain" or "sqrt"; see gradret.loss.functions.
        mask: (B, N) bool, True where a document exists; None for all.

    Returns: what wasserstein_loss takes in place of grades, targets, ground and mask, in float64 on the CPU, else
        float32.
    Raises: ValueError when shapes differ, or targets or ground are unknown.
    """
    check_grades(grades, targets, mask, ground)
    tables = None if backend(grades.device) == "cpu" else _find_levels(grades, targets, ground, mask)
    return PreparedGrades(tables or make_tables(grades, targets, ground, mask))


def check_scores(scores: Tensor, grades: Tensor | PreparedGrades, temperature: float) -> None:
    """Raises: ValueError unless they fit each other, TypeError for what is no tensor."""
    check_tensors(scores=scores)
    if not isinstance(grades, PreparedGrades):
        check_tensors(grades=grades)
    shape = grades.shape
    if scores.dim() != 2 or scores.shape != shape or scores.dtype not in FLOATS:
        raise ValueError(
            "scores and grades must both be (B, N), scores of 16, 32 or 64 bit floating point; "
            f"got {scores.dtype} {tuple(scores.shape)} and {tuple(shape)}"
        )
    check_temperature(temperature)


def check_grades(grades: Tensor, targets: str | Tensor, mask: Tensor | None, ground: str = DEFAULT_GROUND) -> None:
    """Raises: ValueError unless they fit each other, TypeError for what is no tensor."""
    check_tensors(grades=grades, **({} if mask is None else {"mask": mask}))
    if grades.dim() != 2 or grades.is_complex():
        raise ValueError(f"grades must be (B, N) and real, got {grades.dtype} {tuple(grades.shape)}")
    for other, what in ((mask, "mask"), (targets, "targets")):
        if isinstance(other, Tensor) and other.device != grades.device:
            raise ValueError(f"{what} must be on the grades' device, {grades.device}; got {other.device}")
    if mask is not None and (mask.shape != grades.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(grades.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    check_targets(targets, grades.shape)
    if ground not in GROUNDS:
        raise ValueError(f"ground must be 'grade', 'gain' or 'sqrt', got {ground!r}")


def check_tensors(**arguments: object) -> None:
    """Raises: TypeError unless all are tensors."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; see torch.as_tensor")


def check_targets(targets: str | Tensor, shape: torch.Size) -> None:
    """Raises: ValueError unless they are one of TARGETS, or weights of that shape."""
    if isinstance(targets, Tensor):
        if targets.shape != shape:
            raise ValueError(f"targets must be {tuple(shape)}, got {tuple(targets.shape)}")
    elif not isinstance(targets, str) or targets not in TARGETS:
        raise ValueError(f"targets must be 'gain', 'softmax', 'sqrt' or weights, got {targets!r:.100}")


def place_grades(grades: Tensor, ground: str) -> Tensor:
    """Where grades stand on the axis of the ground distance: at y, 2^y - 1, or the root of |y| with y's sign."""
    if ground == "grade":
        return grades
    real = grades.detach().to(torch.promote_types(grades.dtype, table_dtype(grades.device)))
    return torch.exp2(real) - 1 if ground == "gain" else real.abs().sqrt().copysign(real)


def weigh_grades(grades: Tensor, mask: Tensor | None, targets: str, dtype: torch.dtype) -> Tensor:
    """Unnormalised target mass (B, N) of each document; what stands at masked positions means nothing."""
    present = torch.ones_like(grades, dtype=torch.bool) if mask is None else mask
    return target_weights(grades.detach().to(dtype).masked_fill(~present, 0), targets, present)


def check_temperature(temperature: float) -> None:
    """Raises: ValueError unless it is a number above 0."""
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError("temperature must be a number: the loss has no gradient in it; scale the scores instead")
    if isinstance(temperature, str | None) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")


def table_dtype(device: torch.device) -> torch.dtype:
    """Of values and mass: float64 on the CPU, whose sums are float64; float32 elsewhere."""
    return torch.float64 if device.type == "cpu" else torch.float32


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Of sums in PyTorch: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(scores: Tensor) -> torch.dtype:
    """What a loss of these scores comes in: float64 for float64, else float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def normalize_mass(mass: Tensor) -> Tensor:
    """mass / its sum over the row, (B, N); a row without mass stays zero."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total != 0, total, 1)  # NaN shows


def make_tables(
    grades: Tensor, targets: str | Tensor, ground: str, mask: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tables:
    """Levels where that needs no look at the device's data, else the sorted form; numbers at least as wide as dtype."""
    levels = _assign_levels(grades, targets, ground, mask) if backend(grades.device) == "cpu" else None
    dtype = torch.promote_types(dtype, table_dtype(grades.device))
    return levels or _sort_grades(grades, targets, ground, mask, dtype)


def target_weights(values: Tensor, targets: str, present: Tensor) -> Tensor:
    """Unnormalised target mass at each grade: 2^y - 1 ("gain"), e^y ("softmax") or sqrt(y) ("sqrt"), 0 below grade 0.

    The first two are divided by what they are at about each list's highest grade, which normalising takes out: that
    of another list could make them underflow. What stands where nothing is present means nothing.
    """
    if targets == "sqrt":
        return values.clamp_min(0).sqrt()
    top = values.masked_fill(~present, -torch.inf)
    top = top.amax(-1, keepdim=True) if top.shape[-1] else top
    if targets == "softmax":
        return (values - torch.where(top == -torch.inf, 0, top)).exp()
    # 2^y - 1 over 2^top, as 2^(y - top) (1 - 2^-y): large grades must not overflow.
    return (torch.exp2(values - top.clamp_min(0)) * -torch.expm1(-math.log(2) * values)).clamp_min(0)


def _assign_levels(grades: Tensor, targets: str | Tensor, ground: str, mask: Tensor | None) -> Tables | None:
    """The level form by the CPU's kernel; None where it cannot hold the batch."""
    rows, columns = grades.shape
    if grades.dtype not in (torch.float32, torch.float64):
        grades = grades.to(torch.float32 if grades.is_floating_point() else torch.float64)
    grades, mask = grades.detach().contiguous(), None if mask is None else mask.contiguous()
    weights = targets.detach().to(torch.float64).contiguous() if isinstance(targets, Tensor) else None
    here = grades.device  # not the default one, which may be a GPU
    index = torch.empty((rows, columns), dtype=torch.uint8, device=here)
    tables = torch.empty((3, rows, MAX_LEVELS), dtype=torch.float64, device=here).unbind()
    counts = torch.empty(rows, dtype=torch.int32, device=here)
    given = (address(grades), grades.dtype == torch.float64, address(mask), address(weights), rows, columns)
    arguments = compiled.Grades(*given, *map(address, (index, *tables, counts)))
    if not compiled.prepare_levels(arguments, torch.get_num_threads()):
        return None
    width = int(counts.max()) if rows else 0
    values, numbers, shares = (t[:, :width] for t in tables)
    return _finish_tables(index, values, numbers, targets if weights is None else shares, ground, counts)


def _finish_tables(
    index: Tensor, grades: Tensor, numbers: Tensor, weights: str | Tensor, ground: str, counts: Tensor
) -> Tables:
    """Tables of levels, from the grade of each (B, L), how many documents it has, and what one of them weighs."""
    used = numbers != 0
    weights = target_weights(grades, weights, used) if isinstance(weights, str) else weights
    weights = weights.to(grades).masked_fill(~used, 0)  # those of grades above the list's own may be infinite
    mass = weights * numbers
    total = mass.sum(-1, keepdim=True)
    total = torch.where(total != 0, total, 1)  # NaN shows
    values = place_grades(grades, ground)
    values, mass, share = (t.contiguous() for t in (values, mass / total, weights / total))
    return Tables(index, values, mass, share, counts)


def _sort_grades(grades: Tensor, targets: str | Tensor, ground: str, mask: Tensor | None, dtype: torch.dtype) -> Tables:
    device, (rows, columns) = grades.device, grades.shape
    real = grades.detach().to(dtype)
    if backend(device) == "cuda" and dtype == torch.float32 and columns <= compiled.MAX_SORT_COLUMNS:
        real, mask_bytes = real.contiguous(), None if mask is None else mask.contiguous()
        index = torch.empty((rows, columns), dtype=torch.int32, device=device)
        values, counts = torch.empty_like(real), torch.empty(rows, dtype=torch.int32, device=device)
        compiled.sort_grades(
            address(real),
            address(mask_bytes),
            rows,
            columns,
            address(index),
            address(values),
            address(counts),
            device.index,
            current_stream(device),
        )
    else:
        real = real if mask is None else real.masked_fill(~mask, 0)
        index = real.argsort(dim=-1, stable=True)
        if mask is None:
            counts = torch.full((rows,), columns, dtype=torch.int32, device=device)
        else:  # by grade, then by presence, both stable: absent documents end up last
            index = index.gather(-1, (~mask).gather(-1, index).byte().argsort(dim=-1, stable=True))
            counts = mask.sum(-1, dtype=torch.int32)
        last = (counts.long() - 1).clamp_min(0)[:, None]  # absent documents repeat the highest grade
        values = real.gather(-1, index.gather(-1, torch.arange(columns, device=device).minimum(last)))
    present = torch.arange(columns, device=device) < counts[:, None]
    numbers = present.to(values).masked_fill(values.isnan(), torch.nan)  # NaN shows, whatever the targets
    weights = targets.detach().gather(-1, index.long()) if isinstance(targets, Tensor) else targets
    tables = _finish_tables(index.int(), values, numbers, weights, ground, counts)
    if ground == "gain":  # exp2 of equal grades may differ in the last digit; the contrast must see that they are equal
        first = torch.searchsorted(values, values).clamp_max(columns - 1)  # NaN has none
        tables = tables._replace(values=tables.values.gather(-1, first))
    return tables


def _find_levels(grades: Tensor, targets: str | Tensor, ground: str, mask: Tensor | None) -> Tables | None:
    """The level form with one table of grades for all lists; None where it cannot hold the batch."""
    device, (rows, _) = grades.device, grades.shape
    real = grades.detach().to(table_dtype(device))
    distinct = (real if mask is None else real[mask]).unique()
    if len(distinct) > MAX_LEVELS or not len(distinct) or not distinct.isfinite().all():
        return None  # an infinite grade would be an infinite gap in all lists
    levels = torch.searchsorted(distinct, real if mask is None else real.masked_fill(~mask, 0).contiguous())
    levels = levels if mask is None else levels.masked_fill(~mask, len(distinct))
    numbers = real.new_zeros(rows, len(distinct) + 1)
    weights = targets
    if isinstance(targets, Tensor):
        given = targets.detach().to(real).masked_fill(levels == len(distinct), 0)
        weights = numbers.scatter(-1, levels, given)
        if not (weights.gather(-1, levels) == given).all():
            return None  # equal grades, but not equally relevant
        weights = weights[:, :-1]
    numbers = numbers.scatter_add(-1, levels, torch.ones_like(real))[:, :-1]
    index = levels.byte() if mask is None else levels.byte().masked_fill(~mask, ABSENT)
    counts = torch.full((rows,), len(distinct), dtype=torch.int32, device=device)
    return _finish_tables(index.contiguous(), distinct.expand(rows, -1), numbers, weights, ground, counts)
