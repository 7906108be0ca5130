"""The kernels of the head, forward and backward, against the float64 twin: interpreted, or compiled where a GPU is."""

from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels.configs import TileConfig
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops import linear_entropy, linear_logps, linear_lse, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bfloat16's bit patterns.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"softcap": 30.0, "logit_scale": -2.0},
)
# Rows and columns of a tile in the interpreter; multiples of them are edges of larger tiles too.
ROWS, COLUMNS = (128, 256) if GPU else (32, 64)


def logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **transforms: Any) -> Tensor:
    moved = (hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE))
    bias = None if bias is None else bias.to(DEVICE)
    return linear_logps(*moved, bias=bias, impl="triton", **transforms).to(hidden.device)


def right(kit: SimpleNamespace, case: Any, unit: float | None = None) -> Any:
    """Values no worse than torch's on upcast inputs; gradients than torch's whose dlogits are rounded once to 16 bits.

    A product on 16-bit tensor cores takes its dlogits in 16 bits: the rounding is in the method, not in the kernel.
    """
    ours, frozen = kit.run(logps, case), kit.run(logps, case, frozen=True)
    twin = kit.run(reference.linear_logps, case, upcast_to=torch.float64)
    plain = kit.run(partial(logps_of_rounded_dlogits, case=case), case, upcast_to=torch.float32)
    assert ours.logps.dtype == torch.float32
    kit.no_worse(ours.logps, twin.logps, plain.logps, unit=1.0)
    kit.no_worse(frozen.logps, twin.logps, plain.logps, unit=1.0)
    assert frozen.hidden.dtype == case.hidden.dtype
    kit.no_worse(frozen.hidden, twin.hidden, plain.hidden.to(case.hidden.dtype), unit)
    for name in ("hidden", "weight") if case.bias is None else ("hidden", "weight", "bias"):
        got = getattr(ours, name)
        assert got.dtype == case.hidden.dtype
        kit.no_worse(got, getattr(twin, name), getattr(plain, name).to(got.dtype), unit)
    return ours


def logps_of_rounded_dlogits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    case: Any,
    bias: Tensor | None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Eager, in float32, but for the gradient by a = scale·(h·w + bias), which is rounded as the kernels round it."""
    a = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    kept = labels != ignore_index
    factor = 2.0**-14 if case.hidden.dtype == torch.float16 else 1.0
    scale = float(case.upstream[kept].abs().max() * factor) if kept.any() else 1.0
    a.register_hook(lambda grad: (grad / scale).to(case.hidden.dtype).float() * scale)
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    return z.log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0].masked_fill(~kept, 0.0)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
def test_values_and_gradients(kit: SimpleNamespace, dtype: torch.dtype, bias: bool, transforms: dict[str, Any]) -> None:
    right(kit, kit.case(37, 64, 131, dtype, bias=bias, **transforms))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("v", [1, COLUMNS - 1, 2 * COLUMNS, 2 * COLUMNS + 1])
def test_at_the_edges_of_tiles(kit: SimpleNamespace, dtype: torch.dtype, n: int, v: int) -> None:
    """The last label is V − 1: in the last tile, a partial one where V is one more than whole tiles."""
    case = kit.case(n, 32, v, dtype, ignored=0.0)
    assert case.labels[-1] == v - 1
    right(kit, case)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 40, 64, 96, 576])
def test_hidden_sizes(kit: SimpleNamespace, dtype: torch.dtype, d: int) -> None:
    right(kit, kit.case(17, d, 140, dtype))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 33])
def test_rows_that_no_bulk_copy_takes(kit: SimpleNamespace, dtype: torch.dtype, d: int) -> None:
    right(kit, kit.case(17, d, 70, dtype))


@pytest.mark.interpreter
def test_a_vocabulary_of_3001(kit: SimpleNamespace) -> None:
    right(kit, kit.case(33, 64, 3001, torch.float16, softcap=20.0))


@pytest.mark.interpreter
@draws(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 80),
    d=st.sampled_from([1, 16, 24, 64, 80]),
    v=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    transforms=st.sampled_from(TRANSFORMS),
    ignored=st.sampled_from([0.0, 0.2, 0.9]),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_blocks(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    bias: bool,
    transforms: dict[str, Any],
    ignored: float,
    small: bool,
    seed: int,
) -> None:
    blocks.shrink(*((64 * 128 * 4, 64, 64) if small else ()))
    right(kit, kit.case(n, d, v, dtype, bias=bias, ignored=ignored, seed=seed, **transforms))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [2**30, pytest.param(0, marks=pytest.mark.interpreter)], ids=["apart", "together"])
def test_many_blocks_of_rows_and_columns(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    share: int,
) -> None:
    blocks.shrink(partial_floats=64)
    monkeypatch.setattr("tvkd_fast.kernels.head_backward.HIDDEN_SUM_SHARE", share)
    right(kit, kit.case(70, 16, 150, dtype, bias=True, softcap=8.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_ignored_rows(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    results = kit.run(logps, kit.case(40, 16, 70, dtype, bias=True, ignored=1.0))
    for tensor in (results.logps, results.hidden, results.weight, results.bias):
        assert (tensor == 0).all()


def test_a_tile_of_ignored_rows_between_others(kit: SimpleNamespace) -> None:
    case = kit.case(3 * ROWS, 16, 70, ignored=0.0)
    labels = case.labels.clone()
    labels[ROWS : 2 * ROWS] = -100
    results = right(kit, replace(case, labels=labels))
    assert (results.logps[ROWS : 2 * ROWS] == 0).all()
    assert (results.hidden[ROWS : 2 * ROWS] == 0).all()


@pytest.mark.parametrize("ignore_index", [0, 3])
def test_an_ignore_index_of_ones_own(kit: SimpleNamespace, ignore_index: int) -> None:
    right(kit, kit.case(40, 16, 8, ignore_index=ignore_index))


def test_no_rows_at_all(kit: SimpleNamespace) -> None:
    results = kit.run(logps, kit.case(0, 16, 70, bias=True))
    assert results.logps.shape == (0,)
    assert results.hidden.shape == (0, 16)
    assert (results.weight == 0).all()
    assert (results.bias == 0).all()


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [100.0, 2500.0])
def test_huge_logits(kit: SimpleNamespace, dtype: torch.dtype, spread: float) -> None:
    case = kit.case(33, 16, 200, dtype, spread=spread)
    assert reference.logits(case.hidden, case.weight).abs().max() > 3 * spread
    right(kit, case)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_far_from_zero(kit: SimpleNamespace, level: float, softcap: float | None) -> None:
    case = kit.case(33, 16, 100, bias=True, **({"softcap": softcap} if softcap else {}))
    right(kit, replace(case, bias=case.bias + level))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_a_peaked_softmax(kit: SimpleNamespace, dtype: torch.dtype, sharpness: float) -> None:
    """States that copy their label's row of the head: the target holds nearly all probability."""
    case = kit.case(40, 24, 90, dtype)
    weight = torch.nn.functional.normalize(case.weight.float(), dim=1)
    hidden = sharpness * weight[case.labels.clamp(min=0)]
    # What is left of p − 1 has the error of terms of size 1, in torch as here.
    right(kit, replace(case, hidden=hidden.to(dtype), weight=weight.to(dtype)), unit=1.0)


def test_tokens_that_a_bias_takes_out(kit: SimpleNamespace) -> None:
    """A whole split of -inf first, and single ones."""
    case = kit.case(21, 16, 3 * COLUMNS, bias=True)
    bias = case.bias.clone()
    bias[: 2 * COLUMNS] = -torch.inf
    bias[-5] = -torch.inf
    labels = torch.where(bias.isneginf()[case.labels.clamp(min=0)], 3 * COLUMNS - 1, case.labels)
    results = right(kit, replace(case, bias=bias, labels=labels))
    assert (results.weight[: 2 * COLUMNS] == 0).all()
    assert (results.bias[: 2 * COLUMNS] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_tied_to_the_embeddings(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(25, 16, 60, dtype, ignored=0.0, spread=1.0)

    def gradient(op: Any, wide: torch.dtype) -> Tensor:
        table = case.weight.detach().clone().to(wide).requires_grad_()
        out = op(table[case.labels.roll(1)], table, case.labels)
        (grad,) = torch.autograd.grad(out, table, case.upstream.to(out.dtype))
        return grad

    exact = gradient(reference.linear_logps, torch.float64)
    eager = gradient(lambda *args: linear_logps(*args, impl="torch"), torch.float32)
    got = gradient(logps, dtype)
    # Autograd's own 16-bit addition of the two uses rounds once more.
    kit.no_worse(got, exact, eager.to(dtype) + torch.finfo(dtype).eps * exact.abs().max() * (dtype != torch.float32))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_only_what_is_asked_for(kit: SimpleNamespace, dtype: torch.dtype, wants: tuple[bool, ...]) -> None:
    case = kit.case(40, 16, 150, dtype, bias=True, softcap=9.0)
    everything = kit.run(logps, case)
    inputs = [
        x.clone().requires_grad_(want) for x, want in zip((case.hidden, case.weight, case.bias), wants, strict=True)
    ]
    out = logps(inputs[0], inputs[1], case.labels, bias=inputs[2], softcap=9.0)
    # A frozen head sums in another order, and rounds other numbers than dlogits: `right` tests it against the twin.
    streamed, tolerance = wants == (True, False, False), 4 * torch.finfo(dtype).eps
    assert torch.equal(out, everything.logps) or (streamed and torch.allclose(out, everything.logps, atol=1e-5))
    assert out.requires_grad == any(wants)
    if out.requires_grad:
        out.backward(case.upstream.float())
    for leaf, want, expected in zip(
        inputs, wants, (everything.hidden, everything.weight, everything.bias), strict=True
    ):
        assert want or leaf.grad is None
        if streamed and want:
            torch.testing.assert_close(
                leaf.grad, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
            )
        elif want:
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    ("wants", "products"),
    [
        ((False, False), ["head_stats"]),
        ((True, True), ["head_stats", "dlogits", "product", "product"]),
        ((False, True), ["head_stats", "dlogits", "product"]),
        ((True, False), ["exponentials", "product"]),
    ],
    ids=str,
)
def test_a_frozen_half_costs_no_product(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wants: tuple[bool, bool], products: list[str]
) -> None:
    from tvkd_fast.kernels import dlogits, head_dhidden, head_stats
    from tvkd_fast.kernels import products as product_module

    launched = []
    for place in (dlogits, head_dhidden, head_stats, product_module):

        def launch(kernel: Any, *args: Any, original: Any = place.launch, **kwargs: Any) -> None:
            launched.append(kernel.fn.__name__.removesuffix("_kernel"))
            original(kernel, *args, **kwargs)

        monkeypatch.setattr(place, "launch", launch)
    case = kit.case(40, 16, 70)
    inputs = [x.clone().requires_grad_(want) for x, want in zip((case.hidden, case.weight), wants, strict=True)]
    out = logps(*inputs, case.labels)
    if any(wants):
        out.sum().backward()
    without = {"merge_splits", "rescale", "dlogp_dhidden"}
    assert [name for name in launched if name not in without] == products


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", [-1.0, 1.0], ids=["falling", "rising"])
@pytest.mark.parametrize("step", [1.0, 30.0, 300.0])
def test_logits_that_rise_from_tile_to_tile(
    kit: SimpleNamespace, blocks: SimpleNamespace, dtype: torch.dtype, rise: float, step: float
) -> None:
    """Exponentials of neighbouring tiles, and sums of earlier blocks, that were made under other exponents."""
    blocks.shrink()
    case = kit.case(70, 16, 6 * COLUMNS, dtype, bias=True)
    tile = torch.arange(6 * COLUMNS) // COLUMNS
    right(kit, replace(case, bias=(case.bias + rise * step * tile).to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_the_same_bits(kit: SimpleNamespace, blocks: SimpleNamespace, dtype: torch.dtype) -> None:
    blocks.shrink()
    case = kit.case(70, 32, 200, dtype, bias=True)
    for frozen in (False, True):
        first, second = kit.run(logps, case, frozen=frozen), kit.run(logps, case, frozen=frozen)
        for name in ("logps", "hidden") if frozen else ("logps", "hidden", "weight", "bias"):
            assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("upstream", [1e-7, 1e7])
def test_upstream_gradients_that_float16_cannot_hold(kit: SimpleNamespace, upstream: float) -> None:
    case = kit.case(40, 32, 90, torch.float16, spread=0.1)
    normal, scaled = kit.run(logps, case), kit.run(logps, replace(case, upstream=case.upstream * upstream))
    exact = kit.run(reference.linear_logps, case, upcast_to=torch.float64)
    if upstream < 1:
        assert scaled.hidden.float().abs().max() <= 2 * upstream * exact.hidden.abs().max() + 1e-7
    else:
        assert not scaled.hidden.isfinite().all(), "the gradient itself is beyond float16"
    assert normal.hidden.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_coefficients_beside_large_ones(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    """A row with a thousandth of another's upstream gradient keeps its own precision, though its softmax is flat."""
    case = kit.case(40, 32, 500, dtype, ignored=0.0)
    case = replace(case, hidden=case.hidden * 3e-3)
    upstream = case.upstream.sign() * torch.where(torch.arange(40) % 2 == 0, 1.0, 1e-3)
    case = replace(case, upstream=upstream)
    ours, exact = kit.run(logps, case), kit.run(reference.linear_logps, case, upcast_to=torch.float64)
    small = slice(1, None, 2)
    error = (ours.hidden.double() - exact.hidden)[small].norm() / exact.hidden[small].norm()
    assert error <= 2 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "rows"])
def test_inputs_that_are_not_contiguous(kit: SimpleNamespace, dtype: torch.dtype, layout: str) -> None:
    case = kit.case(22, 16, 50, dtype)

    def relaid(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "strided":
            return torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0]
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]

    moved = replace(case, hidden=relaid(case.hidden), weight=relaid(case.weight))
    assert not moved.hidden.is_contiguous()
    right(kit, moved)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_labels_that_are_not_contiguous(kit: SimpleNamespace, layout: str) -> None:
    case = kit.case(40, 16, 50)
    labels = (
        case.labels[:1].expand(40) if layout == "expanded" else torch.stack([case.labels, case.labels * 0], 1)[:, 0]
    )
    assert not labels.is_contiguous()
    right(kit, replace(case, labels=labels))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_a_broken_coefficient_stays_in_its_row(kit: SimpleNamespace, dtype: torch.dtype, upstream: float) -> None:
    case = kit.case(6, 16, 50, dtype, ignored=0.0)
    broken = case.upstream.clone()
    broken[2] = upstream
    clean, got = kit.run(logps, case), kit.run(logps, replace(case, upstream=broken))
    assert got.hidden.isfinite().all(1).tolist() == [True, True, False, True, True, True]
    rest = torch.arange(6) != 2
    torch.testing.assert_close(got.hidden[rest], clean.hidden[rest], rtol=0.01, atol=1e-3)
    assert not got.weight.isfinite().any()


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kappa", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("transforms", TRANSFORMS[:2], ids=str)
def test_both_sums(kit: SimpleNamespace, dtype: torch.dtype, kappa: float, transforms: dict[str, Any]) -> None:
    case = kit.case(37, 32, 300, dtype, bias=True, **transforms)
    arguments = [x.to(DEVICE) for x in (case.hidden, case.weight, case.bias)]
    lse, lse_kappa = linear_lse(*arguments[:2], bias=arguments[2], kappa=kappa, impl="triton", **transforms)
    exact = reference.logits(case.hidden, case.weight, case.bias, **transforms)
    eager = reference.logits(case.hidden, case.weight, case.bias, **transforms).float()
    kit.no_worse(lse.cpu(), exact.logsumexp(1), eager.logsumexp(1))
    kit.no_worse(lse_kappa.cpu(), (kappa * exact).logsumexp(1), (kappa * eager).logsumexp(1))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_entropy(kit: SimpleNamespace, dtype: torch.dtype, spread: float) -> None:
    case = kit.case(37, 32, 300, dtype, bias=True, spread=spread)
    bias = case.bias.clone()
    bias[:70] = -torch.inf
    got = linear_entropy(case.hidden.to(DEVICE), case.weight.to(DEVICE), bias=bias.to(DEVICE), impl="triton").cpu()
    plain = linear_entropy(case.hidden.float(), case.weight.float(), bias=bias.float(), impl="torch")
    kit.no_worse(got, reference.linear_entropy(case.hidden, case.weight, bias=bias), plain)


@pytest.mark.parametrize("shards", [2, 3])
def test_a_vocabulary_in_shards(kit: SimpleNamespace, shards: int) -> None:
    from tvkd_fast.kernels.head_stats import head_sums

    case = kit.case(50, 16, 200)
    hidden, weight, labels = (x.to(DEVICE) for x in (case.hidden, case.weight, case.labels))
    whole = head_sums(hidden, Head(weight), labels=labels)
    borders = [200 * i // shards for i in range(shards + 1)]
    parts = [
        head_sums(hidden, Head(weight[start:stop]), labels=labels, vocab_start=start, absent=0.0)
        for start, stop in pairwise(borders)
    ]
    kept = labels != -100
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    target = torch.stack([part.target for part in parts]).sum(0)
    torch.testing.assert_close(lse[kept], whole.lse[kept])
    torch.testing.assert_close(target[kept], whole.target[kept])


def test_a_label_that_no_row_holds_is_nan(kit: SimpleNamespace) -> None:
    from tvkd_fast.kernels.head_stats import head_sums

    case = kit.case(5, 16, 70, ignored=0.0)
    labels = torch.tensor([70, -1, 2**32 + 3, 3, -(2**32) + 3])
    target = head_sums(case.hidden.to(DEVICE), Head(case.weight.to(DEVICE)), labels=labels.to(DEVICE)).target
    assert target.isnan().tolist() == [True, True, True, False, True]


def test_nor_is_its_gradient_a_number(kit: SimpleNamespace) -> None:
    from tvkd_fast.kernels.head_backward import head_gradients
    from tvkd_fast.kernels.head_stats import head_sums

    case = kit.case(5, 16, 70, ignored=0.0)
    hidden, head = case.hidden.to(DEVICE), Head(case.weight.to(DEVICE))
    labels = torch.tensor([1, 2, 70, -100, 3], device=DEVICE)
    sums = head_sums(hidden, head, labels=labels)
    wants = {"want_hidden": True, "want_weight": True, "want_bias": False}
    grads = head_gradients(hidden, head, labels, sums, torch.ones(5, device=DEVICE), **wants)
    assert grads.hidden.isnan()[2].all()
    assert grads.weight.isnan().all()


def test_nor_is_a_frozen_heads(kit: SimpleNamespace) -> None:
    from tvkd_fast.kernels.head_dhidden import head_dlogp_dhidden

    case = kit.case(6, 16, 70, ignored=0.0)
    labels = torch.tensor([1, -1, 70, -100, 2**32 + 3, 3], device=DEVICE)
    sums, derivatives = head_dlogp_dhidden(case.hidden.to(DEVICE), Head(case.weight.to(DEVICE)), labels)
    assert derivatives.isnan().all(1).tolist() == [False, True, True, False, True, False]
    assert derivatives.isnan().any(1).tolist() == [False, True, True, False, True, False]
    assert sums.target.isnan().tolist()[:3] == [False, True, True]
    assert (derivatives[3] == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_broken_state_shows(kit: SimpleNamespace, softcap: float | None) -> None:
    from tvkd_fast.kernels.head_stats import head_sums

    case = kit.case(5, 16, 70, ignored=0.0)
    hidden = case.hidden.clone()
    hidden[1, 3], hidden[2, 3] = torch.nan, torch.inf
    sums = head_sums(hidden.to(DEVICE), Head(case.weight.to(DEVICE), softcap=softcap))
    assert sums.lse.isfinite().tolist() == [True, False, False, True, True]


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_broken_state_shows_in_its_derivative_alone(
    kit: SimpleNamespace, dtype: torch.dtype, softcap: float | None
) -> None:
    from tvkd_fast.kernels.head_dhidden import head_dlogp_dhidden

    case = kit.case(5, 16, 70, dtype, ignored=0.0)
    hidden = case.hidden.clone()
    hidden[1, 3], hidden[2, 3] = torch.nan, torch.inf
    labels = case.labels.to(DEVICE)
    sums, derivatives = head_dlogp_dhidden(hidden.to(DEVICE), Head(case.weight.to(DEVICE), softcap=softcap), labels)
    assert sums.logps.isfinite().tolist() == [True, False, False, True, True]
    assert derivatives.isfinite().all(1).tolist() == [True, False, False, True, True]
    labels[1:3] = -100
    _, derivatives = head_dlogp_dhidden(hidden.to(DEVICE), Head(case.weight.to(DEVICE), softcap=softcap), labels)
    assert derivatives.isfinite().all()


@pytest.mark.skipif(GPU, reason="on a GPU the table says where descriptors are taken")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_through_descriptors(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    bulk = TileConfig(32, 64, 32, warps=4, stages=1, bulk=True, group=2, split_tiles=2)
    monkeypatch.setattr("tvkd_fast.kernels.configs.INTERPRETED", bulk)
    right(kit, kit.case(67, 48, 150, dtype, bias=True, softcap=7.0))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("split_tiles", [1, 3])
def test_the_order_of_tiles_changes_nothing(kit: SimpleNamespace, group: int, split_tiles: int) -> None:
    from tvkd_fast.kernels.head_stats import head_sums

    case = kit.case(100, 16, 300)
    hidden, weight = case.hidden.to(DEVICE), case.weight.to(DEVICE)
    config = TileConfig(32, 64, 16, warps=4, stages=2, group=group, split_tiles=split_tiles)
    torch.testing.assert_close(head_sums(hidden, Head(weight), config=config).lse, head_sums(hidden, Head(weight)).lse)
