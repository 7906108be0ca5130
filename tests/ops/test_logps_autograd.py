"""`linear_logps` as a citizen of autograd: what it computes, skips, keeps and refuses."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.ops import linear_logps

WANTS = [dict(zip(("hidden", "weight", "bias"), wants, strict=True)) for wants in product([False, True], repeat=3)]


def leaves(case: Any, **wants: bool) -> dict[str, Tensor]:
    return {name: getattr(case, name).clone().requires_grad_(want) for name, want in wants.items()}


@pytest.mark.parametrize("wants", WANTS, ids=lambda wants: "+".join(name for name, want in wants.items() if want))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_asked_for_is_computed(kit: SimpleNamespace, dtype: torch.dtype, wants: dict[str, bool]) -> None:
    case = kit.case(24, 10, 70, dtype, bias=True, ignored=0.0, softcap=9.0)
    everything = kit.run(linear_logps, case)
    inputs = leaves(case, **wants)
    with kit.tile_sizes(512, 8), kit.Watch() as watch:
        logps = linear_logps(inputs["hidden"], inputs["weight"], case.labels, bias=inputs["bias"], softcap=9.0)
        # A frozen head's forward makes dlogp/dh too, and its backward makes no product.
        streamed = wants == {"hidden": True, "weight": False, "bias": False}
        assert watch.multiply_adds == (1 + streamed) * 24 * 10 * 70
        assert logps.requires_grad == any(wants.values())
        if logps.requires_grad:
            logps.backward(case.upstream.float())
    recomputed = any(wants.values()) and not streamed
    if dtype == torch.bfloat16 and wants["hidden"] and (wants["weight"] or wants["bias"]):
        assert case.hidden.numel() <= 512, "dH fits its buffer: no walk of its own"
    products = 1 + recomputed + wants["hidden"] + wants["weight"]
    assert watch.multiply_adds == products * 24 * 10 * 70
    for name, leaf in inputs.items():
        if wants[name]:
            torch.testing.assert_close(leaf.grad, getattr(everything, name))
        else:
            assert leaf.grad is None


def test_ignored_rows_cost_nothing(kit: SimpleNamespace) -> None:
    case = kit.case(50, 10, 70, ignored=0.5)
    kept = int((case.labels != -100).sum())
    with kit.Watch() as watch:
        kit.run(linear_logps, case)
    assert 10 < kept < 40
    assert watch.multiply_adds == 4 * kept * 10 * 70


def test_no_graph_where_none_is_wanted(kit: SimpleNamespace) -> None:
    case = kit.case(8, 4, 9)
    hidden = case.hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_logps(hidden, case.weight, case.labels).requires_grad
    with torch.inference_mode():
        logps = linear_logps(hidden, case.weight, case.labels)
    assert torch.equal(logps, linear_logps(hidden, case.weight, case.labels))


def test_a_result_used_twice(kit: SimpleNamespace) -> None:
    case = kit.case(20, 6, 40)
    hidden = case.hidden.requires_grad_()
    logps = linear_logps(hidden, case.weight, case.labels)
    squares = (logps.square() * case.upstream.float()).sum() + logps.sum()
    (got,) = torch.autograd.grad(squares, hidden)
    by_hand = 2 * logps.detach() * case.upstream.float() + 1
    (expected,) = torch.autograd.grad(linear_logps(hidden, case.weight, case.labels), hidden, by_hand)
    torch.testing.assert_close(got, expected)


def test_a_graph_kept_and_walked_again(kit: SimpleNamespace) -> None:
    case = kit.case(20, 6, 40, bias=True, softcap=3.0)
    hidden, weight, bias = leaves(case, hidden=True, weight=True, bias=True).values()
    logps = linear_logps(hidden, weight, case.labels, bias=bias, softcap=3.0)
    first = torch.autograd.grad(logps, (hidden, weight, bias), case.upstream.float(), retain_graph=True)
    second = torch.autograd.grad(logps, (hidden, weight, bias), case.upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_upstream_gradient_of_an_ignored_row_is_nobodys(kit: SimpleNamespace) -> None:
    case = kit.case(20, 6, 40, ignored=0.4)
    hidden = case.hidden.requires_grad_()
    logps = linear_logps(hidden, case.weight, case.labels)
    upstream = torch.where(case.labels == -100, torch.nan, 1.0)
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    assert grad.isfinite().all()
    assert (grad[case.labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_inputs_that_are_not_contiguous(kit: SimpleNamespace, dtype: torch.dtype, which: str, layout: str) -> None:
    case = kit.case(22, 9, 50, dtype)
    changed = {name: relaid(getattr(case, name), layout) for name in ("hidden", "weight") if which in (name, "both")}
    relaid_case = kit.Case(**{**case.__dict__, **changed})
    dense_case = kit.Case(**{**case.__dict__, **{name: x.contiguous() for name, x in changed.items()}})
    assert not any(x.is_contiguous() for x in changed.values())
    with kit.tile_sizes(512, 8):
        got, expected = kit.run(linear_logps, relaid_case), kit.run(linear_logps, dense_case)
        kit.logps_no_worse(relaid_case)
    torch.testing.assert_close(got.logps, expected.logps)
    torch.testing.assert_close(got.hidden, expected.hidden)
    torch.testing.assert_close(got.weight, expected.weight)


def relaid(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logit_scale", [1.0, -0.7])
def test_gradients_by_finite_differences(kit: SimpleNamespace, softcap: float | None, logit_scale: float) -> None:
    case = kit.case(9, 4, 13, torch.float64, bias=True, ignored=0.3)
    inputs = leaves(case, hidden=True, weight=True, bias=True)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logps(hidden, weight, case.labels, bias=bias, softcap=softcap, logit_scale=logit_scale)

    with kit.tile_sizes(32, 4):
        assert torch.autograd.gradcheck(op, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice_the_same_bits(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(120, 33, 500, dtype, bias=True)
    torch.set_num_threads(2)
    first, second = kit.run(linear_logps, case), kit.run(linear_logps, case)
    torch.set_num_threads(1)
    for name in ("logps", "hidden", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_an_explicit_cast(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(31, 11, 60, bias=True)
    kept = leaves(case, hidden=True, weight=True, bias=True)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = linear_logps(kept["hidden"], kept["weight"], case.labels, bias=kept["bias"])
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in kept.items()}
    explicit = linear_logps(cast["hidden"], cast["weight"], case.labels, bias=cast["bias"])
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, explicit)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast.backward(case.upstream.float())
    explicit.backward(case.upstream.float())
    for name, leaf in kept.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, cast[name].grad.float())


def test_autocast_leaves_float64_alone(kit: SimpleNamespace) -> None:
    case = kit.case(8, 4, 9, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logps(case.hidden, case.weight, case.labels), kit.run(linear_logps, case).logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_left_as_they_were(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(20, 6, 40, dtype, bias=True, softcap=5.0, logit_scale=2.0)
    tensors = (case.hidden, case.weight, case.bias, case.labels, case.upstream)
    before, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    kit.run(linear_logps, case)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert [x._version for x in tensors] == versions


def test_nothing_of_the_vocabularys_size_is_kept_for_the_backward(kit: SimpleNamespace) -> None:
    case = kit.case(20, 6, 40, bias=True, ignored=0.3)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    hidden, weight, bias = leaves(case, hidden=True, weight=True, bias=True).values()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear_logps(hidden, weight, case.labels, bias=bias)
    inputs = {x.data_ptr() for x in (hidden, weight, bias, case.labels)}
    assert kept
    assert all(x.data_ptr() in inputs or x.numel() <= 20 for x in kept)


def test_a_second_derivative_is_refused(kit: SimpleNamespace) -> None:
    case = kit.case(8, 4, 9, torch.float64)
    hidden = case.hidden.requires_grad_()
    for reduce in (torch.sum, lambda logps: logps.square().sum()):
        logps = linear_logps(hidden, case.weight, case.labels)
        with pytest.raises(RuntimeError, match="linear_logps can be differentiated once"):
            torch.autograd.grad(reduce(logps), hidden, create_graph=True)


def test_an_input_changed_before_the_backward_is_noticed(kit: SimpleNamespace) -> None:
    case = kit.case(8, 4, 9)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    logps = linear_logps(hidden, weight, case.labels)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_a_frozen_head_may_change_before_the_backward(kit: SimpleNamespace) -> None:
    """Its gradient is made in the forward, of the weight as it was."""
    case = kit.case(8, 4, 9)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone()
    logps = linear_logps(hidden, weight, case.labels)
    weight.mul_(2.0)
    logps.backward(case.upstream.float())
    torch.testing.assert_close(hidden.grad, kit.run(linear_logps, case).hidden, rtol=1e-4, atol=1e-6)
