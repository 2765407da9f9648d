"""The losses of gradret.loss.one_pass in plain PyTorch, for devices without a compiled kernel.

Sums are made in float64 where the device has it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret.loss.grades import ABSENT, Tables, accumulation_dtype, normalize_mass, result_dtype


def loss_and_gradient(
    scores: Tensor, tables: Tables, weights: Sequence[float], order: int, temperature: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weighted sum of W_p^p along the grade axis, KL(q || p) and the contrast, and its gradient, list by list.

    With P the mass of p = softmax(x), x = scores / temperature, at each grade v in ascending order, Q the target mass,
    prefix sums F of P and G of Q, and gaps g_i = v_{i+1} - v_i, W_p^p is

        order 1: sum g_i |F_i - G_i|,                            t_i = g_i sgn(F_i - G_i)
        order 2: integral of (F^-1(u) - G^-1(u))^2 over [0, 1],  t_i = 2 g_i (G^-1(F_i) - (v_i + v_{i+1}) / 2)

    d loss / d x_i = p_i c_i, where c is the potential phi_l = sum_{i >= l} t_i less its mean
    under P. With S_i = 1 - F_i summed from the other end, c_l = sum_{i >= l} t_i S_i - sum_{i < l} t_i F_i,
    which does not cancel as phi_l - sum_k P_k phi_k does when p has saturated.

    With q the documents' target mass, d KL / d x_i = p_i - q_i. With R_i the sum of e^x_j over the documents j of lower
    grade than i, and u_i = R_i / (e^x_i + R_i), the contrast is the sum of -q_i log(1 - u_i), and its derivative -q_i
    u_i plus e^x_i times the sum of q_j u_j / R_j over the documents j of higher grade. For these two a document of
    score -inf has no target mass.

    Args:
        scores: (B, N) float.
        tables: see gradret.loss.grades.
        weights: of the transport, of KL and of the contrast; what has weight 0 is not computed.
        order: 1 or 2.
        temperature: > 0, in units of score.
        scale: what the gradient is multiplied by.

    Returns: loss (B,), float64 for float64 scores, else float32, and its gradient (B, N) with respect to scores, in
        their dtype. A list without predicted or target mass has loss 0 and gradient 0.
    Source: Peyré and Cuturi, Computational Optimal Transport (2019), section 2.6.
    """
    if tables.values.numel() == 0:  # no lists, or none with a document
        return torch.zeros(len(scores), dtype=result_dtype(scores), device=scores.device), torch.zeros_like(scores)
    dtype = accumulation_dtype(scores.device)
    by_level = tables.index.dtype == torch.uint8
    index = tables.index.long()
    v, Q, share = (t.to(dtype) for t in (tables.values, tables.mass, tables.share))  # (B, L)
    if by_level:
        absent = index == ABSENT
        level = index.masked_fill(absent, 0)
    else:
        present = torch.arange(scores.shape[1], device=scores.device) < tables.counts[:, None]
        absent = torch.zeros_like(present).scatter(-1, index, ~present)

    def spread(of_level: Tensor) -> Tensor:
        """(B, L) to the documents, (B, N)."""
        return of_level.gather(-1, level) if by_level else torch.zeros_like(x).scatter(-1, index, of_level)

    transport, cross, contrast = weights
    x = (scores.to(dtype) / temperature).masked_fill(absent, -torch.inf)
    p = masked_softmax(x, ~absent)  # (B, N)
    P = torch.zeros_like(v).scatter_add(-1, level, p) if by_level else p.gather(-1, index)  # (B, L)
    alive = (P.sum(-1) != 0) & (Q.sum(-1) != 0)  # (B,); NaN is alive, so that it shows
    loss, slope = P.sum(-1) + Q.sum(-1), p
    loss, slope = torch.where(loss.isnan(), loss, 0), torch.where(loss.isnan()[:, None], p + loss[:, None], 0)
    if transport:
        value, c = _solve(P, Q, v, order, 8 * torch.finfo(dtype).eps)
        loss, slope = loss + transport * value, slope + transport * p * spread(c)
    if cross or contrast:
        q = normalize_mass(spread(share).masked_fill(x == -torch.inf, 0).masked_fill(absent, 0))
    if cross:
        log_p = torch.where(q > 0, x.log_softmax(-1), 0)  # what is absent costs nothing
        loss = loss + cross * (torch.xlogy(q, q) - q * log_p).sum(-1)
        slope = slope + cross * (p * (q.sum(-1, keepdim=True) != 0) - q)
    if contrast:
        # By level, or by place in the sorted form, in which equal grades are neighbours: log R, and the logarithm of
        # the sum of q_j u_j / R_j. A level's own documents are in neither.
        if by_level:
            of_levels = (torch.where(index == number, x, -torch.inf) for number in range(v.shape[1]))
            masses = torch.stack([of_level.logsumexp(-1) for of_level in of_levels], -1)
            first = torch.arange(v.shape[1], device=x.device).expand_as(v)
            last = first + 1
        else:
            masses = x.gather(-1, index)
            first, last = (torch.searchsorted(v, v, right=right) for right in (False, True))  # of equal grades
        lower = _scan_logs(masses, first)
        rival, weighs = spread(lower), q > 0
        # A finite floor stands for -inf: a difference of two of these would be NaN.
        above = torch.where(weighs, x, 0) - torch.where(rival == -torch.inf, torch.finfo(dtype).min, rival)
        pull = torch.where(weighs, q * torch.sigmoid(-above), 0)
        loss = loss + contrast * torch.where(weighs, -q * nnf.logsigmoid(above), 0).sum(-1)
        pulls = torch.zeros_like(v).scatter_add(-1, level, pull) if by_level else pull.gather(-1, index)
        pushes = torch.where(pulls > 0, pulls.log() - lower, -torch.inf)
        higher = _scan_logs(pushes.flip(-1), v.shape[1] - last.flip(-1)).flip(-1)
        slope = slope + contrast * ((x + spread(higher)).exp() - pull)
    gradient = torch.where(absent, 0, slope) * (scale / temperature)
    # P and Q are 0 in a list without mass, but the quantiles of nothing are not.
    loss = torch.where(alive, loss, 0).to(result_dtype(scores))
    return loss, torch.where(alive[:, None], gradient, 0).to(scores.dtype)


def _solve(P: Tensor, Q: Tensor, v: Tensor, order: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Loss (B,) and centred potential (B, L) of masses P and Q at ascending grades v, all (B, L)."""
    F, G = P.cumsum(-1), Q.cumsum(-1)
    # What differs by the rounding of the sums alone is equal: at P = Q the subgradient is 0.
    snapped = torch.where((F - G).abs() <= tolerance * torch.maximum(F, G), G, F)
    S = P.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # S[:, i]: mass above gap i
    gaps = v.diff()  # (B, L - 1)
    if order == 1:
        loss = (gaps * (F - G)[:, :-1].abs()).sum(-1)
        t = gaps * (snapped - G)[:, :-1].sign()
    else:
        loss = _quantile_loss(F, G, v)
        # On an exact tie of F with a step of G the quantile jumps: take the mean of its two limits.
        middle = (_quantile(G, snapped, v, right=False) + _quantile(G, snapped, v, right=True))[:, :-1] / 2
        t = 2 * gaps * (middle - (v[:, :-1] + v[:, 1:]) / 2)
    c = torch.zeros_like(P)
    c[:, 1:] -= (t * F[:, :-1]).cumsum(-1)
    c[:, :-1] += (t * S).flip(-1).cumsum(-1).flip(-1)
    return loss, c


def _scan_logs(x: Tensor, counts: Tensor) -> Tensor:
    """log(sum of e^x over the first counts_i entries of the row), all (B, L); -inf where that is none."""
    sums, step = x, 1
    while step < x.shape[1]:
        sums = torch.cat([sums[:, :step], torch.logaddexp(sums[:, step:], sums[:, :-step])], -1)
        step *= 2
    return torch.cat([torch.full_like(x[:, :1], -torch.inf), sums], -1).gather(-1, counts)


def _quantile(cdf: Tensor, u: Tensor, v: Tensor, *, right: bool) -> Tensor:
    """v at the first position where cdf >= u (> u if right), never above the last position that has mass."""
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)
    index = torch.searchsorted(cdf, u.contiguous(), right=right)
    return v.gather(-1, torch.minimum(index, last))


def _quantile_loss(F: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """The integral of (F^-1 - G^-1)^2, both constant between neighbours of the merged steps."""
    steps = torch.cat([F, G], -1).sort(-1).values  # (B, 2L)
    widths = steps.diff(prepend=torch.zeros_like(steps[:, :1]))
    return (widths * (_quantile(F, steps, v, right=False) - _quantile(G, steps, v, right=False)) ** 2).sum(-1)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the positions where mask is True, (B, N); a row without any is all zeros."""
    logits = logits.masked_fill(~mask, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    mass = (logits - torch.where(top == -torch.inf, 0, top)).exp()
    return normalize_mass(mass)
