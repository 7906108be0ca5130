"""The joint outputs against their float64 twins: values, gradients of both models, borders of their ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.ops import Head, linear_lse
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint
from tvkd_fast.ops.joint.outputs import KINDS, OUTPUTS
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (21, 7, 11, 53)
HEADS: dict[str, dict[str, Any]] = {
    "bare": {"bias": False},
    "bias": {},
    "softcap": {"softcap": 3.0, "teacher_softcap": 5.0},
    "scaled": {"logit_scale": -0.7, "teacher_logit_scale": 1.4},
    "all": {"softcap": 2.0, "logit_scale": 1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.6},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["numba", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    found: str = request.param
    return found


def check(case: JointCase, outputs: tuple[str, ...], tolerance: float, nats: float, **options: Any) -> None:
    """Values within so many nats of the twin's, relative above 1; gradients within the tolerance."""
    got = linear_joint(*case.arguments(), case.labels, outputs=outputs, **options)
    wide = case.double()
    want = wide.twin(outputs, **options)
    for name in outputs:
        assert ((got[name].double() - want[name]).abs() <= nats * want[name].abs().clamp_min(1.0)).all(), name
    assert_close(case.gradients(got), wide.gradients(want), tolerance)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_is_its_twin(name: str, head: str, passes: str) -> None:
    case = JointCase.draw(SHAPE, **HEADS[head])
    check(case, (name,), 3e-6, 2e-6, beta=0.3, alpha=0.7, temperature=1.7)


@pytest.mark.parametrize("head", HEADS)
def test_all_outputs_from_one_walk(head: str, passes: str) -> None:
    case = JointCase.draw(SHAPE, **HEADS[head])
    case.labels[[3, 20]] = -100
    check(case, OUTPUTS, 3e-6, 2e-6)


@pytest.mark.parametrize("name", OUTPUTS)
def test_float64_is_float64(name: str) -> None:
    check(JointCase.draw(SHAPE, dtype=torch.float64, **HEADS["all"]), (name,), 1e-10, 1e-11, beta=0.8, alpha=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    case = JointCase.draw(SHAPE, dtype=dtype)
    outputs = ("logps", "forward_kl", "jsd", "reverse_kl")
    got = linear_joint(*case.arguments(), case.labels, outputs=outputs)
    wide = case.double()
    want = wide.twin(outputs)
    for name in outputs:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), want[name], rtol=2e-6, atol=2e-6)
    grads, wanted = case.gradients(got), wide.gradients(want)
    assert all(x.dtype == dtype for x in grads)
    # What rounding the gradient to its dtype costs, and no more.
    assert_close(grads, wanted, 0.6 * torch.finfo(dtype).eps)


@draws(60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 130)),
    rows=st.integers(1, 40),
    floats=st.integers(1, 3000),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    beta=st.floats(0.05, 0.95),
    names=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_any_tiles(
    shape: tuple[int, int, int, int],
    rows: int,
    floats: int,
    spread: float,
    bias: bool,
    softcap: float | None,
    beta: float,
    names: list[str],
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "BACKWARD_ROWS", rows)
        patch.setattr(walk, "TILE_FLOATS", floats)
        patch.setattr(walk, "workspace_rows", lambda task, megabytes: rows)
        case = JointCase.draw(
            shape, dtype=torch.float64, bias=bias, spread=spread, softcap=softcap, teacher_softcap=softcap, seed=seed
        )
        case.labels[torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.2] = -100
        check(case, tuple(names), 1e-8, 1e-10, beta=beta)


@every_kind
def test_only_what_is_asked_for_has_a_gradient(kind: str) -> None:
    case = JointCase.draw(SHAPE)
    wanted = case.gradients(linear_joint(*case.arguments(), outputs=(kind,)))
    wide = case.double()
    reference = wide.gradients(wide.twin((kind,)))[0]
    recomputed = float((wanted[0] - reference).norm() / reference.norm())
    for left in range(6):
        case = JointCase.draw(SHAPE)
        leaves = [x for x in case.leaves.values() if x is not None]
        for i, x in enumerate(leaves):
            x.requires_grad_(i == left)
        value = linear_joint(*case.arguments(), outputs=(kind,))[kind].double()
        (grad,) = torch.autograd.grad((case.upstream[0] * value).sum(), leaves[left])
        if left == 0:
            # The forward has made it, in another order of sums than the backward's.
            assert_close([grad], [reference], 1e-6 + 2.0 * recomputed)
        else:
            assert_close([grad], [wanted[left].double()], 1e-6)


@every_kind
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-2, 1.0])
def test_no_divergence_is_negative(kind: str, spread: float, passes: str) -> None:
    case = JointCase.draw((64, 16, 16, 2000), bias=False)
    hidden, head, _, _ = case.arguments()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    got = linear_divergence(hidden, head, hidden.detach() + spread * noise, head, kind=kind).detach()
    assert (got >= 0).all()
    if spread == 0.0:
        expected = 1.0 if kind == "alpha" else 0.0
        torch.testing.assert_close(got, torch.full_like(got, expected), rtol=0, atol=4 * torch.finfo(got.dtype).eps)


def test_the_error_in_nats_at_a_divergence_up_to_one(passes: str) -> None:
    case = JointCase.draw((128, 64, 64, 4000), bias=False)
    noise = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    hidden, weight = (0.5 * case.leaves[name].detach() for name in ("hidden", "weight"))  # type: ignore[union-attr]
    case.leaves |= {
        "hidden": hidden,
        "weight": weight,
        "teacher_weight": weight,
        "teacher_hidden": hidden + 0.2 * noise,
    }
    kinds = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
    got, want = linear_joint(*case.arguments(), outputs=kinds), case.double().twin(kinds)
    for kind in kinds:
        assert 0.1 < want[kind].max() < 1.0
        assert (got[kind].double() - want[kind]).abs().max() <= 2e-6


def test_the_borders_of_beta() -> None:
    case = JointCase.draw(SHAPE)

    def of(kind: Any, beta: float = 0.5) -> Tensor:
        return linear_divergence(*case.arguments(), kind=kind, beta=beta)

    forward, reverse = of("forward_kl"), of("reverse_kl")
    assert torch.equal(of("jsd", 0.0), forward)
    assert torch.equal(of("jsd", 1.0), reverse)
    assert torch.equal(of("skew_forward_kl", 0.0), forward)
    assert torch.equal(of("skew_reverse_kl", 1.0), reverse)
    for kind, beta in (("skew_forward_kl", 1.0), ("skew_reverse_kl", 0.0)):
        value = of(kind, beta)
        assert value.abs().max() < 1e-6
        assert torch.autograd.grad(value.sum(), case.leaves["hidden"])[0].abs().max() < 1e-5  # type: ignore[arg-type]


@every_kind
def test_models_that_share_no_token_to_speak_of(kind: str, passes: str) -> None:
    eye = torch.eye(2, 4)
    hidden, teacher = (1000.0 * eye).requires_grad_(), 1000.0 * eye.flip(0)
    weight = torch.eye(4)
    value = linear_divergence(hidden, weight, teacher, weight, kind=kind)
    (grad,) = torch.autograd.grad(value.sum(), hidden)
    assert grad.isfinite().all()
    disjoint = {"forward_kl": 1000.0, "reverse_kl": 1000.0, "tvd": 1.0, "alpha": 0.0}
    torch.testing.assert_close(value.detach(), torch.full((2,), disjoint.get(kind, 0.6931472)))


@every_kind
def test_a_token_that_neither_model_has(kind: str, passes: str) -> None:
    """A bias of −inf on both sides counts as if the row were not there."""
    case = JointCase.draw(SHAPE)
    hidden, head, teacher_hidden, teacher = case.arguments()
    out = torch.tensor([0, 17, 52])
    kept = torch.ones(SHAPE[3], dtype=torch.bool).index_fill(0, out, value=False)

    def without(x: Head) -> Head:
        assert x.bias is not None
        return Head(x.weight, x.bias.detach().index_fill(0, out, -torch.inf))

    def cut(x: Head) -> Head:
        assert x.bias is not None
        return Head(x.weight[kept], x.bias[kept].detach())

    got = linear_divergence(hidden, without(head), teacher_hidden, without(teacher), kind=kind)
    want = linear_divergence(hidden, cut(head), teacher_hidden, cut(teacher), kind=kind)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    by = (case.leaves["hidden"], case.leaves["weight"], case.leaves["teacher_hidden"])
    grads, wanted = (torch.autograd.grad(x.sum(), by) for x in (got, want))  # type: ignore[arg-type]
    assert_close(grads, [x.double() for x in wanted], 3e-6)


@pytest.mark.parametrize("kind", ["jsd", "tvd", "skew_reverse_kl", "forward_kl", "alpha"])
def test_a_token_that_the_teacher_lacks(kind: str, passes: str) -> None:
    case = JointCase.draw(SHAPE, dtype=torch.float32)
    bias = case.leaves["teacher_bias"]
    assert bias is not None
    case.leaves["teacher_bias"] = bias.detach().index_fill(0, torch.tensor([4, 9]), -torch.inf).requires_grad_()
    got, wide = linear_divergence(*case.arguments(), kind=kind), case.double()
    want = wide.twin((kind,))
    torch.testing.assert_close(got.double(), want[kind], rtol=2e-6, atol=2e-6)
    leaves, wide_leaves = ([x.leaves[k] for k in ("hidden", "weight", "bias")] for x in (case, wide))
    grads = torch.autograd.grad(got.sum(), leaves)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(want[kind].sum(), wide_leaves)  # type: ignore[arg-type]
    assert_close(grads, wanted, 3e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tvd"])
def test_an_index_into_a_larger_vocabulary(kind: str) -> None:
    # Of models that part on nearly every token TVD has hardly a gradient, and float32 little of that.
    case = JointCase.draw((9, 5, 6, 40), spread=0.5)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:31]
    for name in ("weight", "bias"):
        x = case.leaves[name]
        assert x is not None
        case.leaves[name] = x.detach()[:31].requires_grad_()
    case.labels = case.labels.remainder(31)
    wide = case.double()
    got = {kind: linear_divergence(*case.arguments(), kind=kind, teacher_index=index)}
    want = {kind: wide.twin((kind,), index=index)[kind]}
    torch.testing.assert_close(got[kind].double(), want[kind], rtol=2e-6, atol=2e-6)
    assert_close(case.gradients(got), wide.gradients(want), 3e-6)


def test_a_known_log_sum_exp_of_the_teacher() -> None:
    case = JointCase.draw(SHAPE)
    _, _, teacher_hidden, teacher = case.arguments()
    _, lse = linear_lse(teacher_hidden, teacher, kappa=1.0 / 1.5)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        plain, given_lse = (
            linear_divergence(*case.arguments(), kind=kind, temperature=1.5, teacher_lse=x) for x in (None, lse)
        )
        torch.testing.assert_close(given_lse, plain, rtol=1e-5, atol=1e-6)


def test_rows_that_are_left_out() -> None:
    case, rows = JointCase.draw(SHAPE), torch.arange(SHAPE[0]) % 3 != 1
    got = linear_divergence(*case.arguments(), kind="jsd", rows=rows)
    want = linear_divergence(*case.arguments(), kind="jsd")
    assert (got[~rows] == 0).all()
    torch.testing.assert_close(got[rows], want[rows])
    grads = case.gradients({"jsd": got})
    assert (grads[0][~rows] == 0).all()
    case.upstream = case.upstream * rows
    assert_close(grads, [x.double() for x in case.gradients({"jsd": want})], 1e-6)


def test_the_student_alone() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    outputs = ("entropy", "logps", "log_sum_p2", "lse")
    got, wide = linear_joint(hidden, head, labels=case.labels, outputs=outputs), case.double()
    want = wide.twin(outputs)
    assert list(got) == list(outputs)
    for name in outputs:
        torch.testing.assert_close(got[name].double(), want[name], rtol=2e-6, atol=2e-6)
    assert_close(case.gradients(got), wide.gradients(want), 3e-6)


def test_it_is_the_same_twice(passes: str) -> None:
    case = JointCase.draw((40, 7, 11, 300))
    first, second = (linear_joint(*case.arguments(), case.labels, outputs=OUTPUTS) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    for x, y in zip(case.gradients(first), case.gradients(second), strict=True):
        assert torch.equal(x, y)
