"""The list-wise transport operator in pure PyTorch: loss and gradient of each list in one pass.

For real-valued grades: sort each list by grade, then take prefix sums.
"""

import torch
from torch import Tensor


def transport(scores: Tensor, grades: Tensor, weights: Tensor, mask: Tensor, order: int, temperature: float):
    """W_p^p between predicted and target mass along the grade axis, and its gradient, list by list.

    With the list sorted by grade v, p = softmax(scores / temperature), q = weights / sum, prefix sums F of p
    and G of q, and gaps g_i = v_{i+1} - v_i:

        order 1: sum g_i |F_i - G_i|,                            t_i = g_i sgn(F_i - G_i)
        order 2: integral of (F^-1(u) - G^-1(u))^2 over [0, 1],  t_i = 2 g_i (G^-1(F_i) - (v_i + v_{i+1}) / 2)

    d loss / d s_i = p_i c_i / temperature, where c is the potential phi_l = sum_{i >= l} t_i less its mean
    under p. With S_i = 1 - F_i summed from the other end, c_l = sum_{i >= l} t_i S_i - sum_{i < l} t_i F_i,
    which does not cancel as phi_l - sum_k P_k phi_k does when p has saturated.

    Args:
        scores: (B, N) float; the sums are made in float64 where the device has it.
        grades: (B, N) real.
        weights: (B, N) unnormalised target mass, >= 0.
        mask: (B, N) bool, True where a document exists.
        order: 1 or 2.
        temperature: > 0, in units of score.

    Returns: loss (B,), float64 for float64 scores, else float32, and its gradient (B, N) with respect to scores, in
        their dtype. A list without predicted or target mass has loss 0 and gradient 0.
    Source: Peyré and Cuturi, Computational Optimal Transport (2019), section 2.6.
    """
    dtype = accumulation_dtype(scores.device)
    p = masked_softmax(scores.to(dtype) / temperature, mask)  # (B, N)
    q = normalize_mass(weights.to(dtype).masked_fill(~mask, 0))  # (B, N)
    alive = (p.sum(-1) != 0) & (q.sum(-1) != 0)  # (B,); NaN is alive, so that it shows

    # An absent document goes to the top of its list's grades, where it has no mass and its gap is 0.
    grades = grades.to(dtype)
    top = grades.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    grades = torch.where(mask, grades, torch.where(top.isfinite(), top, 0))
    v, by_grade = grades.sort(-1)
    p_sorted, q_sorted = p.gather(-1, by_grade), q.gather(-1, by_grade)
    F, G = p_sorted.cumsum(-1), q_sorted.cumsum(-1)
    # What differs by the rounding of the sums alone is equal: at p = q the subgradient is 0.
    F = torch.where((F - G).abs() <= 8 * torch.finfo(dtype).eps * torch.maximum(F, G), G, F)
    S = p_sorted.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # S[:, i]: mass above gap i
    gaps = v.diff()  # (B, N - 1)

    if order == 1:
        difference = (F - G)[:, :-1]
        loss = (gaps * difference.abs()).sum(-1)
        t = gaps * difference.sign()
    else:
        loss = _quantile_loss(F, G, v)
        # On an exact tie of F with a step of G the quantile jumps: take the mean of its two limits.
        middle = (_quantile(G, F, v, right=False) + _quantile(G, F, v, right=True))[:, :-1] / 2
        t = 2 * gaps * (middle - (v[:, :-1] + v[:, 1:]) / 2)

    c = torch.zeros_like(p)
    c[:, 1:] -= (t * F[:, :-1]).cumsum(-1)
    c[:, :-1] += (t * S).flip(-1).cumsum(-1).flip(-1)
    gradient = torch.zeros_like(p).scatter(-1, by_grade, p_sorted * c) / temperature
    # p and q are 0 in a list without mass, but the quantiles of nothing are not.
    loss = torch.where(alive, loss, 0).to(result_dtype(scores))
    return loss, torch.where(alive[:, None], gradient, 0).to(scores.dtype)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(scores: Tensor) -> torch.dtype:
    """What a loss of these scores comes in: float64 for float64, else float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _quantile(cdf: Tensor, u: Tensor, v: Tensor, *, right: bool) -> Tensor:
    """v at the first position where cdf >= u (> u if right), never above the last position that has mass."""
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)
    index = torch.searchsorted(cdf, u.contiguous(), right=right)
    return v.gather(-1, torch.minimum(index, last))


def _quantile_loss(F: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """The integral of (F^-1 - G^-1)^2, both constant between neighbours of the merged steps."""
    steps = torch.cat([F, G], -1).sort(-1).values  # (B, 2N)
    widths = steps.diff(prepend=torch.zeros_like(steps[:, :1]))
    return (widths * (_quantile(F, steps, v, right=False) - _quantile(G, steps, v, right=False)) ** 2).sum(-1)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the positions where mask is True, (B, N); a row without any is all zeros."""
    logits = logits.masked_fill(~mask, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    mass = (logits - torch.where(top == -torch.inf, 0, top)).exp()
    return normalize_mass(mass)


def normalize_mass(mass: Tensor) -> Tensor:
    """mass / its sum over the row, (B, N); a row without mass stays zero."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1)


class Transport(torch.autograd.Function):
    """transport() under autograd: the gradient is computed with the loss, backward only scales it."""

    @staticmethod
    def forward(ctx, scores, grades, weights, mask, order, temperature):
        loss, gradient = transport(scores, grades, weights, mask, order, temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(gradient.dtype), None, None, None, None, None
