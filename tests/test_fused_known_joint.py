"""Joint numbers whose upstream gradient is known: `linear_joint`'s, their gradients too, whatever comes down."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.fused.known_joint import known_joint
from tvkd_fast.ops import Head, linear_joint, unchecked

OUTPUTS = ("logps", "forward_kl", "jsd")
STUDENTS = ("hidden", "weight", "bias")


@pytest.fixture
def case() -> JointCase:
    return JointCase.draw((9, 5, 7, 23), dtype=torch.float64, softcap=4.0, teacher_logit_scale=0.7)


@pytest.fixture
def given(case: JointCase) -> tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Any]]:
    hidden, head, teacher_hidden, teacher = case.arguments()
    labels = case.labels.clone()
    labels[2] = -100
    upstream = dict(zip(OUTPUTS, case.upstream, strict=False))
    rows = torch.ones(9, dtype=torch.bool)
    rows[5] = False
    return (hidden, head, teacher_hidden, teacher, labels), upstream, {"beta": 0.3, "temperature": 1.5, "rows": rows}


def gradients(case: JointCase, found: dict[str, Tensor], upstream: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x for name in STUDENTS if (x := case.leaves[name]) is not None]
    loss = sum((upstream[name] * x).sum() for name, x in found.items())
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


@pytest.mark.parametrize(
    "known",
    [lambda x: x, lambda x: 3 * x, torch.ones_like, torch.zeros_like],
    ids=["as it comes", "but for a factor", "another", "nothing"],
)
def test_it_is_the_joint_walk_whatever_is_known(
    known: Callable[[Tensor], Tensor], case: JointCase, given: tuple[Any, ...]
) -> None:
    arguments, upstream, options = given
    wanted = linear_joint(*arguments, outputs=OUTPUTS, **options)
    found = known_joint(*arguments, upstream={name: known(x) for name, x in upstream.items()}, **options)
    for name in OUTPUTS:
        torch.testing.assert_close(found[name], wanted[name])
        assert (found[name][[2, 5]] == 0).all()
    for _ in range(2):
        # The second backward recomputes.
        assert_close(gradients(case, found, upstream), gradients(case, wanted, upstream), 1e-10)


def test_the_gradient_is_made_in_the_forward(
    case: JointCase, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvkd_fast.fused import known_joint as module

    arguments, upstream, options = given
    found = known_joint(*arguments, upstream=upstream, **options)
    monkeypatch.setattr(module, "joint_gradients_op", None)
    gradients(case, found, upstream)
    with pytest.raises(TypeError):
        gradients(case, found, upstream)


def test_no_gradient_goes_to_the_other_model(case: JointCase, given: tuple[Any, ...]) -> None:
    arguments, upstream, options = given
    found = known_joint(*arguments, upstream=upstream, **options)
    loss = sum(x.sum() for x in found.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    assert case.leaves["teacher_hidden"] is not None
    assert case.leaves["teacher_hidden"].grad is None


def test_what_is_known_has_one_number_per_row() -> None:
    hidden, head = torch.zeros(3, 4), Head(torch.zeros(9, 4))
    with unchecked(), pytest.raises(ValueError, match=r"upstream\['jsd'\] must be \(3,\)"):
        known_joint(hidden, head, hidden, head, upstream={"jsd": torch.ones(2)})
