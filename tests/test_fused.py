"""The fused loss against the separate ops put together: numbers, gradients, refusals, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from tvkd_fast import FusedLinearTVKDLoss, TVKDOutput, fused_linear_tvkd_loss
from tvkd_fast import linear_logps as our_logps
from tvkd_fast import linear_soft_values as our_values
from tvkd_fast.fused import loss as fused_loss
from tvkd_fast.fused import op as fused_op
from tvkd_fast.fused.padded import response_states
from tvkd_fast.losses import segment_sums, shaping_returns, tvkd_loss
from tvkd_fast.ops import Head, HeadGradient, HeadStats, known, reference, soft_values
from tvkd_fast.ops import values as values_ops
from tvkd_fast.ops.tiles import block_walk as tiles

D, V, TEACHER_D, TEACHER_V = 12, 50, 20, 70
ENDED = torch.tensor([True, False, True, True, False, True])
PSI = torch.tensor([0.3, -2.0, 1.1, 0.5, 0.9, -0.4])
WITHOUT_TEACHER = {"teacher_hidden": None, "teacher_weight": None, "cu_states": None}

Inputs = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(dtype: torch.dtype = torch.float32) -> Inputs:
    """Three pairs, with an ignored label inside a response; the teacher's tokens are its own."""
    draw = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 4, 5, 11, 14, 21, 23])
    cu_states = torch.tensor([0, 3, 9, 11, 18, 20, 26], dtype=torch.int32)
    labels = torch.randint(V, (23,), generator=draw)
    labels[[2, 17]] = -100
    return {**models(draw, dtype, (23,), (26,)), "labels": labels, "cu_seqlens": cu_seqlens, "cu_states": cu_states}


def padded(dtype: torch.dtype = torch.float32) -> Inputs:
    """The same in rows of 8: runs at either end, over all of it, and of a single token."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.full((6, 8), -100)
    for row, (start, stop) in enumerate([(0, 4), (3, 8), (0, 8), (5, 6), (7, 8), (2, 7)]):
        labels[row, start:stop] = torch.randint(V, (stop - start,), generator=draw)
    return {**models(draw, dtype, (6, 8), (6, 9)), "labels": labels}


FORMS: dict[str, Callable[..., Inputs]] = {"packed": packed, "padded": padded}


def models(draw: torch.Generator, dtype: torch.dtype, tokens: tuple[int, ...], states: tuple[int, ...]) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return {
        "policy_hidden": normal(*tokens, D),
        "policy_weight": normal(V, D),
        "policy_bias": normal(V),
        "ref_logps": -12 + 6 * normal(6),
        "teacher_hidden": normal(*states, TEACHER_D),
        "teacher_weight": normal(TEACHER_V, TEACHER_D),
    }


def reference_states(inputs: Inputs) -> Inputs:
    noise = torch.randn(inputs["policy_hidden"].shape, generator=torch.Generator().manual_seed(2))
    dtype = inputs["policy_hidden"].dtype
    return {
        "ref_logps": None,
        "ref_hidden": inputs["policy_hidden"] + 0.3 * noise.to(dtype),
        "ref_weight": 0.9 * inputs["policy_weight"],
        "ref_bias": inputs["policy_bias"].flip(0),
    }


CASES: dict[str, Any] = {
    "as it comes": {},
    "no bias": {"policy_bias": None},
    "ready psi": {**WITHOUT_TEACHER, "psi": PSI},
    "reference by states": reference_states,
    "reference by states, capped": lambda inputs: reference_states(inputs) | {"softcap": 4.0, "logit_scale": 0.7},
    "reference by states, capped in its own way": lambda inputs: (
        reference_states(inputs) | {"softcap": 4.0, "ref_softcap": None, "ref_logit_scale": 0.5}
    ),
    "DPO": {**WITHOUT_TEACHER, "alpha": 0.0, "label_smoothing": 0.1},
    "DPO in spite of a teacher": {"alpha": 0.0, "ended": ENDED},
    "all ended, eos": {"terminal": "eos", "gamma": 0.9},
    "all ended, zero": {"terminal": "zero", "gamma": 0.9},
    "some ended, last_content": {"ended": ENDED, "gamma": 0.9},
    "some ended, eos": {"ended": ENDED, "terminal": "eos"},
    "some ended, zero": {"ended": ENDED, "terminal": "zero", "alpha": -0.5},
    "kappa, logprobs": {"kappa": 0.7, "value_from": "logprobs", "value_scale": 1.5},
    "kappa, logits": {"kappa": 2.0, "teacher_softcap": 5.0, "teacher_logit_scale": 0.5},
    "softcap": {"softcap": 3.0, "logit_scale": -1.5, "beta": 0.5, "label_smoothing": 0.2},
}


def case_of(form: str, name: str, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs, changes = FORMS[form](dtype), CASES[name]
    changes = changes(inputs) if callable(changes) else changes
    if form == "padded":
        changes = {key: value for key, value in changes.items() if key != "cu_states"}
    return inputs | changes


every_case = pytest.mark.parametrize("name", CASES)
every_form = pytest.mark.parametrize("form", FORMS)


def unpadded(inputs: Inputs) -> Inputs:
    """The rows' runs cut out one by one."""
    labels = inputs["labels"]
    runs = [(row.nonzero()[0].item(), row.nonzero()[-1].item() + 1) for row in labels != -100]

    def cut(x: Tensor, more: int = 0) -> Tensor:
        return torch.cat([row[a : b + more] for row, (a, b) in zip(x, runs, strict=True)])

    lengths = torch.tensor([0] + [b - a for a, b in runs])
    changes: Inputs = {"labels": cut(labels), "cu_seqlens": lengths.cumsum(0)}
    for name in ("policy_hidden", "ref_hidden"):
        if inputs.get(name) is not None:
            changes[name] = cut(inputs[name])
    if inputs.get("teacher_hidden") is not None:
        changes["teacher_hidden"] = cut(inputs["teacher_hidden"], 1)
        changes["cu_states"] = lengths.cumsum(0) + torch.arange(len(lengths))
    return inputs | changes


def composed(*, linear_logps: Any = our_logps, linear_soft_values: Any = our_values, **inputs: Any) -> TVKDOutput:
    """Compute what a user writes with the separate ops."""
    if inputs.get("cu_seqlens") is None:
        inputs = unpadded(inputs)
    labels, cu_seqlens, psi = inputs["labels"], inputs["cu_seqlens"], inputs.get("psi")
    softcap, logit_scale, beta = inputs.get("softcap"), inputs.get("logit_scale", 1.0), inputs.get("beta", 0.1)
    logps = linear_logps(
        inputs["policy_hidden"],
        inputs["policy_weight"],
        labels,
        bias=inputs["policy_bias"],
        softcap=softcap,
        logit_scale=logit_scale,
    )
    ref_logps = inputs["ref_logps"]
    if ref_logps is None:
        ref_token_logps = linear_logps(
            inputs["ref_hidden"],
            inputs["ref_weight"],
            labels,
            bias=inputs["ref_bias"],
            softcap=inputs.get("ref_softcap", softcap),
            logit_scale=inputs.get("ref_logit_scale", logit_scale),
        )
        ref_logps = segment_sums(ref_token_logps, cu_seqlens)
    if inputs["teacher_hidden"] is not None:
        values = linear_soft_values(
            inputs["teacher_hidden"],
            inputs["teacher_weight"],
            softcap=inputs.get("teacher_softcap"),
            logit_scale=inputs.get("teacher_logit_scale", 1.0),
            kappa=inputs.get("kappa", 1.0),
            value_scale=inputs.get("value_scale", beta),
            value_from=inputs.get("value_from", "logits"),
        )
        shaping = {name: inputs[name] for name in ("gamma", "terminal", "ended") if name in inputs}
        psi = shaping_returns(values, inputs["cu_states"], **shaping)
    settings = {name: inputs[name] for name in ("beta", "alpha", "label_smoothing") if name in inputs}
    return tvkd_loss(segment_sums(logps, cu_seqlens), ref_logps, psi, **settings)


REDUCTIONS: dict[str, Callable[[TVKDOutput], Tensor]] = {
    "loss": lambda out: 3 * out.loss,
    "losses": lambda out: out.losses @ torch.tensor([0.3, -2.0, 1.0], dtype=out.losses.dtype),
    "both": lambda out: out.loss + out.losses @ torch.tensor([1.0, 0.0, -3.0], dtype=out.losses.dtype),
}


def with_gradients(loss: Callable[..., TVKDOutput], inputs: Inputs) -> tuple[TVKDOutput, dict[str, Tensor]]:
    """The result, and the policy's gradients of every reduction, by name."""
    names = [name for name in ("policy_hidden", "policy_weight", "policy_bias") if inputs[name] is not None]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    grads = {}
    for reduction, reduce in REDUCTIONS.items():
        out = loss(**inputs | leaves)
        found = torch.autograd.grad(reduce(out), list(leaves.values()))
        grads.update({f"{name} of {reduction}": grad for name, grad in zip(names, found, strict=True)})
    return out, grads


def agree(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Every field and every gradient, relative to the largest number of each."""
    (out, grads), (expected_out, expected_grads) = got, expected
    numbers = {field.name: getattr(out, field.name) for field in fields(out)}
    exact = {field.name: getattr(expected_out, field.name) for field in fields(out)}
    assert grads.keys() == expected_grads.keys()
    for name, x in {**numbers, **grads}.items():
        y = {**exact, **expected_grads}[name]
        assert x.shape == y.shape, name
        assert x.dtype == y.dtype, name
        assert (x - y).abs().max() <= tolerance * y.abs().max(), name


@every_case
@every_form
def test_it_is_the_separate_ops_put_together(form: str, name: str) -> None:
    inputs = case_of(form, name)
    got = with_gradients(fused_linear_tvkd_loss, inputs)
    agree(got, with_gradients(composed, inputs))
    assert {x.name for x in fields(got[0]) if getattr(got[0], x.name).requires_grad} == {"loss", "losses"}
    assert (got[0].shaping_margins == 0).all() == ("DPO" in name)


@every_case
@every_form
def test_float64_is_the_float64_twins(form: str, name: str) -> None:
    inputs = case_of(form, name, torch.float64)
    twins = {"linear_logps": reference.linear_logps, "linear_soft_values": reference.linear_soft_values}
    expected = with_gradients(lambda **inputs: composed(**inputs, **twins), inputs)
    agree(with_gradients(fused_linear_tvkd_loss, inputs), expected, tolerance=1e-10)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_states(form: str, dtype: torch.dtype) -> None:
    inputs = case_of(form, "reference by states", dtype)
    out, grads = with_gradients(fused_linear_tvkd_loss, inputs)
    expected, expected_grads = with_gradients(composed, inputs)
    assert out.loss.dtype == torch.float32
    agree((out, {}), (expected, {}))
    agree((out, grads), (out, expected_grads), tolerance=2 * torch.finfo(dtype).eps)


@every_form
def test_states_outside_the_runs_do_not_count(form: str) -> None:
    inputs = case_of(form, "reference by states")
    changed = dict(inputs)
    for name in ("policy_hidden", "ref_hidden"):
        changed[name] = torch.where((inputs["labels"] == -100)[..., None], 1e3, inputs[name])
    if form == "padded":
        states = response_states(inputs["labels"], -100)
        assert states.sum() == (inputs["labels"] != -100).sum() + 6
        changed["teacher_hidden"] = inputs["teacher_hidden"].masked_fill(~states[..., None], torch.nan)
    got, expected = (with_gradients(fused_linear_tvkd_loss, x) for x in (changed, inputs))
    agree(got, expected, tolerance=0.0)


@every_form
@pytest.mark.parametrize("trained", ["policy_hidden", "policy_weight", "policy_bias"])
def test_what_is_frozen_costs_nothing(monkeypatch: pytest.MonkeyPatch, form: str, trained: str) -> None:
    asked = []

    def watched(*args: Any) -> Any:
        asked.append(args[-3:])
        return gradients(*args)

    gradients = known.gradients_op
    for module in (known, fused_op):
        monkeypatch.setattr(module, "gradients_op", watched)
    inputs = case_of(form, "as it comes")
    _, everything = with_gradients(fused_linear_tvkd_loss, inputs)
    # The gradient of the mean loss was made in the forward.
    assert asked == [(True, True, True)] * (len(REDUCTIONS) - 1)
    leaf = inputs[trained].requires_grad_()
    (grad,) = torch.autograd.grad(REDUCTIONS["losses"](fused_linear_tvkd_loss(**inputs)), leaf)
    if trained == "policy_hidden":
        # A frozen head's forward makes the gradient: there is nothing left to ask.
        assert len(asked) == len(REDUCTIONS) - 1
        torch.testing.assert_close(grad, everything[f"{trained} of losses"], rtol=1e-4, atol=1e-6)
    else:
        assert asked[-1] == tuple(name == trained for name in ("policy_hidden", "policy_weight", "policy_bias"))
        assert torch.equal(grad, everything[f"{trained} of losses"])
    (grad,) = torch.autograd.grad(REDUCTIONS["loss"](fused_linear_tvkd_loss(**inputs)), leaf)
    torch.testing.assert_close(grad, everything[f"{trained} of loss"], rtol=1e-5, atol=1e-6)


def test_no_graph_where_none_is_wanted() -> None:
    inputs = packed()
    assert not fused_linear_tvkd_loss(**inputs).loss.requires_grad
    inputs["policy_hidden"].requires_grad_()
    with torch.no_grad():
        assert not fused_linear_tvkd_loss(**inputs).losses.requires_grad


def test_no_gradient_goes_to_teacher_and_reference() -> None:
    for inputs in (case_of("packed", "reference by states"), case_of("packed", "ready psi")):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if is_float(x)}
        fused_linear_tvkd_loss(**inputs | leaves).loss.backward()
        assert {name for name, x in leaves.items() if x.grad is not None} == {
            "policy_hidden",
            "policy_weight",
            "policy_bias",
        }


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@every_form
@pytest.mark.parametrize("streamed", [False, True], ids=["trained-head", "frozen-head"])
def test_nothing_waits_for_a_device(form: str, streamed: bool) -> None:
    """Tensors without numbers raise where one is looked at, as a GPU would wait there."""
    inputs = case_of(form, "some ended, last_content") | {"impl": "torch"}
    bare = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    states = bare["teacher_hidden"].flatten(0, -2)
    rows = response_states(bare["labels"], -100).flatten() if form == "padded" else None
    sums = values_ops._lse(states, bare["teacher_weight"], None, None, 1.0, 0.7, "torch", rows)
    out = fused_op._fused(
        bare["policy_hidden"].flatten(0, -2),
        bare["policy_weight"],
        bare["policy_bias"],
        bare["labels"],
        bare.get("cu_seqlens"),
        *(None, 1.0, -100, "torch", int(not streamed), streamed),
        None,
        bare["ref_logps"],
        soft_values(*sums, kappa=0.7),
        bare.get("cu_states"),
        bare["ended"],
        None,
        *(0.1, 1.0, 0.9, "last_content", 0.0),
    )
    assert [x.device.type for x in out] == ["meta"] * 11
    losses = out[1]
    assert (
        fused_op.upstream_by_token(losses.sum(), losses, bare["labels"], bare.get("cu_seqlens")).shape == out[7].shape
    )


def test_autocast_is_an_explicit_cast() -> None:
    inputs = case_of("packed", "reference by states")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = fused_linear_tvkd_loss(**inputs)
    heads = {name: x.bfloat16() for name, x in inputs.items() if name.endswith(("hidden", "weight", "bias"))}
    assert torch.equal(under_autocast.losses, fused_linear_tvkd_loss(**inputs | heads).losses)


def test_a_graph_kept_and_walked_again() -> None:
    inputs = packed()
    hidden = inputs["policy_hidden"].requires_grad_()
    out = fused_linear_tvkd_loss(**inputs)
    # The first takes the gradients that the forward made; those after it compute them anew.
    first, second, third = (torch.autograd.grad(out.loss, hidden, retain_graph=True)[0] for _ in range(3))
    (by_hand,) = torch.autograd.grad(out.losses.mean(), hidden)
    assert torch.equal(second, third)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, by_hand)


def test_a_second_derivative_is_refused() -> None:
    inputs = packed()
    hidden = inputs["policy_hidden"].requires_grad_()
    for reduce in REDUCTIONS.values():
        with pytest.raises(RuntimeError, match="fused_linear_tvkd_loss can be differentiated once"):
            torch.autograd.grad(reduce(fused_linear_tvkd_loss(**inputs)), hidden, create_graph=True)


@every_form
def test_the_module_is_the_function(form: str) -> None:
    inputs = case_of(form, "reference by states") | {"ended": ENDED}
    settings: Inputs = {
        **{"softcap": 9.0, "logit_scale": 0.5, "teacher_softcap": 8.0, "teacher_logit_scale": 2.0, "ref_softcap": None},
        **{"ref_logit_scale": 0.7, "beta": 0.2, "alpha": -0.5, "gamma": 0.9, "terminal": "eos", "kappa": 0.7},
        **{"value_scale": 2.0, "value_from": "logprobs", "label_smoothing": 0.1, "ignore_index": -1, "impl": "torch"},
        **{"gradient": HeadGradient(grad_mode="sparse", eps=2.0**-6), "stats": HeadStats()},
    }
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, -1)
    module = FusedLinearTVKDLoss(**settings)
    assert set(module.settings) == set(settings)
    assert torch.equal(module(**inputs).losses, fused_linear_tvkd_loss(**inputs, **settings).losses)
    assert "beta=0.2" in repr(module)
    assert "terminal='eos'" in repr(module)
    assert not list(module.parameters())


@every_form
@every_case
def test_a_sparse_gradient_that_keeps_everything_is_the_exact_one(form: str, name: str) -> None:
    inputs, stats = case_of(form, name, torch.float64), HeadStats()
    gradient = HeadGradient(grad_mode="sparse", eps=0.0, row_cap=V)
    leaves = [inputs[key] for key in ("policy_hidden", "policy_weight", "policy_bias") if inputs[key] is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    exact = fused_linear_tvkd_loss(**inputs)
    sparse = fused_linear_tvkd_loss(**inputs, gradient=gradient, stats=stats)
    for field in fields(TVKDOutput):
        torch.testing.assert_close(getattr(sparse, field.name), getattr(exact, field.name))
    torch.testing.assert_close(torch.autograd.grad(sparse.loss, leaves), torch.autograd.grad(exact.loss, leaves))
    assert stats.read()["head_entries"] == V - 1


@every_form
def test_a_sparse_loss_in_one_graph(form: str) -> None:
    torch._dynamo.reset()
    inputs = case_of(form, "as it comes")
    hidden = inputs["policy_hidden"].requires_grad_()
    gradient = HeadGradient(grad_mode="sparse", eps=2.0**-6, max_tail=1.0)
    compiled = torch.compile(fused_linear_tvkd_loss, fullgraph=True, backend="aot_eager")
    got, want = (f(**inputs, gradient=gradient).loss for f in (compiled, fused_linear_tvkd_loss))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden) for x in (got, want)))


def test_the_modules_defaults_are_the_functions() -> None:
    defaults = fused_linear_tvkd_loss.__kwdefaults__
    assert FusedLinearTVKDLoss().settings.items() <= defaults.items()
    with pytest.raises(ValueError, match="beta must be a positive number"):
        FusedLinearTVKDLoss(beta=0.0)


@pytest.fixture
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_nothing_compiled_before")
@pytest.mark.parametrize(
    ("form", "name"),
    [("packed", "kappa, logprobs"), ("padded", "reference by states"), ("packed", "ready psi"), ("padded", "DPO")],
)
def test_compiled_without_a_break(form: str, name: str) -> None:
    inputs = case_of(form, name)
    compiled = torch.compile(fused_linear_tvkd_loss, fullgraph=True, backend="aot_eager")
    agree(with_gradients(compiled, inputs), with_gradients(fused_linear_tvkd_loss, inputs))


@pytest.mark.usefixtures("_nothing_compiled_before")
def test_compiled_with_settings_that_change() -> None:
    inputs = packed()
    compiled = torch.compile(fused_linear_tvkd_loss, fullgraph=True, backend="aot_eager")
    for alpha, beta, gamma in ((1.0, 0.1, 1.0), (0.5, 0.2, 0.9), (0.25, 0.3, 0.8), (0.0, 0.4, 0.7)):
        settings = {"alpha": alpha, "beta": beta, "gamma": gamma}
        agree((compiled(**inputs, **settings), {}), (fused_linear_tvkd_loss(**inputs, **settings), {}))
    with pytest.raises(ValueError, match="beta must be a positive number"):
        compiled(**inputs, beta=-0.1)


@pytest.mark.usefixtures("_nothing_compiled_before")
def test_compiled_with_shapes_that_change() -> None:
    graphs = []

    def counted(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fused_linear_tvkd_loss, fullgraph=True, backend=counted)
    inputs = padded()
    for stop in (4, 5, 6, 7, 8):
        cut = {name: inputs[name][:, :stop].contiguous() for name in ("policy_hidden", "labels")}
        cut |= {"teacher_hidden": inputs["teacher_hidden"][:, : stop + 1].contiguous()}
        cut["labels"][:, :2] = 3
        cut["labels"][:, 2:] = -100
        agree((compiled(**inputs | cut), {}), (fused_linear_tvkd_loss(**inputs | cut), {}))
    assert len(graphs) == 2


@every_form
@pytest.mark.parametrize("frozen", [False, True], ids=["trained-head", "frozen-head"])
def test_the_ops_are_registered_as_torch_wants_them(monkeypatch: pytest.MonkeyPatch, form: str, frozen: bool) -> None:
    calls = {}

    def keep(original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[original._opoverload] = args
            return original(*args)

        return call

    for module, name in ((values_ops, "_lse_op"), (fused_loss, "fused_op"), (fused_loss, "known_op")):
        monkeypatch.setattr(module, name, keep(getattr(module, name)))
    inputs = case_of(form, "reference by states") | {"kappa": 0.7, "ended": ENDED}
    for name in ("policy_hidden", "policy_weight", "policy_bias"):
        inputs[name].requires_grad_(name == "policy_hidden" or not frozen)
    fused_linear_tvkd_loss(**inputs)
    assert len(calls) == 2
    for op, args in calls.items():
        args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(op, args)


def test_holes_are_named() -> None:
    inputs = padded()
    inputs["labels"][[0, 5], [2, 4]] = -100
    with pytest.raises(ValueError, match=r"one contiguous run .* rows with holes: 0, 5\. Pack such responses"):
        fused_linear_tvkd_loss(**inputs)
    with pytest.raises(ValueError, match="rows with holes: 0, 5"):
        fused_linear_tvkd_loss(**inputs | WITHOUT_TEACHER, psi=PSI)


def test_a_row_without_tokens() -> None:
    """Has no states either, but a log-probability of 0."""
    inputs = padded()
    inputs["labels"][3] = -100
    with pytest.raises(ValueError, match="response 3 has 0 states"):
        fused_linear_tvkd_loss(**inputs)
    out = fused_linear_tvkd_loss(**inputs | WITHOUT_TEACHER, psi=PSI)
    assert out.rejected_rewards[0] == pytest.approx(-0.1 * inputs["ref_logps"][3].item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_logps": None}, "give one reference: ref_logps, .* or ref_hidden with ref_weight"),
        ({"ref_hidden": torch.zeros(23, D)}, "give one reference"),
        ({"ref_logps": None, "ref_hidden": torch.zeros(23, D)}, "ref_hidden and ref_weight go together"),
        ({"ref_weight": torch.zeros(V, D)}, "ref_hidden and ref_weight go together"),
        ({"ref_logps": torch.zeros(23)}, r"ref_logps must be \(6,\) for 6 responses, got \(23,\) \(sum .*segment_sums"),
        ({"teacher_weight": None}, "teacher_hidden and teacher_weight go together"),
        ({"psi": PSI}, "teacher_hidden, from which Ψ is computed, or a ready psi, not both"),
        (
            WITHOUT_TEACHER,
            "nothing says by what: give teacher_hidden and .*, or psi, .*alpha=0 is plain DPO",
        ),
        ({**WITHOUT_TEACHER, "psi": PSI, "ended": ENDED}, "cu_states and ended go with teacher_hidden: a ready psi"),
        ({**WITHOUT_TEACHER, "psi": PSI[:3]}, r"psi must be \(6,\)"),
        ({"ended": ENDED.long()}, "ended must be bool"),
        ({"ended": ENDED[1:]}, r"ended must be \(6,\)"),
        ({"cu_states": None}, "packed teacher_hidden needs cu_states"),
        ({"cu_states": torch.tensor([0, 26])}, r"cu_states must be \(7,\) for 6 responses, got \(2,\)"),
        ({"cu_states": torch.tensor([0, 3, 9, 11, 18, 20, 25])}, "cu_states must rise from 0 to 26"),
        ({"cu_states": torch.tensor([0, 3, 9, 10, 18, 20, 26])}, "response 2 has 1 states"),
        ({"cu_seqlens": torch.tensor([0, 4, 5, 11, 14, 21, 22])}, "cu_seqlens must rise from 0 to 23"),
        ({"cu_seqlens": torch.tensor([0, 4, 5, 23])}, "responses come in pairs, chosen first.* got 3"),
        ({"cu_seqlens": None}, r"without cu_seqlens policy_hidden must be \[2P, T, D\] and labels \[2P, T\]"),
        ({"policy_hidden": torch.zeros(23, 1, D)}, r"with cu_seqlens all states are packed"),
        ({"policy_weight": torch.zeros(V, D + 1)}, "the policy's hidden has size 12 and weight 13"),
        ({"teacher_weight": torch.zeros(V, D)}, "the teacher's hidden has size 20 and weight 12"),
        ({"teacher_hidden": torch.full((26, TEACHER_D), torch.nan)}, "the teacher's hidden has NaN or inf in rows 0"),
        (
            {"ref_logps": None, "ref_hidden": torch.zeros(23, D), "ref_weight": torch.zeros(9, D)},
            "the reference's labels",
        ),
        ({"labels": torch.zeros(22, dtype=torch.int64)}, r"the policy's labels must be \(23,\)"),
        ({"labels": torch.full((23,), V)}, "labels out of range"),
        ({"ref_logps": torch.zeros(6, device="meta")}, "policy_hidden is on cpu and ref_logps on meta: move one"),
        ({"teacher_hidden": torch.zeros(26, TEACHER_D, device="meta")}, "policy_hidden is on cpu and teacher_hidden"),
        ({"terminal": "end"}, "terminal must be one of last_content, eos, zero, got 'end'"),
        ({"kappa": 0.0}, "kappa must be a positive number"),
        ({"value_from": "entropy"}, "value_from must be"),
        ({"value_scale": float("inf")}, "value_scale must be finite"),
        ({"gamma": 1.5}, "gamma must be in"),
        ({"beta": 0.0}, "beta must be a positive number"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_refusals_of_packed_inputs(changes: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_tvkd_loss(**packed() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher_hidden": torch.zeros(6, 8, TEACHER_D)},
            r"teacher_hidden must be \[6, 9, 'D'\], one state",
        ),
        ({"cu_states": torch.arange(7)}, "cu_states goes with cu_seqlens"),
        ({"labels": torch.zeros(48, dtype=torch.int64)}, r"labels \[2P, T\], got \(6, 8, 12\) and \(48,\)"),
    ],
)
def test_refusals_of_padded_inputs(changes: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_tvkd_loss(**padded() | changes)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("whose", ["policy", "teacher", "ref"])
def test_a_sharded_head_is_refused(whose: str) -> None:
    inputs = case_of("packed", "reference by states")
    mesh = init_device_mesh("cpu", (1,))
    inputs[f"{whose}_weight"] = distribute_tensor(inputs[f"{whose}_weight"], mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"weight is a DTensor: .*Call FusedLMHead"):
        fused_linear_tvkd_loss(**inputs)


@every_form
@every_case
def test_heads_stand_for_their_parts(form: str, name: str) -> None:
    inputs = case_of(form, name)
    whole = dict(inputs)
    names = {"policy": "", "teacher": "teacher_", "ref": "ref_"}
    for model, prefix in names.items():
        parts = {
            "bias": whole.pop(f"{model}_bias", None),
            "softcap": whole.pop(f"{prefix}softcap", inputs.get("softcap") if model == "ref" else None),
            "logit_scale": whole.pop(f"{prefix}logit_scale", inputs.get("logit_scale", 1.0) if model == "ref" else 1.0),
        }
        if whole.get(f"{model}_weight") is not None:
            whole[f"{model}_weight"] = Head(whole[f"{model}_weight"], **parts)
    ours, theirs = (vars(fused_linear_tvkd_loss(**given)) for given in (whole, inputs))
    assert all(map(torch.equal, ours.values(), theirs.values()))


@every_form
@every_case
def test_a_gradient_made_in_the_forward_is_the_one_recomputed(form: str, name: str) -> None:
    """The second backward through a graph finds the first one's gradients taken, and computes them anew."""
    inputs = case_of(form, name, torch.float64)
    names = [name for name in ("policy_hidden", "policy_weight", "policy_bias") if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    loss = fused_linear_tvkd_loss(**inputs).loss
    first, again = (torch.autograd.grad(3 * loss, leaves, retain_graph=True) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-14)


@every_form
@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, form: str, rows: int) -> None:
    """Pairs by themselves, some together, and pairs whose logits do not fit, most of which are computed twice."""
    inputs = case_of(form, "some ended, last_content", torch.float64)
    whole = with_gradients(fused_linear_tvkd_loss, inputs)
    monkeypatch.setattr(tiles, "rows_of_workspace", lambda *_: rows)
    agree(with_gradients(fused_linear_tvkd_loss, inputs), whole, tolerance=1e-11)
