"""The fused loss in Triton kernels against the separate ops in kernels: interpreted, or compiled where a GPU is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast import TVKDOutput, fused_linear_tvkd_loss, linear_logps, linear_soft_values, shaping_returns, tvkd_loss
from tvkd_fast.losses import segment_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENDED = [True, False, True, True]
WITHOUT_TEACHER: dict[str, Any] = {"teacher_hidden": None, "teacher_weight": None, "cu_states": None}
POLICY = ("policy_hidden", "policy_weight", "policy_bias")

Inputs = dict[str, Any]


def packed(kit: SimpleNamespace, dtype: torch.dtype = torch.float32) -> Inputs:
    """Two pairs of 40, 3, 11 and 30 tokens, some ignored; a teacher with tokens of its own."""
    policy, teacher = kit.case(84, 16, 150, dtype, bias=True), kit.case(90, 24, 90, dtype, seed=1)
    return moved(
        policy_hidden=policy.hidden,
        policy_weight=policy.weight,
        policy_bias=policy.bias,
        labels=policy.labels,
        cu_seqlens=torch.tensor([0, 40, 43, 54, 84]),
        ref_logps=torch.tensor([-150.0, -9.0, -40.0, -90.0]),
        teacher_hidden=teacher.hidden,
        teacher_weight=teacher.weight,
        cu_states=torch.tensor([0, 2, 40, 55, 90], dtype=torch.int32),
    )


def padded(kit: SimpleNamespace, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same in rows of 21 tokens; `RUNS` says where the responses are."""
    inputs, teacher = packed(kit, dtype), kit.case(88, 24, 90, dtype, seed=1)
    labels = torch.full((4, 21), -100)
    for row, (start, stop) in enumerate(RUNS):
        labels[row, start:stop] = torch.randint(150, (stop - start,), generator=torch.Generator().manual_seed(row))
    changes = moved(labels=labels, teacher_hidden=teacher.hidden.view(4, 22, 24))
    return inputs | changes | {"policy_hidden": inputs["policy_hidden"].view(4, 21, 16), **dict.fromkeys(BOUNDARIES)}


RUNS = ((0, 21), (5, 6), (0, 7), (12, 21))
BOUNDARIES = ("cu_seqlens", "cu_states")
FORMS: dict[str, Callable[..., Inputs]] = {"packed": packed, "padded": padded}


def moved(**tensors: Tensor) -> Inputs:
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def reference_states(inputs: Inputs) -> Inputs:
    return {
        "ref_logps": None,
        "ref_hidden": inputs["policy_hidden"].flip(-1) * 0.5,
        "ref_weight": inputs["policy_weight"] * 0.9,
        "ref_bias": inputs["policy_bias"].flip(0),
    }


CASES: dict[str, Callable[[Inputs], Inputs]] = {
    "as it comes": lambda _: {},
    "ready psi": lambda _: {**WITHOUT_TEACHER, "psi": torch.tensor([0.3, -2.0, 1.1, 0.5], device=DEVICE)},
    "reference by states": reference_states,
    "DPO": lambda _: {**WITHOUT_TEACHER, "alpha": 0.0, "label_smoothing": 0.1},
    "eos": lambda _: {"terminal": "eos", "gamma": 0.9},
    "some ended, last_content": lambda _: {"ended": torch.tensor(ENDED, device=DEVICE), "gamma": 0.9},
    "some ended, zero": lambda _: {"ended": torch.tensor(ENDED, device=DEVICE), "terminal": "zero", "alpha": -0.5},
    "kappa, logprobs": lambda _: {"kappa": 0.7, "value_from": "logprobs", "value_scale": 1.5},
    "softcap": lambda inputs: reference_states(inputs) | {"softcap": 6.0, "logit_scale": -1.5, "label_smoothing": 0.2},
}


def composed(**inputs: Any) -> TVKDOutput:
    """The separate ops, in kernels, on the rows' runs cut out one by one where there are rows."""
    if inputs["cu_seqlens"] is None:
        starts = torch.tensor([[0, 0], *RUNS])
        lengths = (starts[:, 1] - starts[:, 0]).to(DEVICE)
        inputs["cu_seqlens"], inputs["cu_states"] = lengths.cumsum(0), (lengths + 1).cumsum(0) - 1
        for name, more in (("labels", 0), ("policy_hidden", 0), ("ref_hidden", 0), ("teacher_hidden", 1)):
            if inputs.get(name) is not None:
                inputs[name] = torch.cat([row[a : b + more] for row, (a, b) in zip(inputs[name], RUNS, strict=True)])
    labels, cu_seqlens, psi, ref_logps = (inputs.get(x) for x in ("labels", "cu_seqlens", "psi", "ref_logps"))
    transforms: Inputs = {name: inputs[name] for name in ("softcap", "logit_scale") if name in inputs}
    transforms["impl"] = "triton"
    hidden, weight, bias = (inputs[name] for name in POLICY)
    logps = linear_logps(hidden, weight, labels, bias=bias, **transforms)
    if ref_logps is None:
        of_tokens = linear_logps(
            inputs["ref_hidden"], inputs["ref_weight"], labels, bias=inputs["ref_bias"], **transforms
        )
        ref_logps = segment_sums(of_tokens, cu_seqlens)
    if inputs["teacher_hidden"] is not None:
        scale = {"value_scale": 0.1} | {x: inputs[x] for x in ("kappa", "value_from", "value_scale") if x in inputs}
        values = linear_soft_values(inputs["teacher_hidden"], inputs["teacher_weight"], impl="triton", **scale)
        shaping = {name: inputs[name] for name in ("gamma", "terminal", "ended") if name in inputs}
        psi = shaping_returns(values, inputs["cu_states"], **shaping)
    settings = {name: inputs[name] for name in ("alpha", "label_smoothing") if name in inputs}
    return tvkd_loss(segment_sums(logps, cu_seqlens), ref_logps, psi, **settings)


def in_kernels(**inputs: Any) -> TVKDOutput:
    return fused_linear_tvkd_loss(**inputs, impl="triton")


def numbers_of(loss: Callable[..., TVKDOutput], inputs: Inputs, *, with_loss: bool) -> dict[str, Tensor]:
    """Every field, and the policy's gradients through `losses`, or through both."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in POLICY}
    out = loss(**inputs | leaves)
    total = out.losses @ torch.tensor([0.3, -2.0], device=DEVICE)
    grads = torch.autograd.grad(total + 3 * out.loss if with_loss else total, list(leaves.values()))
    numbers = {field.name: getattr(out, field.name) for field in fields(out)}
    return {**numbers, **{f"gradient by {name}": grad for name, grad in zip(POLICY, grads, strict=True)}}


def agree(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest number of each tensor."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name]
        assert x.shape == y.shape, name
        assert x.dtype == y.dtype, name
        assert (x - y).abs().max() <= tolerance * y.abs().max(), name


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_separate_ops_put_together(kit: SimpleNamespace, form: str, name: str) -> None:
    inputs = FORMS[form](kit)
    inputs |= CASES[name](inputs)
    with_loss = name != "as it comes"
    agree(
        numbers_of(in_kernels, inputs, with_loss=with_loss),
        numbers_of(lambda **inputs: composed(**inputs), inputs, with_loss=with_loss),
    )


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_torch_tiles(kit: SimpleNamespace, form: str) -> None:
    inputs = FORMS[form](kit)
    inputs |= reference_states(inputs) | {"ended": torch.tensor(ENDED, device=DEVICE), "gamma": 0.9, "kappa": 0.7}
    in_tiles = numbers_of(lambda **inputs: fused_linear_tvkd_loss(**inputs, impl="torch"), inputs, with_loss=True)
    agree(numbers_of(in_kernels, inputs, with_loss=True), in_tiles)


@pytest.mark.parametrize("form", FORMS)
def test_float16_states(kit: SimpleNamespace, form: str) -> None:
    inputs = FORMS[form](kit, torch.float16)
    got, expected = (numbers_of(loss, inputs, with_loss=True) for loss in (in_kernels, composed))
    assert got["loss"].dtype == torch.float32
    agree(got, expected, tolerance=2 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("frozen", POLICY)
def test_what_is_frozen_is_not_computed(kit: SimpleNamespace, frozen: str) -> None:
    inputs = packed(kit)
    everything = numbers_of(in_kernels, inputs, with_loss=False)
    leaves = {name: inputs[name].clone().requires_grad_(name != frozen) for name in POLICY}
    out = in_kernels(**inputs | leaves)
    (out.losses @ torch.tensor([0.3, -2.0], device=DEVICE)).backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, everything[f"gradient by {name}"])


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_frozen_head(kit: SimpleNamespace, form: str, dtype: torch.dtype) -> None:
    inputs = FORMS[form](kit, dtype)
    everything = numbers_of(in_kernels, inputs, with_loss=False)
    hidden = inputs["policy_hidden"].clone().requires_grad_()
    out = in_kernels(**inputs | {"policy_hidden": hidden})
    assert out.losses.requires_grad
    (out.losses @ torch.tensor([0.3, -2.0], device=DEVICE)).backward()
    name, tolerance = "gradient by policy_hidden", 4 * torch.finfo(dtype).eps
    agree({name: hidden.grad}, {name: everything[name]}, tolerance=tolerance + 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_without_a_break(kit: SimpleNamespace, form: str) -> None:
    torch._dynamo.reset()
    inputs = FORMS[form](kit)
    compiled = torch.compile(in_kernels, fullgraph=True, backend="aot_eager")
    agree(numbers_of(compiled, inputs, with_loss=True), numbers_of(in_kernels, inputs, with_loss=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="what boundaries hold is looked at on a CPU only")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 40, 43, 54, 83])}, "cu_seqlens must rise from 0 to 84"),
        ({"cu_states": torch.tensor([0, 2, 40, 55, 89])}, "cu_states must rise from 0 to 90"),
        ({"cu_states": torch.tensor([0, 2, 40, 41, 90])}, "response 2 has 1 states"),
    ],
)
def test_boundaries_that_do_not_fit(kit: SimpleNamespace, changes: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_kernels(**packed(kit) | changes)
