"""Entropic transport against iterations that autograd unrolls, a linear program, and closed forms."""

import doctest
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tvkd_fast.losses.states import entropic_transport, sinkhorn, sinkhorn_divergence, transport_distances

CONVERGED = {"epsilon": 0.1, "iterations": 2000, "tolerance": 0.0}


def unrolled(cost: Tensor, epsilon: float = 0.1) -> Tensor:
    """OT_ε of [n, m] under even weights: scalings u and v of e^{−C/ε}, and the objective of the plan that they make."""
    n, m = cost.shape
    kernel, u, v = torch.exp(-cost / epsilon), cost.new_ones(n), cost.new_ones(m)
    for _ in range(2000):
        v = 1 / (m * (kernel.T @ u))
        u = 1 / (n * (kernel @ v))
    plan = u[:, None] * kernel * v
    return (plan * cost).sum() + epsilon * (plan * (plan * n * m).log() - plan + 1 / (n * m)).sum()


def divergence(x: Tensor, y: Tensor) -> Tensor:
    across, own, theirs = (unrolled(torch.cdist(a, b).square()) for a, b in ((x, y), (x, x.clone()), (y, y.clone())))
    return across - (own + theirs) / 2


def even(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((1, n), 1 / n, dtype=dtype).log()


def test_value_and_gradient_are_those_of_unrolled_iterations() -> None:
    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(1, 5, 7, generator=draw, dtype=torch.float64).requires_grad_()
    found, wanted = entropic_transport(cost, even(5), even(7), **CONVERGED), unrolled(cost[0])
    torch.testing.assert_close(found[0], wanted, rtol=1e-10, atol=1e-12)
    ours, twin = (torch.autograd.grad(value.sum(), cost, retain_graph=True)[0] for value in (found, wanted))
    torch.testing.assert_close(ours, twin, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(ours.sum(1), torch.full((1, 7), 1 / 7, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_little_entropy_is_the_assignment() -> None:
    cost = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost[0].numpy())
    best = cost[0][rows, columns].mean()
    found = entropic_transport(cost, even(6), even(6), epsilon=1e-3, iterations=5000, tolerance=1e-9)
    # Beside the cost it has the plan's entropy, at most ε·log 6.
    assert best <= found.item() <= best + 1e-3 * 1.8


def test_a_divergence_and_its_gradient_by_the_points() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(1, 4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    y = torch.rand(1, 6, 3, generator=draw, dtype=torch.float64)
    found, wanted = sinkhorn_divergence(x, y, even(4), even(6), **CONVERGED), divergence(x[0], y[0])
    torch.testing.assert_close(found[0], wanted, rtol=1e-9, atol=1e-12)
    ours, twin = (torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (found, wanted))
    torch.testing.assert_close(ours, twin, rtol=1e-7, atol=1e-10)


def test_one_point_each_is_their_squared_distance_and_no_points_are_left_out_ones() -> None:
    x, y = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    alone = torch.tensor([[0.0, -torch.inf]])
    x.requires_grad_()
    found = sinkhorn_divergence(x, y, alone, alone)
    torch.testing.assert_close(found, torch.tensor([3.0]))
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[[-2.0] * 3, [0.0] * 3]]))


def points(h: Tensor) -> Tensor:
    units = h / h.norm(dim=1, keepdim=True)
    return units @ units.T / len(h) ** 0.5


def test_rows_of_cosines_are_its_formula(clouds: SimpleNamespace) -> None:
    def ours(hidden: Tensor, teacher: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return transport_distances(hidden, teacher, lengths, epsilon=0.1, iterations=2000)

    def twin(h: Tensor, t: Tensor) -> Tensor:
        x, y = points(h), points(t)
        unit = torch.cdist(x, y).square().mean().detach()
        # Of a response of one token both rows are (1).
        return unit * divergence(x / unit.sqrt(), y / unit.sqrt()) if len(h) > 1 else 0 * h.sum()

    # Off by what the tolerance of the marginals leaves, which is far below what float32 rounds away.
    hidden, teacher = clouds.states(6, 0), clouds.states(11, 1)
    leaf = hidden.requires_grad_()
    found = ours(leaf, teacher, clouds.lengths)
    wanted = torch.stack(
        [twin(h, t) for h, t in zip(leaf.split(clouds.lengths), teacher.split(clouds.lengths), strict=True)]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_autocast_rounds_nothing(clouds: SimpleNamespace) -> None:
    hidden, teacher = (clouds.states(n, n, torch.float32).requires_grad_() for n in (6, 11))
    found = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            values = transport_distances(hidden, teacher, clouds.lengths)
        found.append([values, *torch.autograd.grad(values.sum(), hidden)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_response_does_not_depend_on_the_others(clouds: SimpleNamespace) -> None:
    hidden, teacher = clouds.states(6, 0), clouds.states(11, 1)
    whole = transport_distances(hidden, teacher, clouds.lengths)
    alone = [
        transport_distances(h, t, [len(h)])
        for h, t in zip(hidden.split(clouds.lengths), teacher.split(clouds.lengths), strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-12, atol=1e-14)
    assert whole[0] > 1e-6


def test_a_projection_learns_too(clouds: SimpleNamespace) -> None:
    hidden, teacher = clouds.states(6, 0), clouds.states(11, 1)
    projection = torch.randn(11, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()

    found = transport_distances(hidden, teacher, clouds.lengths, projection=projection, epsilon=0.1, iterations=3000)
    (grad,) = torch.autograd.grad(found.sum(), projection)
    wanted = hidden.new_zeros(())
    for h, t in zip(hidden.split(clouds.lengths), teacher.split(clouds.lengths), strict=True):
        v = h @ projection.T
        x, y = v / v.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
        unit = torch.cdist(x, y).square().mean().detach()
        wanted = wanted + unit * divergence(x / unit.sqrt(), y / unit.sqrt())
    torch.testing.assert_close(found.sum(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, projection)[0], rtol=1e-3, atol=1e-6)
    same = transport_distances(hidden, hidden, clouds.lengths, projection=torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": float("nan")}, {"iterations": 0}])
def test_what_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be positive and iterations at least 1"):
        entropic_transport(torch.zeros(1, 2, 2), even(2), even(2), **wrong)


def test_the_examples_are_so() -> None:
    assert doctest.testmod(sinkhorn).failed == 0
