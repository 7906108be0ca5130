"""Projected distances against their formulas response by response, gradients of both learners included."""

import doctest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.losses.states import projected_distances, projections


def cosine(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    v = h @ w.T
    return sum(1 - v[i] @ t[i] / (v[i].norm() * t[i].norm()) for i in range(len(h))) / len(h)


def squared(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return ((h @ w.T - t) ** 2).sum() / (t**2).sum()


@pytest.mark.parametrize("twin", [cosine, squared])
def test_it_is_its_formula(twin: Any, clouds: SimpleNamespace) -> None:
    projection = torch.randn(11, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def ours(hidden: Tensor, weight: Tensor, teacher: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return projected_distances(hidden, weight, teacher, lengths, measure=twin.__name__)

    clouds.check_twin(ours, twin, [clouds.states(6, 0), projection], clouds.states(11, 1))


@pytest.mark.parametrize("measure", ["cosine", "squared"])
def test_a_projection_onto_the_teacher_is_at_no_distance(measure: str, clouds: SimpleNamespace) -> None:
    hidden = clouds.states(6, 0)
    projection = torch.randn(11, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = projected_distances(hidden, projection, hidden @ projection.T, clouds.lengths, measure=measure)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_what_is_refused(clouds: SimpleNamespace) -> None:
    hidden, teacher = clouds.states(6, 0), clouds.states(11, 1)
    with pytest.raises(ValueError, match=r"measure must be one of cosine, squared, got 'mse'"):
        projected_distances(hidden, torch.zeros(11, 6), teacher, clouds.lengths, measure="mse")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"must be \[11, 6\], from the student's width to the teacher's, got \[6, 11\]"
    ):
        projected_distances(hidden, torch.zeros(6, 11), teacher, clouds.lengths)


def test_the_examples_are_so() -> None:
    assert doctest.testmod(projections).failed == 0
