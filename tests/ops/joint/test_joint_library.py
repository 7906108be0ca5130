"""The joint op as a citizen of torch: opcheck, torch.compile, autocast, checkpoints, fakes, one derivative, memory."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from joint_case import JointCase, assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvkd_fast.ops.joint import joint_op as op
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint

SHAPE = (9, 5, 6, 30)
OUTPUTS = ("logps", "forward_kl", "jsd", "entropy")
SETTINGS = (",".join(OUTPUTS), 0.3, 0.5, 4.0, 0.5, None, 1.5, 1.2, -100, "torch")
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def tensors(case: JointCase) -> tuple[Any, ...]:
    return (*case.leaves.values(), case.labels, None, None, None)


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_opcheck(dtype: torch.dtype, wants: tuple[bool, ...]) -> None:
    case = JointCase.draw(SHAPE, dtype=dtype)
    case.labels[3] = -100
    for x, want in zip(case.leaves.values(), (*wants, *reversed(wants)), strict=True):
        assert x is not None
        x.requires_grad_(want)
    torch.library.opcheck(op.joint_op, (*tensors(case), *SETTINGS))


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize("wants", [(True,) * 6, (True, False, True, False, True, False)], ids=str)
def test_opcheck_of_the_gradients(dtype: torch.dtype, wants: tuple[bool, ...]) -> None:
    case = JointCase.draw(SHAPE, dtype=dtype)
    given = [None if x is None else x.detach() for x in tensors(case)]
    values, numbers = op.joint_op(*given, *SETTINGS)
    upstream = torch.ones_like(values)
    torch.library.opcheck(op.joint_gradients_op, (upstream, *given, numbers, *SETTINGS, *wants))


def test_the_student_alone_passes_opcheck() -> None:
    case = JointCase.draw(SHAPE)
    leaves = list(case.leaves.values())[:3]
    alone = ("logps,log_sum_p2", 0.5, 0.5, None, 1.0, None, 1.0, 1.0, -100, "torch")
    torch.library.opcheck(op.joint_op, (*leaves, None, None, None, case.labels, None, None, None, *alone))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_of_any_number_of_tokens(backend: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        found = linear_joint(hidden, weight, teacher, teacher_weight, labels, outputs=OUTPUTS, temperature=1.3)
        return sum(x.sum() for x in found.values()) + linear_divergence(hidden, weight, teacher, teacher_weight).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for n in (9, 14, 23):
        case = JointCase.draw((n, *SHAPE[1:]), bias=False)
        leaves = [x for x in case.leaves.values() if x is not None]
        got, want = (f(*leaves, case.labels) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        grads, wanted = (torch.autograd.grad(x, leaves) for x in (got, want))
        torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-6)


def test_autocast_rounds_both_models() -> None:
    case = JointCase.draw(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_divergence(*case.arguments())
    rounded = {k: None if x is None else x.detach().bfloat16().requires_grad_() for k, x in case.leaves.items()}
    want = linear_divergence(*JointCase(rounded, case.labels, case.upstream).arguments())
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert all(x.dtype == torch.float32 for x in case.gradients({"": got}))


def test_activation_checkpointing() -> None:
    case = JointCase.draw(SHAPE)
    got = checkpoint(linear_divergence, *case.arguments(), kind="jsd", use_reentrant=False)
    want = linear_divergence(*case.arguments(), kind="jsd")
    assert torch.equal(got, want)
    for x, y in zip(case.gradients({"": got}), case.gradients({"": want}), strict=True):
        assert torch.equal(x, y)


def test_shapes_without_numbers() -> None:
    with torch.device("meta"):
        hidden, weight = torch.empty(5, 4), torch.empty(9, 4, requires_grad=True)
        teacher, teacher_weight = torch.empty(5, 6), torch.empty(9, 6)
        value = linear_divergence(hidden, weight, teacher, teacher_weight)
        (grad,) = torch.autograd.grad(value.sum(), weight)
    assert (value.shape, value.dtype, grad.shape) == ((5,), torch.float32, (9, 4))


def test_a_second_derivative_is_refused() -> None:
    case = JointCase.draw(SHAPE)
    value = linear_divergence(*case.arguments())
    with pytest.raises(RuntimeError, match="linear_joint can be differentiated once"):
        torch.autograd.grad(value.sum(), case.leaves["hidden"], create_graph=True)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name: str) -> None:
    hidden, head, teacher_hidden, teacher = JointCase.draw(SHAPE).arguments()
    with pytest.raises(RuntimeError, match=r"takes no torch.func transform"):
        TRANSFORMS[name](lambda x: linear_divergence(x, head, teacher_hidden, teacher), hidden)


def test_twice_through_one_graph() -> None:
    case = JointCase.draw(SHAPE)
    value = linear_divergence(*case.arguments(), kind="reverse_kl")
    leaves = [x for x in case.leaves.values() if x is not None]
    first, second = (torch.autograd.grad(value.sum(), leaves, retain_graph=True) for _ in range(2))
    assert_close(first, [x.double() for x in second], 1e-7)
