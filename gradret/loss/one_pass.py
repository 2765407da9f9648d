"""The losses that one pass over the scores computes, and their weighted sums: kernels, autograd, torch.compile."""

import functools
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from gradret.loss import reference
from gradret.loss.grades import PreparedGrades, Tables, check_grades, check_scores, make_tables, result_dtype
from gradret.loss.kernels import address, backend, compiled, current_stream
from gradret.settings import DEFAULT_GROUND, DEFAULT_ORDER, DEFAULT_TARGETS, DEFAULT_TEMPERATURE

ONE_PASS = ("wasserstein", "kl", "contrast")
_SCALAR_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
TWICE = "losses of lists give first derivatives only: their gradient cannot be differentiated again"


def check_options(order: int, reduction: str) -> None:
    """Raises: ValueError unless order is 1 or 2 and reduction "mean", "sum" or "none"."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def one_pass_loss(
    weights: Mapping[str, float],
    scores: Tensor,
    grades: Tensor | PreparedGrades,
    order: int = DEFAULT_ORDER,
    temperature: float = DEFAULT_TEMPERATURE,
    targets: str | Tensor = DEFAULT_TARGETS,
    ground: str = DEFAULT_GROUND,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The sum of losses of ONE_PASS, each times its weight; the rest as gradret.wasserstein_loss."""
    check_options(order, reduction)
    check_scores(scores, grades, temperature)
    if not isinstance(grades, PreparedGrades):
        check_grades(grades, targets, mask, ground)
    elif mask is not None or targets != DEFAULT_TARGETS or ground != DEFAULT_GROUND:
        raise ValueError("targets, ground and mask are part of prepared grades: give them to prepare_grades")
    if grades.device != scores.device:
        raise ValueError(f"grades must be on the scores' device, {scores.device}; got {grades.device}")
    if not torch.is_grad_enabled():
        scores = scores.detach()  # then no gradient is computed
    shares = [float(weights.get(name, 0)) for name in ONE_PASS]
    options = (shares, int(order), float(temperature), reduction)
    loss: Tensor = _OnePass.apply(scores, grades, targets, ground, mask, *options)  # type: ignore[no-untyped-call]
    return loss


def run_pass(
    scores: Tensor,
    tables: Tables,
    weights: Sequence[float],
    order: int,
    temperature: float,
    reduction: str,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss and its gradient (B, N), None if not needed, by the path that serves the device.

    The gradient of float16 scores comes in float32: it waits for the incoming gradient, a loss scale often, without
    which much of it would be 0 in float16.

    Args:
        scores, tables, weights, order, temperature: see reference.loss_and_gradient, which has the formulas.
        reduction: "mean" or "sum" over lists; "none" gives losses (B,), each row of the gradient being its list's.
        needs_gradient: whether to compute it.
    """
    device, dtype, (rows, columns) = scores.device, scores.dtype, scores.shape
    path = backend(device)
    if path == "cuda" and weights[ONE_PASS.index("contrast")] and tables.index.dtype != torch.uint8:
        path = "torch"  # the kernel's sorted form has no contrast
    scale = 1 / max(rows, 1) if reduction == "mean" else 1.0
    if dtype != _gradient_dtype(scores) and (path != "cuda" or needs_gradient):
        return run_pass(scores.float(), tables, weights, order, temperature, reduction, needs_gradient)
    if path == "torch" or (path == "cuda" and dtype == torch.float64):
        loss, gradient = reference.loss_and_gradient(scores, tables, weights, order, temperature, scale)
        return reduce_lists(loss, reduction), gradient if needs_gradient else None
    if scores.stride(1) != 1 and columns > 1:
        scores = scores.contiguous()
    in_kernel = path == "cpu" and reduction != "none" and rows > 0  # the mean of no list is PyTorch's to say
    loss = torch.empty(() if in_kernel else rows, dtype=result_dtype(scores), device=device)
    gradient = torch.empty((rows, columns), dtype=dtype, device=device) if needs_gradient else None
    index, values, mass, share, counts = tables
    lists = compiled.Lists(
        address(scores),
        _SCALAR_CODES[dtype],
        rows,
        columns,
        scores.stride(0),
        address(index),
        index.dtype != torch.uint8,
        address(values),
        address(mass),
        address(share),
        address(counts),
        values.shape[1],
        order,
        *weights,
        temperature,
        scale,
        address(loss),
        address(gradient),
    )
    if path == "cpu":
        compiled.mix_cpu(lists, scale if in_kernel else 0.0, torch.get_num_threads())
    else:
        scratch = torch.empty(compiled.scratch_bytes(lists), dtype=torch.uint8, device=device)
        compiled.mix_cuda(lists, address(scratch), device.index, current_stream(device))
    return loss if in_kernel else reduce_lists(loss, reduction), gradient


def reduce_lists(loss: Tensor, reduction: str) -> Tensor:
    """Losses of lists (B,) as their "mean", their "sum", or for "none" as they are."""
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@torch.library.custom_op("gradret::one_pass", mutates_args=())
def one_pass_op(
    scores: Tensor,
    index: Tensor,
    values: Tensor,
    mass: Tensor,
    share: Tensor,
    counts: Tensor,
    weights: Sequence[float],
    order: int,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    tables = Tables(index, values, mass, share, counts)
    width = values.shape[1:] if index.dtype == torch.uint8 else scores.shape[1:]
    if index.shape != scores.shape or not scores.shape[:1] + width == values.shape == mass.shape == share.shape:
        raise ValueError(f"tables of lists {tuple(index.shape)} do not fit scores {tuple(scores.shape)}")
    return cast(tuple[Tensor, Tensor], run_pass(scores, tables, weights, order, temperature, reduction, True))


@one_pass_op.register_fake
def _(scores, index, values, mass, share, counts, weights, order, temperature, reduction):
    return _fake(scores, reduction)


@torch.library.custom_op("gradret::one_pass_of_grades", mutates_args=())
def one_pass_of_grades_op(
    scores: Tensor,
    grades: Tensor,
    mask: Tensor | None,
    mass: Tensor | None,
    targets: str | None,
    ground: str,
    weights: Sequence[float],
    order: int,
    temperature: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    tables = make_tables(grades, targets or cast(Tensor, mass), ground, mask, result_dtype(scores))
    return cast(tuple[Tensor, Tensor], run_pass(scores, tables, weights, order, temperature, reduction, True))


@one_pass_of_grades_op.register_fake
def _(scores, grades, mask, mass, targets, ground, weights, order, temperature, reduction):
    return _fake(scores, reduction)


def _fake(scores: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:1] if reduction == "none" else ()
    gradient = scores.new_empty(scores.shape, dtype=_gradient_dtype(scores))
    return scores.new_empty(shape, dtype=result_dtype(scores)), gradient


def _gradient_dtype(scores: Tensor) -> torch.dtype:
    """Half types are computed in float32 where no kernel reads them."""
    half = scores.dtype == torch.float16 or (scores.dtype == torch.bfloat16 and backend(scores.device) != "cuda")
    return torch.float32 if half else scores.dtype


class _Once(torch.autograd.Function):
    """The identity; differentiating it is refused."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(TWICE)


def first_derivatives_only(backward):
    """A Function's backward whose results, asked for with create_graph=True, refuse to be differentiated."""

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        return tuple(None if g is None else _Once.apply(g.detach().requires_grad_()) for g in results)

    return checked


class _OnePass(torch.autograd.Function):
    """run_pass() under autograd, reduced: the gradient is computed with the loss, backward only scales it."""

    @staticmethod
    def forward(ctx, scores, grades, targets, ground, mask, *options):
        prepared = isinstance(grades, PreparedGrades)
        if torch.compiler.is_compiling() and prepared:
            loss, gradient = one_pass_op(scores, *grades.tables, *options)
        elif torch.compiler.is_compiling():
            kinds = (targets, None) if isinstance(targets, Tensor) else (None, targets)
            loss, gradient = one_pass_of_grades_op(scores, grades, mask, *kinds, ground, *options)
        else:
            tables = grades.tables if prepared else make_tables(grades, targets, ground, mask, result_dtype(scores))
            loss, gradient = run_pass(scores, tables, *options, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.dtype = scores.dtype
        return loss

    @staticmethod
    @first_derivatives_only
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        # On the CPU a factor of 1, as backward() gives it, costs no pass over the matrix. The host does not know what
        # it is on another device, nor while it is compiled.
        known = not torch.compiler.is_compiling() and grad_loss.dim() == 0 and grad_loss.device.type == "cpu"
        if not known or grad_loss.item() != 1:
            gradient = gradient * (grad_loss[:, None] if grad_loss.dim() else grad_loss)
        return gradient.to(ctx.dtype), *(None,) * 8
