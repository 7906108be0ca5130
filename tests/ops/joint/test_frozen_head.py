"""A frozen head: the derivative that the forward makes, and forward KL from two cached numbers of the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.ops import Head, linear_cached_forward_kl, linear_divergence, linear_expected_rows, linear_joint
from tvkd_fast.ops.joint import cached_forward_kl, streamed_joint_op
from tvkd_fast.ops.joint.outputs import OUTPUTS
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (21, 7, 11, 53)
HEADS: dict[str, dict[str, Any]] = {
    "bare": {"bias": False},
    "all": {"softcap": 2.0, "logit_scale": 1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.6},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["numba", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    found: str = request.param
    return found


def frozen(shape: tuple[int, int, int, int] = SHAPE, **options: Any) -> JointCase:
    """A case of which the student's states alone learn."""
    case = JointCase.draw(shape, **options)
    for name, x in case.leaves.items():
        if x is not None and name != "hidden":
            x.requires_grad_(requires_grad=False)
    return case


def by_hidden(case: JointCase, value: Tensor) -> Tensor:
    hidden = case.leaves["hidden"]
    assert hidden is not None
    (grad,) = torch.autograd.grad((case.upstream[0] * value.double()).sum(), hidden)
    return grad


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [x for x in OUTPUTS if x != "teacher_lse"])
def test_a_streamed_derivative_is_the_twins(monkeypatch: pytest.MonkeyPatch, name: str, head: str, passes: str) -> None:
    monkeypatch.setattr(walk, "workspace_rows", lambda task, megabytes: 8)
    case = frozen(**HEADS[head])
    case.labels[[3, 20]] = -100
    wide = case.double()
    got = linear_joint(*case.arguments(), case.labels, outputs=(name,), temperature=1.7, beta=0.3)[name]
    want = wide.twin((name,), temperature=1.7, beta=0.3)[name]
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    assert_close([by_hidden(case, got)], [by_hidden(wide, want)], 3e-6)


def test_it_is_streamed_where_hidden_alone_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    op = streamed_joint_op.streamed_joint_op
    monkeypatch.setattr(streamed_joint_op, "streamed_joint_op", lambda *x: taken.append(True) or op(*x))
    linear_divergence(*frozen().arguments())
    assert taken == [True]
    linear_divergence(*JointCase.draw(SHAPE).arguments())
    linear_joint(*frozen().arguments(), outputs=("forward_kl", "entropy"))
    with torch.no_grad():
        linear_divergence(*frozen().arguments())
    assert taken == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_streamed_derivative_is_rounded_once(dtype: torch.dtype) -> None:
    case = frozen(dtype=dtype)
    wide = case.double()
    got, want = linear_divergence(*case.arguments(), kind="jsd"), wide.twin(("jsd",))["jsd"]
    grad = by_hidden(case, got)
    assert grad.dtype == dtype
    assert_close([grad], [by_hidden(wide, want)], max(0.6 * torch.finfo(dtype).eps, 1e-10))


def cached(case: JointCase, temperature: float = 1.0, **options: Any) -> Tensor:
    hidden, head, teacher_hidden, teacher = case.arguments()
    rows = linear_expected_rows(teacher_hidden, teacher, head, temperature=temperature)
    return linear_cached_forward_kl(hidden, head, *rows, temperature=temperature, **options)


@pytest.mark.parametrize("head", ["bare", "bias", "scaled"])
def test_a_cached_forward_kl_is_the_twins(monkeypatch: pytest.MonkeyPatch, head: str, passes: str) -> None:
    monkeypatch.setattr(walk, "workspace_rows", lambda task, megabytes: 8)
    scales = {"logit_scale": -0.7, "teacher_logit_scale": 1.4, "teacher_softcap": 3.0} if head == "scaled" else {}
    case = frozen(bias=head != "bare", **scales)
    wide = case.double()
    rows = torch.arange(SHAPE[0]) % 3 != 1
    for options in ({}, {"rows": rows}):
        got = cached(case, 1.7, **options)
        want = wide.twin(("forward_kl",), temperature=1.7)["forward_kl"] * (rows if options else 1)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
        assert_close([by_hidden(case, got)], [by_hidden(wide, want)], 3e-6)


def test_the_cached_numbers_are_means_under_the_teacher(passes: str) -> None:
    case = JointCase.draw(SHAPE, teacher_softcap=3.0).double()
    _, head, teacher_hidden, teacher = case.arguments()
    found = linear_expected_rows(teacher_hidden, teacher, head)
    q = case.logits()[1].softmax(-1)
    assert head.bias is not None
    torch.testing.assert_close(found.rows, q @ head.weight)
    torch.testing.assert_close(found.bias, q @ head.bias)
    torch.testing.assert_close(found.entropy, -(q * q.log()).sum(-1))
    assert not found.rows.requires_grad


def test_a_token_that_neither_model_gives_has_no_weight() -> None:
    case = frozen()
    case.leaves["bias"][4] = case.leaves["teacher_bias"][4] = -torch.inf  # type: ignore[index]
    found = linear_expected_rows(*case.arguments()[2:], case.heads()[0])
    assert all(x.isfinite().all() for x in found)
    got, want = cached(case), linear_divergence(*case.arguments())
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert_close([by_hidden(case, got)], [by_hidden(case, want)], 3e-6)
    case.leaves["teacher_bias"][4] = 0.0  # type: ignore[index]
    with pytest.raises(ValueError, match="the student's bias is infinite at a token that the teacher gives"):
        cached(case)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_means_of_a_broken_head_are_refused(value: float) -> None:
    case = frozen(bias=False)
    case.leaves["weight"][7, 2] = value  # type: ignore[index]
    with pytest.raises(ValueError, match="the student's weight has NaN or inf in row 7"):
        cached(case)
    case = frozen()
    case.leaves["bias"][7] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=r"the student's bias (has NaN or inf|is infinite)"):
        cached(case)


@pytest.mark.parametrize("of", ["streamed", "cached"])
def test_an_infinite_upstream_gradient_of_rows_that_are_left_out_is_none(of: str) -> None:
    """√x has one at 0, where the divergence of a row that is left out is."""
    case = frozen()
    rows = torch.arange(SHAPE[0]) % 3 != 1
    found = cached(case, rows=rows) if of == "cached" else linear_divergence(*case.arguments(), rows=rows)
    grad = by_hidden(case, found.sqrt())
    assert grad.isfinite().all()
    assert (grad[~rows] == 0).all()
    assert (grad[rows] != 0).any(1).all()
    if of == "streamed":
        case.labels[~rows] = -100
        grad = by_hidden(case, linear_joint(*case.arguments(), case.labels, outputs=("entropy",))["entropy"].sqrt())
        assert grad.isfinite().all()


def test_a_value_alone_takes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = frozen()
    want = cached(case)

    def refuse(*_: Any) -> None:
        raise AssertionError("a second product")

    monkeypatch.setattr("tvkd_fast.ops.tiles.block_walk.BlockWalk.mean_rows", refuse)
    with torch.no_grad():
        torch.testing.assert_close(cached(case), want.detach())
    case.leaves["hidden"].requires_grad_(requires_grad=False)  # type: ignore[union-attr]
    torch.testing.assert_close(cached(case), want.detach())
    with pytest.raises(AssertionError, match="a second product"):
        cached(frozen())


def test_large_logits_cost_no_digits() -> None:
    """LSE and h·Σqw are of 100 nats each, and their difference is one of nearly none."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(16, 64, generator=draw), torch.randn(300, 64, generator=draw)
    weight[:, 0], hidden[:, 0] = 100.0, 1.0
    teacher = hidden + 1e-2 * torch.randn(16, 64, generator=draw)
    got = linear_cached_forward_kl(hidden, weight, *linear_expected_rows(teacher, weight, weight))
    z, u = (x.double() @ weight.double().T for x in (hidden, teacher))
    want = (u.softmax(-1) * (u.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
    assert (got.double() - want).abs().max() < 1e-4
    assert (got >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_rows_in_16_bits(dtype: torch.dtype) -> None:
    case = frozen(dtype=dtype, bias=False)
    wide = case.double()
    got, want = cached(case), wide.twin(("forward_kl",))["forward_kl"]
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    assert_close([by_hidden(case, got)], [by_hidden(wide, want)], 0.6 * torch.finfo(dtype).eps)
    hidden, head, teacher_hidden, teacher = case.arguments()
    rows = linear_expected_rows(teacher_hidden, teacher, head)
    rounded = linear_cached_forward_kl(hidden, head, rows.rows.to(dtype), rows.entropy)
    torch.testing.assert_close(rounded.double(), want, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_opcheck_and_one_graph() -> None:
    case = frozen((9, 5, 6, 30))
    hidden, head, teacher_hidden, teacher = case.arguments()
    found = linear_expected_rows(teacher_hidden, teacher, head)
    given = (hidden, head.weight, head.bias, found.rows, found.entropy, found.bias, None, 1.3, True)
    torch.library.opcheck(cached_forward_kl.cached_kl_op, given)
    settings = ("jsd", 0.3, 0.5, None, 1.0, None, 1.0, 1.2, -100)
    tensors = (*case.leaves.values(), case.labels, None, None, None)
    torch.library.opcheck(streamed_joint_op.streamed_joint_op, (*tensors, *settings))

    def loss(hidden: Tensor) -> Tensor:
        streamed = linear_divergence(hidden, head, teacher_hidden, teacher, kind="jsd")
        return streamed.sum() + linear_cached_forward_kl(hidden, head, *found).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(hidden), hidden) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_no_token() -> None:
    case = frozen((0, 4, 5, 12))
    assert cached(case).shape == (0,)
    assert by_hidden(case, cached(case)).shape == (0, 4)
    assert by_hidden(case, linear_divergence(*case.arguments())).shape == (0, 4)


N, D, WIDE, V = 6, 4, 5, 12


def given(**changes: Any) -> dict[str, Any]:
    hidden, head, teacher_hidden, teacher = frozen((N, D, WIDE, V), bias=False).arguments()
    found = linear_expected_rows(teacher_hidden, teacher, head)
    inputs = {
        "hidden": hidden,
        "weight": head.weight,
        "expected_rows": found.rows,
        "teacher_entropy": found.entropy,
    }
    return inputs | changes


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "softcap": ({"softcap": 3.0}, "the student has a softcap, with which its logits are not linear.*linear_divergence"),
    "a head that learns": (
        {"weight": torch.zeros(V, D, requires_grad=True)},
        "the head requires a gradient.*freeze it",
    ),
    "rows of another width": ({"expected_rows": torch.zeros(N, D + 1)}, r"expected_rows must be \[6, 4\]"),
    "entropies": ({"teacher_entropy": torch.zeros(N + 1)}, r"teacher_entropy must be \(6,\)"),
    "a bias without its mean": ({"bias": torch.zeros(V)}, "expected_bias and bias go together"),
    "a mean without a bias": ({"expected_bias": torch.zeros(N)}, "expected_bias and bias go together"),
    "temperature": ({"temperature": 0.0}, "temperature must be a positive number"),
    "triton": ({"impl": "triton"}, "impl='triton' cannot be had"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        linear_cached_forward_kl(**given(**changes))


def test_rows_of_another_head() -> None:
    """Rows that no softmax of this head has: the divergence falls below 0."""
    inputs = given()
    hidden = inputs["hidden"].detach()
    with pytest.raises(ValueError, match=r"in row \d: expected_rows and teacher_entropy are not of this head"):
        linear_cached_forward_kl(**inputs | {"expected_rows": 100.0 * hidden})


def test_a_maker_refuses_what_its_numbers_cannot_serve() -> None:
    teacher, weight = (torch.zeros(N, WIDE), torch.zeros(V, WIDE)), torch.zeros(V, D)
    with pytest.raises(ValueError, match="the student has a softcap"):
        linear_expected_rows(*teacher, Head(weight, softcap=2.0))
    with pytest.raises(ValueError, match="the student's vocabulary has 13 tokens"):
        linear_expected_rows(*teacher, torch.zeros(V + 1, D))
    with pytest.raises(ValueError, match="the teacher's hidden has NaN or inf in row 1"):
        linear_expected_rows(teacher[0].index_fill(0, torch.tensor(1), torch.nan), teacher[1], weight)
    with pytest.raises(ValueError, match="teacher_index names row 3 2 times"):
        linear_expected_rows(*teacher, weight, teacher_index=torch.tensor([*range(V - 1), 3]))
