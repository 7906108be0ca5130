"""Entropic optimal transport between two clouds of states, in the logarithm's domain.

Letters: S responses, n points of one cloud and m of the other, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.losses.states.relations import cosines
from tvkd_fast.losses.states.responses import check_same_tokens, padded, products

_SMALLEST = 1e-12
"""The least mean squared distance that is taken for a unit."""


def entropic_transport(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> Tensor:
    """OT_ε = min_P ⟨P, C⟩ + ε·KL(P‖a⊗b) over plans P of marginals a and b, by Sinkhorn's iterations.

    Potentials are updated in turn, f = −ε LSE_j(log b_j + (g_j − C_ij)/ε) and g likewise, from 0; the value is
    Σ a·f + Σ b·g, and its gradient by the cost the plan P_ij = a_i·b_j·e^{(f_i + g_j − C_ij)/ε}, which is the optimum's
    where the iterations have converged (Danskin): nothing of them is kept for the backward.

    Args:
        cost: [S, n, m] floats.
        log_a: [S, n] logarithms of weights that sum to 1; −inf leaves a point out.
        log_b: [S, m] likewise.
        epsilon: ε > 0, in units of the cost: the smaller, the nearer to plain transport and the more iterations.
        iterations: the most; those of a response end once its plan's marginals are off by `tolerance` in sum or less.

    Returns:
        (S,) of the cost's dtype, differentiable by it.

    Raises:
        ValueError: ε that is not positive, or no iterations.

    Examples:
        >>> import torch
        >>> even = torch.full((1, 2), 0.5).log()
        >>> entropic_transport(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), even, even, epsilon=0.01)
        tensor([0.0069])
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon must be positive and iterations at least 1, got {epsilon} and {iterations}")
    with torch.no_grad():
        scaled = cost.detach() / epsilon
        g = torch.zeros_like(log_b)
        f = -torch.logsumexp((log_b + g)[:, None, :] - scaled, 2)
        a, b = log_a.exp(), log_b.exp()
        moving = torch.ones_like(f[:, :1], dtype=torch.bool)
        for _ in range(iterations):
            g = g.where(~moving, -torch.logsumexp((log_a + f)[:, :, None] - scaled, 1))
            before, f = f, f.where(~moving, -torch.logsumexp((log_b + g)[:, None, :] - scaled, 2))
            # Between the two, row i of the plan summed to a_i·e^{before − f}. Each response stops by itself, so that
            # its value does not depend on the others.
            moving &= (a * torch.expm1(before - f).abs()).sum(1, keepdim=True) > tolerance
            # To look would wait for another device.
            if cost.device.type == "cpu" and not bool(moving.any()):
                break
        plan = torch.exp((log_a + f)[:, :, None] + (log_b + g)[:, None, :] - scaled)
        value = epsilon * ((a * f).sum(1) + (b * g).sum(1))
    return value + (plan * (cost - cost.detach())).sum((1, 2))


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> Tensor:
    """OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y) under squared distances: 0 where the clouds are one (arXiv 1810.08278).

    Args:
        x: [S, n, D] points, differentiable.
        y: [S, m, D] points; a constant.
        log_a, log_b, epsilon, iterations, tolerance: as in `entropic_transport`; ε is of squared distances.

    Returns:
        (S,), not negative but for rounding and what the iterations leave.

    Examples:
        >>> import torch
        >>> x, even = torch.zeros(1, 2, 3), torch.full((1, 2), 0.5).log()
        >>> sinkhorn_divergence(x, x + 1.0, even, even)
        tensor([3.0000])
    """
    transport = partial(entropic_transport, epsilon=epsilon, iterations=iterations, tolerance=tolerance)
    y = y.detach()
    across = transport(squared_distances(x, y), log_a, log_b)
    own, theirs = transport(squared_distances(x, x), log_a, log_a), transport(squared_distances(y, y), log_b, log_b)
    return across - (own + theirs) / 2


def transport_distances(
    hidden: Tensor,
    teacher_hidden: Tensor,
    lengths: Sequence[int],
    *,
    projection: Tensor | None = None,
    epsilon: float = 0.05,
    iterations: int = 200,
) -> Tensor:
    """The Sinkhorn divergence between a response's states under student and teacher, all tokens of equal weight.

    Points of a token are, without a `projection`, its row of cosines to the response's tokens, over √T, as in PKDOT
    (arXiv 2401.15489), which need no common width; and with one, its unit state, the student's projected.

    Args:
        hidden: (N, D) the student's states of packed responses.
        teacher_hidden: (N, D') the teacher's of the same tokens; a constant.
        lengths: tokens of each response, on the host.
        projection: [D', D] or None.
        epsilon: ε > 0 over the mean squared distance between the points of student and teacher, a constant: what is far
            depends on the models and on the response's length.
        iterations: as in `entropic_transport`.

    Returns:
        (S,) float32 (float64 for float64 states), differentiable by `hidden` and `projection`.

    Raises:
        ValueError: states of other tokens, lengths that do not fit them, ε or iterations out of range.

    Examples:
        >>> import torch
        >>> transport_distances(torch.eye(2, 3), torch.eye(2, 5), [2])
        tensor([0.])
    """
    check_same_tokens(hidden, teacher_hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    projected = hidden if projection is None else F.linear(hidden, projection)
    ours, filled = padded(projected.to(dtype), lengths)
    theirs, _ = padded(teacher_hidden.detach().to(dtype), lengths)
    count = filled.sum(1, keepdim=True)
    if projection is None:
        ours, theirs = (cosines(x) / count.sqrt()[:, :, None] for x in (ours, theirs))
    else:
        ours, theirs = (F.normalize(x, dim=-1) for x in (ours, theirs))
    log_weights = torch.zeros_like(filled, dtype=dtype).masked_fill(~filled, -torch.inf) - count.log()
    both = log_weights.exp()[:, :, None] * log_weights.exp()[:, None, :]
    unit = (squared_distances(ours.detach(), theirs) * both).sum((1, 2))
    ours, theirs = (x / unit.clamp(min=_SMALLEST).sqrt()[:, None, None] for x in (ours, theirs))
    return unit * sinkhorn_divergence(ours, theirs, log_weights, log_weights, epsilon=epsilon, iterations=iterations)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[S, n, D] and [S, m, D] points to [S, n, m], never below 0. Differentiable."""
    squared = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2 * products(x, y)
    return squared.clamp(min=0)
