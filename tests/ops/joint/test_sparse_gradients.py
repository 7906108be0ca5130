"""`grad_mode="sparse"` of the joint outputs: the gradient that it means, where it is the exact one, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.fused.distillation import fused_linear_distillation_loss
from tvkd_fast.ops import Head, HeadStats, reference
from tvkd_fast.ops.joint import backend, sparse_joint_op
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint
from tvkd_fast.ops.joint.outputs import OF_STUDENT_ALONE, OUTPUTS
from tvkd_fast.ops.tiles import exact, native
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (37, 7, 11, 160)
WIDE: dict[str, Any] = {"grad_mode": "sparse", "max_tail": 1.0, "row_cap": 10**6}
"""Whatever the tail, and however many entries: nothing is computed exactly."""
HEADS: dict[str, dict[str, Any]] = {
    "bare": {"bias": False},
    "bias": {},
    "softcap": {"bias": False, "softcap": 3.0, "teacher_softcap": 5.0},
    "all": {"softcap": 2.0, "logit_scale": 1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.6},
}
ONE_WALK = ("forward_kl", "reverse_kl", "logps", "lse", "teacher_lse")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["numba", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    found: str = request.param
    return found


def small_tiles(monkeypatch: pytest.MonkeyPatch, floats: int = 2048, rows: int = 8, workspace: int = 5) -> None:
    monkeypatch.setattr(exact, "WORKSPACE_FLOATS", floats)
    monkeypatch.setattr(exact, "TILE_ROWS", rows)
    monkeypatch.setattr(walk, "workspace_rows", lambda task, megabytes: workspace)


def student_only(case: JointCase) -> JointCase:
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        x = case.leaves[name]
        if x is not None:
            x.requires_grad_(requires_grad=False)
    return case


def draw(shape: tuple[int, int, int, int] = SHAPE, **options: Any) -> JointCase:
    return student_only(JointCase.draw(shape, **options))


def twin(case: JointCase, outputs: tuple[str, ...], labels: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    hidden, head, *_ = case.arguments()
    _, u = case.logits()
    transforms = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    return reference.sparse_joint(hidden, head.weight, u, labels, outputs=outputs, **transforms, **options)


def gradients(case: JointCase, found: dict[str, Tensor]) -> list[Tensor]:
    """Of Σ upstream·outputs by every leaf that requires one, zeros where none comes."""
    leaves = [x for x in _leaves(case) if x.requires_grad]
    loss = sum((c * x.double()).sum() for c, x in zip(case.upstream, found.values(), strict=False))
    if not loss.requires_grad:  # type: ignore[union-attr]
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def _leaves(case: JointCase) -> list[Tensor]:
    return [x for x in case.leaves.values() if x is not None]


def check(
    case: JointCase,
    outputs: tuple[str, ...],
    tolerance: float,
    eps: float,
    labels: Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float = 1.0,
    **options: Any,
) -> None:
    """Values are the exact op's, and gradients the twin's within the tolerance."""
    numbers = {"beta": beta, "alpha": alpha, "temperature": temperature}
    got = linear_joint(*case.arguments(), labels, outputs=outputs, eps=eps, **numbers, **(WIDE | options))
    plain = linear_joint(*case.arguments(), labels, outputs=outputs, **numbers)
    for name in outputs:
        torch.testing.assert_close(got[name], plain[name], rtol=2e-6, atol=2e-6)
    wide = case.double()
    # Where no output asks the teacher, it selects nothing.
    alone = {"teacher_eps": 2.0} if all(name in OF_STUDENT_ALONE for name in outputs) else {}
    want = twin(student_only(wide), outputs, labels, eps=eps, **numbers, **alone)
    assert_close(gradients(case, got), gradients(wide, want), tolerance)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_is_its_twin(monkeypatch: pytest.MonkeyPatch, name: str, head: str, passes: str) -> None:
    small_tiles(monkeypatch)
    case = draw(**HEADS[head])
    check(case, (name,), 5e-6, 2.0**-7, case.labels, beta=0.3, alpha=0.7, temperature=1.7)


@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-9])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labels"])
@pytest.mark.parametrize("outputs", [ONE_WALK, OUTPUTS], ids=["one-walk", "all"])
def test_several_outputs(
    monkeypatch: pytest.MonkeyPatch, outputs: tuple[str, ...], labels: bool, eps: float, passes: str
) -> None:
    small_tiles(monkeypatch)
    case = draw(bias=False)
    case.labels[[3, 20]] = -100
    if not labels:
        outputs = tuple(x for x in outputs if x != "logps")
    check(case, outputs, 5e-6, eps, case.labels if labels else None)


def test_float64_is_float64() -> None:
    check(draw(dtype=torch.float64, **HEADS["all"]), OUTPUTS[1:], 1e-10, 2.0**-6)


@draws(40)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(2, 130)),
    floats=st.integers(16, 4096),
    rows=st.integers(1, 32),
    workspace=st.integers(1, 32),
    log_eps=st.integers(4, 12),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    names=st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_any_tiles(
    shape: tuple[int, int, int, int],
    floats: int,
    rows: int,
    workspace: int,
    log_eps: int,
    bias: bool,
    softcap: float | None,
    names: list[str],
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, floats, rows, workspace)
        case = draw(shape, dtype=torch.float64, bias=bias, softcap=softcap, teacher_softcap=softcap, seed=seed)
        case.labels[torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.2] = -100
        check(case, tuple(names), 1e-8, 2.0**-log_eps, case.labels)


@pytest.mark.parametrize("name", OUTPUTS)
def test_keeping_everything_is_exact(name: str, passes: str) -> None:
    case, stats = draw(**HEADS["all" if name == "jsd" else "bare"]), HeadStats()
    got = linear_joint(*case.arguments(), case.labels, outputs=(name,), eps=0.0, stats=stats, **WIDE)
    want = linear_joint(*case.arguments(), case.labels, outputs=(name,))
    assert_close(gradients(case, got), [x.double() for x in gradients(case, want)], 3e-6)
    assert stats.read()["head_entries"] == SHAPE[3] - 1
    assert stats.read()["head_dense_rows"] == 0
    assert stats.read()["head_tail"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_entries_of_the_student_alone_are_not_enough(kind: str, passes: str) -> None:
    """A teacher that is sure of a token on which the student is not: p ≥ ε misses what the forward KL is made of."""
    case = draw((64, 16, 16, 400), bias=False)
    eps, exact_case = 2.0**-8, case.double()
    want = gradients(exact_case, student_only(exact_case).twin((kind,)))
    errors = []
    for both in (True, False):
        wide = student_only(case.double())
        found = twin(wide, (kind,), eps=eps, teacher_eps=eps if both else 2.0)
        errors.append(float((gradients(wide, found)[0] - want[0]).norm() / want[0].norm()))
    got = gradients(case, linear_joint(*case.arguments(), outputs=(kind,), eps=eps, **WIDE))[0]
    ours = float((got.double() - want[0]).norm() / want[0].norm())
    assert ours == pytest.approx(errors[0], rel=1e-3)
    if kind == "forward_kl":
        assert errors[1] > 4.0 * errors[0]


def test_the_sum_over_the_vocabulary_is_the_exact_gradients(passes: str) -> None:
    case = draw(bias=False)
    for outputs in (("forward_kl", "lse"), ("jsd", "entropy")):
        got, want = (
            gradients(case, linear_joint(*case.arguments(), outputs=outputs, **options))[1].double()
            for options in (WIDE | {"eps": 2.0**-5}, {})
        )
        assert (got.sum(0) - want.sum(0)).abs().max() < 2e-6 * want.abs().sum(0).max()
        assert (got - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("head", HEADS)
def test_rows_over_the_cap_get_the_exact_gradient(head: str, passes: str) -> None:
    case = draw((30, 12, 5, 300), **HEADS[head])
    flat = torch.arange(30) % 3 == 0
    for name in ("hidden", "teacher_hidden"):
        x = case.leaves[name]
        assert x is not None
        case.leaves[name] = torch.where(flat[:, None], 0.01 * x, 2.0 * x).detach().requires_grad_(x.requires_grad)
    case.labels[[2, 6]] = -100
    stats, outputs = HeadStats(), ("forward_kl", "logps", "jsd") if head == "bias" else ("reverse_kl", "logps")
    options = WIDE | {"eps": 2.0**-10, "row_cap": 250, "stats": stats}
    got, want = (linear_joint(*case.arguments(), case.labels, outputs=outputs, **o) for o in (options, {}))
    grads, exact_grads = (gradients(case, x) for x in (got, want))
    kept = case.labels != -100
    p, q = (x.softmax(-1) for x in case.double().logits())
    dense = (((p >= 2.0**-10) | (q >= 2.0**-10)).sum(1) > 251) & kept
    assert flat[dense].any()
    assert stats.read()["head_dense_rows"] == pytest.approx(int(dense.sum()) / int(kept.sum()))
    torch.testing.assert_close(grads[0][dense], exact_grads[0][dense], rtol=1e-5, atol=1e-6)
    wide = student_only(case.double())
    found = twin(wide, outputs, case.labels, eps=2.0**-10, row_cap=250)
    assert_close(grads, gradients(wide, found), 5e-6)


def test_a_row_has_at_most_an_eighth_of_the_vocabulary() -> None:
    case = draw((8, 4, 4, 160), bias=False)
    p, q = (x.softmax(-1) for x in case.double().logits())
    for eps in (2.0**-4, 2.0**-6, 2.0**-8):
        stats = HeadStats()
        linear_divergence(*case.arguments(), grad_mode="sparse", eps=eps, max_tail=1.0, stats=stats)
        dense = ((p >= eps) | (q >= eps)).sum(1) > 160 // 8
        assert stats.read()["head_dense_rows"] == pytest.approx(float(dense.double().mean()))


def test_softmaxes_too_flat_are_computed_exactly(passes: str) -> None:
    case, stats = draw(bias=False, spread=0.3), HeadStats()
    options = {"grad_mode": "sparse", "eps": 2.0**-4, "stats": stats}
    got, want = (linear_joint(*case.arguments(), outputs=("forward_kl",), **o) for o in (options, {}))
    assert_close(gradients(case, got), [x.double() for x in gradients(case, want)], 3e-6)
    assert stats.read()["head_dense_rows"] == 1.0


@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_only_what_is_asked_for_has_a_gradient(wants: tuple[bool, ...]) -> None:
    whole = draw()
    full = gradients(whole, linear_joint(*whole.arguments(), outputs=("forward_kl",), eps=2.0**-6, **WIDE))
    case = draw()
    leaves = _leaves(case)[:3]
    for x, want in zip(leaves, wants, strict=True):
        x.requires_grad_(want)
    found = linear_joint(*case.arguments(), outputs=("forward_kl",), eps=2.0**-6, **WIDE)
    assert found["forward_kl"].requires_grad == any(wants)
    if any(wants):
        got = gradients(case, found)
        assert_close(got, [x.double() for x, want in zip(full, wants, strict=True) if want], 1e-6)


def test_a_token_that_the_teacher_lacks(passes: str) -> None:
    case = draw()
    bias = case.leaves["teacher_bias"]
    assert bias is not None
    case.leaves["teacher_bias"] = bias.detach().index_fill(0, torch.tensor([4, 30]), -torch.inf)
    check(case, ("jsd", "tvd"), 5e-6, 2.0**-7)


def test_a_token_that_neither_model_has(passes: str) -> None:
    """A bias of −inf on both sides counts as if the row were not there: it takes no share of what is left."""
    case, out = draw(), torch.tensor([0, 17, 52])
    there = torch.ones(SHAPE[3], dtype=torch.bool).index_fill(0, out, value=False)
    hidden, head, teacher_hidden, teacher = case.arguments()

    def without(x: Head) -> Head:
        assert x.bias is not None
        return replace(x, bias=x.bias.detach().index_fill(0, out, -torch.inf))

    def cut(x: Head) -> Head:
        assert x.bias is not None
        return Head(x.weight[there], x.bias[there].detach())

    for kind in ("forward_kl", "jsd"):
        options = WIDE | {"kind": kind, "eps": 2.0**-6}
        got = linear_divergence(hidden, without(head), teacher_hidden, without(teacher), **options)
        want = linear_divergence(hidden, cut(head), teacher_hidden, cut(teacher), **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        grads, wanted = (torch.autograd.grad(x.sum(), (hidden, head.weight)) for x in (got, want))
        assert_close(grads, [x.double() for x in wanted], 5e-6)


def test_an_index_into_a_larger_vocabulary(passes: str) -> None:
    case = draw((19, 5, 6, 90), bias=False)
    index = torch.randperm(90, generator=torch.Generator().manual_seed(3))[:71]
    x = case.leaves["weight"]
    assert x is not None
    case.leaves["weight"] = x.detach()[:71].requires_grad_()
    wide = student_only(case.double())
    got = linear_joint(*case.arguments(), outputs=("forward_kl",), teacher_index=index, eps=2.0**-6, **WIDE)
    hidden, head, *_ = wide.arguments()
    want = reference.sparse_joint(hidden, head.weight, wide.logits(index)[1], outputs=("forward_kl",), eps=2.0**-6)
    assert_close(gradients(case, got), gradients(wide, want), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(dtype: torch.dtype, passes: str) -> None:
    case = draw(dtype=dtype, bias=False)
    got = linear_joint(*case.arguments(), case.labels, outputs=("forward_kl", "logps"), eps=2.0**-6, **WIDE)
    wide = student_only(case.double())
    want = twin(wide, ("forward_kl", "logps"), case.labels, eps=2.0**-6)
    grads = gradients(case, got)
    assert all(x.dtype == dtype for x in grads)
    assert_close(grads, gradients(wide, want), 0.6 * torch.finfo(dtype).eps)


def test_models_that_agree_have_no_divergence(passes: str) -> None:
    case = draw(bias=False)
    hidden, head, *_ = case.arguments()
    for kind in ("forward_kl", "reverse_kl"):
        value = linear_divergence(hidden, head, hidden.detach(), head.weight.detach(), kind=kind, **WIDE)
        assert (value == 0).all()


def test_logits_far_apart_and_rising_maxima(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of columns has a larger maximum than those before it, of either model in its turn."""
    small_tiles(monkeypatch, 256)
    case = draw(bias=False)
    rising = torch.linspace(0.0, 60.0, SHAPE[3])
    for name, by in (("weight", rising), ("teacher_weight", rising.roll(40))):
        x = case.leaves[name]
        assert x is not None
        scaled = torch.cat([x.detach()[:, 1:], by[:, None] / 4.0], 1)
        case.leaves[name] = scaled.requires_grad_(x.requires_grad)
    check(case, ("forward_kl", "reverse_kl"), 5e-6, 2.0**-9)


def test_it_is_the_same_twice_and_through_one_graph(passes: str) -> None:
    case = draw((40, 7, 11, 300), bias=False)
    first, second = (linear_joint(*case.arguments(), case.labels, outputs=ONE_WALK, eps=2.0**-6, **WIDE) for _ in "12")
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    loss = sum(x.sum() for x in first.values())
    leaves = [x for x in _leaves(case) if x.requires_grad]
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in "12")  # type: ignore[arg-type]
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_token_and_one(rows: int, passes: str) -> None:
    case = draw((rows, 4, 5, 12))
    got = linear_joint(*case.arguments(), case.labels, outputs=OUTPUTS, **WIDE)
    assert all(x.shape == (rows,) for x in got.values())
    assert all(x.isfinite().all() for x in gradients(case, got))


def test_everything_is_left_out(passes: str) -> None:
    case = draw(bias=False)
    got = linear_joint(*case.arguments(), outputs=("forward_kl",), rows=torch.zeros(SHAPE[0]).bool(), **WIDE)
    assert (got["forward_kl"] == 0).all()
    assert all((x == 0).all() for x in gradients(case, got))


def test_rows_that_are_left_out_do_not_count_on_a_gpu_either(monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """Half of the rows are flat and left out: alone they would make every row exact."""
    case, rows = draw(bias=False, spread=2.0), torch.arange(SHAPE[0]) % 2 == 0
    for name in ("hidden", "teacher_hidden"):
        case.leaves[name].data[~rows] = 0.0  # type: ignore[union-attr]
    found = []
    for _ in ("on a CPU", "as on a GPU"):
        stats = HeadStats()
        options = {"outputs": ("forward_kl",), "grad_mode": "sparse", "eps": 2.0**-7, "rows": rows, "stats": stats}
        value = linear_joint(*case.arguments(), **options)  # type: ignore[arg-type]
        assert stats.sums is not None
        found.append((value["forward_kl"], *gradients(case, value), stats.sums))
        monkeypatch.setattr(backend, "kept_rows", lambda labels, rows, ignore_index: None)
    torch.testing.assert_close(*found)
    assert found[0][-1][1] > 0
    assert found[0][-1][-1] < rows.sum() / 2


def test_auto_takes_the_exact_gradient_where_entries_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(bias=False)
    for limit, dense in ((1e9, 0.0), (0.0, 1.0)):
        monkeypatch.setattr(sparse_joint_op, "break_even", lambda *_, limit=limit: limit)
        stats = HeadStats()
        options = WIDE | {"grad_mode": "auto", "eps": 2.0**-6, "stats": stats}
        linear_divergence(*case.arguments(), **options)
        assert stats.read()["head_dense_rows"] == dense


def test_a_mixture_of_known_weights(passes: str) -> None:
    case, mixture = draw(bias=False), {"logps": -1.0, "forward_kl": 0.3, "reverse_kl": 0.1}
    case.labels[[3, 20]] = -100
    weights = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(5))
    options = WIDE | {"eps": 2.0**-6, "token_weights": weights, "mixture": mixture}
    out = fused_linear_distillation_loss(*case.arguments(), case.labels, **options)
    wide = student_only(case.double())
    found = twin(wide, tuple(mixture), case.labels, eps=2.0**-6)
    want = sum((mixture[name] * weights.double() * x).sum() for name, x in found.items())
    torch.testing.assert_close(out.loss.double(), want, rtol=5e-6, atol=5e-6)
    leaves, wide_leaves = ([x for x in _leaves(y) if x.requires_grad] for y in (case, wide))
    got, wanted = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, wide_leaves)  # type: ignore[arg-type]
    assert_close(got, wanted, 5e-6)
    assert not any(x.requires_grad for x in out.outputs.values())


@pytest.mark.parametrize("names", ["forward_kl,logps", "jsd,entropy"])
def test_opcheck(names: str) -> None:
    softcap = 4.0 if names.startswith("jsd") else None
    case = draw((9, 5, 6, 30), bias=False, softcap=softcap)
    tensors = (*case.leaves.values(), case.labels, None, None, None)
    settings = (names, 0.3, 0.5, softcap, 1.0, None, 1.0, 1.2, -100)
    torch.library.opcheck(sparse_joint_op.sparse_joint_op, (*tensors, *settings, 2.0**-6, 10**6, 1.0, False))
    given = [None if x is None else x.detach() for x in tensors]
    values, *found = sparse_joint_op.sparse_joint_op(*given, *settings, 2.0**-6, 10**6, 1.0, False)
    arguments = (torch.ones_like(values), *given, *found[:-1], *settings, True, True, False)
    torch.library.opcheck(sparse_joint_op.sparse_joint_gradients_op, arguments)


def test_one_graph() -> None:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, teacher, teacher_weight, eps=2.0**-6, **WIDE).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (9, 14):
        leaves = _leaves(draw((n, 5, 6, 30), bias=False))
        got, want = (torch.autograd.grad(f(*leaves), leaves[:2]) for f in (compiled, loss))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"grad_mode": "dense"}, "grad_mode must be one of exact, sparse, auto"),
    "eps": ({"grad_mode": "sparse", "eps": 0.5}, r"eps must lie in \[0, 2\*\*-4\]"),
    "cap": ({"grad_mode": "sparse", "row_cap": 0}, "row_cap must be at least 1"),
    "triton": ({"grad_mode": "auto", "impl": "triton"}, "impl='triton' cannot be had"),
    "tail": ({"grad_mode": "sparse", "max_tail": 1.5}, "max_tail is a probability"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        linear_divergence(*draw().arguments(), **changes)


def test_a_teacher_that_learns_is_refused() -> None:
    case = JointCase.draw(SHAPE)
    with pytest.raises(ValueError, match=r"the teacher requires a gradient.*take grad_mode='exact'"):
        linear_divergence(*case.arguments(), grad_mode="sparse")
    with torch.no_grad():
        linear_divergence(*case.arguments(), grad_mode="sparse")


def test_a_model_with_nan_is_named(passes: str) -> None:
    case = draw(bias=False)
    x = case.leaves["teacher_hidden"]
    assert x is not None
    case.leaves["teacher_hidden"] = x.index_fill(0, torch.tensor(2), torch.nan)
    with pytest.raises(ValueError, match="the teacher's hidden has NaN or inf in row 2"):
        linear_divergence(*case.arguments(), **WIDE)
