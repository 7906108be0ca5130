"""The distillation loss whose gradient is made in the forward, against the joint op and the float64 twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.fused import distillation_op as fused_op
from tvkd_fast.fused.distillation import fused_linear_distillation_loss
from tvkd_fast.ops.joint.outputs import OUTPUTS
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (21, 7, 11, 53)
MIXTURES: dict[str, dict[str, float]] = {
    "forward": {"forward_kl": 1.0},
    "reverse": {"reverse_kl": 1.0},
    "jsd": {"jsd": 2.0},
    "DCKD": {"logps": -1.0, "forward_kl": 0.1},
    "all": {name: 0.3 * (-1) ** i for i, name in enumerate(OUTPUTS)},
    "one walk and two": {"forward_kl": 0.5, "skew_reverse_kl": 1.0, "entropy": -0.1},
    "torch's passes": {"tvd": 1.0, "alpha": -1.0},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def student_only(case: JointCase) -> JointCase:
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        x = case.leaves[name]
        if x is not None:
            x.requires_grad_(requires_grad=False)
    return case


def grads_of(loss: Tensor, case: JointCase, **options: Any) -> list[Tensor]:
    leaves = [x for x in case.leaves.values() if x is not None and x.requires_grad]
    return list(torch.autograd.grad(loss, leaves, **options))


def twin(case: JointCase, mixture: dict[str, float], weights: Tensor, **options: Any) -> Tensor:
    found = case.twin(tuple(mixture), **options)
    return sum((mixture[name] * weights.double() * x).sum() for name, x in found.items())  # type: ignore[return-value]


@pytest.mark.parametrize("passes", ["numba", "torch"])
@pytest.mark.parametrize("teacher", [False, True], ids=["frozen-teacher", "both-learn"])
@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "teacher_softcap": 3.0, "logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_float64_twin(
    monkeypatch: pytest.MonkeyPatch, name: str, head: dict[str, Any], teacher: bool, passes: str
) -> None:
    if passes == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    case = JointCase.draw(SHAPE, **head)
    case.labels[[3, 20]] = -100
    wide = case.double()
    if not teacher:
        case, wide = student_only(case), student_only(wide)
    weights, mixture = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(5)), MIXTURES[name]
    out = fused_linear_distillation_loss(
        *case.arguments(), case.labels, mixture=mixture, token_weights=weights, beta=0.3, temperature=1.4
    )
    want = twin(wide, mixture, weights, beta=0.3, temperature=1.4)
    torch.testing.assert_close(out.loss.double(), want, rtol=5e-6, atol=5e-6)
    assert_close(grads_of(out.loss, case), grads_of(want, wide), 3e-6)
    assert list(out.outputs) == list(mixture)
    assert not any(x.requires_grad for x in out.outputs.values())


@draws(60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 130)),
    rows=st.integers(1, 40),
    floats=st.integers(1, 3000),
    names=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=4, unique=True),
    teacher=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_any_blocks(
    shape: tuple[int, int, int, int], rows: int, floats: int, names: list[str], teacher: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "TILE_FLOATS", floats)
        patch.setattr(walk, "workspace_rows", lambda task, megabytes: rows)
        case = JointCase.draw(shape, dtype=torch.float64, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        case.labels[torch.rand(shape[0], generator=draw) < 0.2] = -100
        wide = case.double()
        if not teacher:
            case, wide = student_only(case), student_only(wide)
        mixture, weights = {name: 1.0 - 0.7 * i for i, name in enumerate(names)}, torch.rand(shape[0], generator=draw)
        out = fused_linear_distillation_loss(
            *case.arguments(), case.labels, mixture=mixture, token_weights=weights.double()
        )
        want = twin(wide, mixture, weights)
        torch.testing.assert_close(out.loss, want, rtol=1e-8, atol=1e-9)
        leaves = [x for x in case.leaves.values() if x is not None and x.requires_grad]
        others = [x for x in wide.leaves.values() if x is not None and x.requires_grad]
        got = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        wanted = torch.autograd.grad(want, others, allow_unused=True)
        zeros = [torch.zeros_like(x) for x in others]
        pairs = [[z if g is None else g for g, z in zip(x, zeros, strict=True)] for x in (got, wanted)]
        assert_close(*pairs, 1e-8)


def test_the_mean_over_tokens_and_weights_by_token() -> None:
    case = student_only(JointCase.draw(SHAPE))
    case.labels[[0, 4]] = -100
    by_token = torch.rand(SHAPE[0])
    arguments = (*case.arguments(), case.labels)
    mean = fused_linear_distillation_loss(*arguments, mixture={"forward_kl": by_token, "logps": -1.0})
    weights = torch.full((SHAPE[0],), 1 / 19)
    wide = student_only(case.double())
    found = wide.twin(("forward_kl", "logps"))
    want = ((by_token * found["forward_kl"] - found["logps"]) * weights).sum()
    torch.testing.assert_close(mean.loss.double(), want, rtol=2e-6, atol=1e-6)
    assert_close(grads_of(mean.loss, case), grads_of(want, wide), 3e-6)


def test_a_scaled_loss_and_a_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = student_only(JointCase.draw(SHAPE))
    recomputed: list[Any] = []
    gradients = fused_op.joint_gradients_op
    monkeypatch.setattr(fused_op, "joint_gradients_op", lambda *args: recomputed.append(args) or gradients(*args))
    out = fused_linear_distillation_loss(*case.arguments(), case.labels, mixture=MIXTURES["DCKD"])
    first = grads_of(out.loss * 3.0, case, retain_graph=True)
    assert not recomputed
    second = grads_of(out.loss * 3.0, case)
    assert len(recomputed) == 1
    assert_close(first, [x.double() for x in second], 2e-6)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_wants_no_gradient_gets_none(frozen: str) -> None:
    case, other = (student_only(JointCase.draw(SHAPE)) for _ in range(2))
    leaf = case.leaves[frozen]
    assert leaf is not None
    leaf.requires_grad_(requires_grad=False)
    out, full = (
        fused_linear_distillation_loss(*x.arguments(), mixture={"reverse_kl": 1.0, "jsd": 1.0}) for x in (case, other)
    )
    got = dict(
        zip(
            [k for k, x in case.leaves.items() if x is not None and x.requires_grad],
            grads_of(out.loss, case),
            strict=True,
        )
    )
    want = dict(
        zip(
            [k for k, x in other.leaves.items() if x is not None and x.requires_grad],
            grads_of(full.loss, other),
            strict=True,
        )
    )
    assert frozen not in got
    for name, grad in got.items():
        assert_close([grad], [want[name].double()], 1e-6)


def test_without_gradients_it_is_the_values() -> None:
    case = JointCase.draw(SHAPE)
    with torch.no_grad():
        out = fused_linear_distillation_loss(*case.arguments(), mixture={"jsd": 1.0})
    assert not out.loss.requires_grad
    torch.testing.assert_close(
        out.loss.double(), case.double().twin(("jsd",))["jsd"].mean().detach(), rtol=1e-5, atol=1e-6
    )


def test_opcheck_and_one_graph() -> None:
    case = student_only(JointCase.draw((9, 5, 6, 30)))
    upstream = torch.rand(2, 9)
    settings = ("logps,jsd", 0.5, 0.5, None, 1.0, None, 1.0, 1.0, -100, "torch", True, True, True, False, False, False)
    given = (*case.leaves.values(), case.labels, None, None, None, upstream, *settings)
    # Without the graph that returns all of the op's results: the backward scales the gradients where they lie. What
    # callers trace returns none of them, and is traced below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused_op.distillation_op, given, test_utils=checks)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return fused_linear_distillation_loss(hidden, weight, teacher, teacher_weight, mixture={"jsd": 1.0}).loss

    leaves = [case.leaves[k] for k in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves), leaves[:2]) for f in (compiled, loss))  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mapping": ({"mixture": ("jsd",)}, "mixture must map outputs to weights"),
    "empty": ({"mixture": {}}, "outputs must be names among"),
    "no labels": ({"mixture": {"logps": -1.0}}, "logps needs labels"),
    "weights": ({"mixture": {"jsd": 1.0}, "token_weights": torch.zeros(3)}, r"token_weights must be \(21,\)"),
    "a weight": ({"mixture": {"jsd": torch.zeros(3)}}, r"mixture\['jsd'\] must be \(21,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation_loss(*JointCase.draw(SHAPE).arguments(), **changes)
