"""Relational distances against their formulas response by response, gradients included, and what leaves them alone."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tvkd_fast.losses.states import relational_distances, relations

RELATIONS = ("cosine", "gram", "distance")


def cosine(h: Tensor, t: Tensor) -> Tensor:
    total = h.new_zeros(())
    for i in range(len(h)):
        for j in range(len(h)):
            ours, theirs = (x[i] @ x[j] / (x[i].norm() * x[j].norm()) for x in (h, t))
            total = total + (ours - theirs) ** 2
    return total / len(h) ** 2


def gram(h: Tensor, t: Tensor) -> Tensor:
    ours, theirs = h @ h.T, t @ t.T
    return 1 - (ours * theirs).sum() / (ours.norm() * theirs.norm())


def distance(h: Tensor, t: Tensor) -> Tensor:
    pairs = [(i, j) for i in range(len(h)) for j in range(len(h)) if i != j]
    if not pairs:
        return 0 * h.sum()
    ours, theirs = (torch.stack([(x[i] - x[j]).norm() for i, j in pairs]) for x in (h, t))
    x = (ours / ours.mean() - theirs / theirs.mean()).abs()
    return torch.where(x < 1, x**2 / 2, x - 0.5).mean()


TWINS = {"cosine": cosine, "gram": gram, "distance": distance}


@pytest.mark.parametrize("relation", RELATIONS)
def test_it_is_its_formula(relation: str, clouds: SimpleNamespace) -> None:
    def ours(hidden: Tensor, teacher: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return relational_distances(hidden, teacher, lengths, relation=relation)

    clouds.check_twin(ours, TWINS[relation], [clouds.states(6, 0)], clouds.states(11, 1))


@pytest.mark.parametrize("relation", RELATIONS)
def test_rotations_and_scales_of_either_model_change_nothing(relation: str, clouds: SimpleNamespace) -> None:
    hidden, teacher = clouds.states(6, 0), clouds.states(11, 1)
    turn, other = (torch.linalg.qr(clouds.states(n, n, lengths=[n]))[0] for n in (6, 11))
    before = relational_distances(hidden, teacher, clouds.lengths, relation=relation)
    after = relational_distances(3 * hidden @ turn, teacher @ other / 5, clouds.lengths, relation=relation)
    torch.testing.assert_close(after, before)
    assert before[0] > 1e-7
    same = relational_distances(hidden, 3 * hidden @ turn, clouds.lengths, relation=relation)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


@pytest.mark.parametrize("relation", RELATIONS)
def test_equal_states_and_zeros_have_finite_gradients(relation: str) -> None:
    hidden = torch.ones(4, 3, requires_grad=True)
    zeros = torch.zeros(4, 3, requires_grad=True)
    for leaf in (hidden, zeros):
        found = relational_distances(leaf, torch.randn(4, 5), [4], relation=relation)
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        assert math.isfinite(found.item())
        assert grad.isfinite().all()


@pytest.mark.parametrize("relation", RELATIONS)
def test_autocast_rounds_nothing(relation: str, clouds: SimpleNamespace) -> None:
    hidden, teacher = (clouds.states(n, n, torch.float32).requires_grad_() for n in (6, 11))
    found = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            values = relational_distances(hidden, teacher, clouds.lengths, relation=relation)
        found.append([values, *torch.autograd.grad(values.sum(), hidden)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_the_teacher_gets_no_gradient(clouds: SimpleNamespace) -> None:
    teacher = clouds.states(6, 1).requires_grad_()
    assert not relational_distances(clouds.states(6, 0), teacher, clouds.lengths).requires_grad


def test_what_is_refused(clouds: SimpleNamespace) -> None:
    hidden = clouds.states(6, 0)
    with pytest.raises(ValueError, match=r"relation must be one of cosine, gram, distance, got 'rkd'"):
        relational_distances(hidden, hidden, clouds.lengths, relation="rkd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of the same tokens, got \(17, 6\) and \(16, 6\): give both models"):
        relational_distances(hidden, hidden[1:], clouds.lengths)
    for lengths in ((17, 1), (17, 0)):
        with pytest.raises(ValueError, match=r"lengths must be positive and sum to the 17 states"):
            relational_distances(hidden, hidden, lengths)


def test_the_examples_are_so() -> None:
    assert doctest.testmod(relations).failed == 0
