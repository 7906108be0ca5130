"""`linear_lse`, `linear_soft_values` and `soft_values` against float64 twins."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.ops import linear_lse, linear_soft_values, reference, soft_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0},
    {"logit_scale": -0.5},
    {"softcap": 20.0, "logit_scale": 2.0},
)


def wide(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.float()


def torch_soft_values(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    value_scale: float = 1.0,
    value_from: str = "logits",
) -> Tensor:
    z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return value_scale / kappa * (kappa * (z.log_softmax(-1) if value_from == "logprobs" else z)).logsumexp(-1)


def values_no_worse(kit: SimpleNamespace, case: Any, **options: Any) -> Tensor:
    ours = linear_soft_values(case.hidden, case.weight, bias=case.bias, **case.transforms, **options)
    twin = reference.linear_soft_values(case.hidden, case.weight, bias=case.bias, **case.transforms, **options)
    plain = torch_soft_values(wide(case.hidden), wide(case.weight), bias=wide(case.bias), **case.transforms, **options)
    assert ours.dtype == plain.dtype
    assert not ours.requires_grad
    if options.get("value_from") == "logprobs":
        # A difference of two sums: its last digits are the sums', whose size the caller chose with the logits.
        lse = reference.linear_soft_values(case.hidden, case.weight, bias=case.bias, **case.transforms)
        digits = 4 * torch.finfo(ours.dtype).eps * abs(options["value_scale"]) * lse.abs().max()
        assert (ours - twin).abs().max() <= 2 * (plain - twin).abs().max() + 1e-5 * twin.abs().max() + digits
    else:
        kit.no_worse(ours, twin, plain)
    return ours


@draws(80)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 33), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    transforms=st.sampled_from(TRANSFORMS),
    kappa=st.sampled_from([0.1, 0.7, 1.0, 1.5, 10.0]),
    value_scale=st.sampled_from([1.0, 0.1, -2.0]),
    value_from=st.sampled_from(["logits", "logprobs"]),
    workspace=st.sampled_from([64, 512, 4096, 2**22]),
    rows=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_tiles(
    kit: SimpleNamespace,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    transforms: dict[str, Any],
    kappa: float,
    value_scale: float,
    value_from: str,
    workspace: int,
    rows: int,
    seed: int,
) -> None:
    case = kit.case(*shape, dtype, bias=bias, seed=seed, **transforms)
    with kit.tile_sizes(workspace, rows):
        values_no_worse(kit, case, kappa=kappa, value_scale=value_scale, value_from=value_from)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("kappa", [0.7, 1.0])
def test_one_more_or_less_than_whole_tiles(kit: SimpleNamespace, dtype: torch.dtype, off: int, kappa: float) -> None:
    columns = 32 if dtype in (torch.float32, torch.float64) else 10
    with kit.tile_sizes(512, 8):
        values_no_worse(kit, kit.case(24 + off, 8, 4 * columns + off, dtype), kappa=kappa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_worth_nothing_at_kappa_1(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(30, 9, 70, dtype)
    assert (linear_soft_values(case.hidden, case.weight, value_from="logprobs") == 0).all()


def test_logprobs_are_an_entropy(kit: SimpleNamespace) -> None:
    """Test the bounds below κ=1, 0 and the uniform distribution's entropy, and the other sign above it."""
    case = kit.case(50, 9, 70)
    flat = linear_soft_values(torch.zeros_like(case.hidden), case.weight, kappa=0.7, value_from="logprobs")
    some = linear_soft_values(case.hidden, case.weight, kappa=0.7, value_from="logprobs")
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3 / 0.7 * torch.log(torch.tensor(70.0))))
    assert (some >= 0).all()
    assert (some <= flat).all()
    assert (linear_soft_values(case.hidden, case.weight, kappa=1.5, value_from="logprobs") <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [-1e4, -50.0, 3.0, 1e4])
@pytest.mark.parametrize("kappa", [0.7, 1.0])
def test_shifted_logits_shift_the_sum(kit: SimpleNamespace, dtype: torch.dtype, level: float, kappa: float) -> None:
    case = kit.case(30, 9, 70, dtype)
    level = float(torch.tensor(level).to(dtype))
    bias = torch.full((70,), level, dtype=dtype)
    with kit.tile_sizes(256, 8):
        plain, plain_kappa = linear_lse(case.hidden, case.weight, kappa=kappa)
        moved, moved_kappa = linear_lse(case.hidden, case.weight, bias=bias, kappa=kappa)
    close = {"rtol": 0.0, "atol": 8 * torch.finfo(plain.dtype).eps * (abs(level) + 10)}
    torch.testing.assert_close(moved, plain + level, **close)
    torch.testing.assert_close(moved_kappa, plain_kappa + kappa * level, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value_from", ["logits", "logprobs"])
@pytest.mark.parametrize("kappa", [0.7, 1.0, 3.0])
def test_huge_logits(kit: SimpleNamespace, dtype: torch.dtype, value_from: str, kappa: float) -> None:
    case = kit.case(33, 16, 200, dtype, spread=2500.0)
    assert reference.logits(case.hidden, case.weight).abs().max() > 8e3
    with kit.tile_sizes(2048, 16):
        values = values_no_worse(kit, case, kappa=kappa, value_scale=0.1, value_from=value_from)
    assert values.isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, 40), slice(60, 70), slice(0, 69)])
@pytest.mark.parametrize("kappa", [0.7, 1.0])
def test_tokens_that_a_bias_takes_out(kit: SimpleNamespace, masked: slice, kappa: float) -> None:
    case = kit.case(21, 10, 70)
    bias = torch.zeros(70)
    bias[masked] = -torch.inf
    with kit.tile_sizes(256, 8):
        got = linear_lse(case.hidden, case.weight, bias=bias, kappa=kappa)
        left = linear_lse(case.hidden, case.weight[bias == 0], kappa=kappa)
    torch.testing.assert_close(got, left)


def test_two_sums_cost_one_product(kit: SimpleNamespace) -> None:
    case = kit.case(30, 9, 70)
    with kit.Watch() as watch:
        linear_lse(case.hidden, case.weight, kappa=0.7)
    assert watch.multiply_adds == 30 * 9 * 70


def test_at_kappa_1_the_two_sums_are_one(kit: SimpleNamespace) -> None:
    case = kit.case(30, 9, 70)
    lse, lse_kappa = linear_lse(case.hidden, case.weight)
    assert lse is lse_kappa


def test_no_gradient(kit: SimpleNamespace) -> None:
    case = kit.case(30, 9, 70)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    assert not any(x.requires_grad for x in linear_lse(hidden, weight, kappa=0.7))
    assert not linear_soft_values(hidden, weight).requires_grad


@pytest.mark.parametrize("kappa", [0.7, 1.0])
@pytest.mark.parametrize("value_from", ["logits", "logprobs"])
def test_values_from_kept_sums_are_the_same_bits(kit: SimpleNamespace, kappa: float, value_from: str) -> None:
    case = kit.case(30, 9, 70)
    options: dict[str, Any] = {"kappa": kappa, "value_scale": 0.1, "value_from": value_from}
    lse, lse_kappa = linear_lse(case.hidden, case.weight, kappa=kappa)
    assert torch.equal(soft_values(lse, lse_kappa, **options), linear_soft_values(case.hidden, case.weight, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_an_explicit_cast(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(30, 9, 70, bias=True)
    with torch.autocast("cpu", dtype=dtype):
        got = linear_soft_values(case.hidden, case.weight, bias=case.bias, kappa=0.7)
    explicit = linear_soft_values(case.hidden.to(dtype), case.weight.to(dtype), bias=case.bias.to(dtype), kappa=0.7)
    assert got.dtype == torch.float32
    assert torch.equal(got, explicit)


def test_no_states_at_all(kit: SimpleNamespace) -> None:
    case = kit.case(0, 9, 70)
    assert linear_soft_values(case.hidden, case.weight).shape == (0,)
    assert [x.shape for x in linear_lse(case.hidden, case.weight, kappa=0.7)] == [(0,), (0,)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kappa", [0.7, 1.0])
def test_rows_that_are_left_out(kit: SimpleNamespace, kappa: float, impl: str) -> None:
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("tests/kernels holds the compiled kernels to this")
    case, rows = kit.case(30, 16, 70, bias=True), torch.arange(30) % 3 > 0
    settings = {"bias": case.bias, "kappa": kappa, "impl": impl}
    broken = case.hidden.masked_fill(~rows[:, None], torch.nan)
    every, some = (
        linear_lse(case.hidden, case.weight, **settings),
        linear_lse(broken, case.weight, rows=rows, **settings),
    )
    for got, expected in zip(some, every, strict=True):
        torch.testing.assert_close(got[rows], expected[rows])
        assert (got[~rows] == 0).all()


def test_rows_that_are_not_computed(kit: SimpleNamespace) -> None:
    case, rows = kit.case(30, 9, 70), torch.arange(30) < 12
    with kit.Watch() as watch:
        linear_soft_values(case.hidden, case.weight, rows=rows)
    assert watch.multiply_adds == 12 * 9 * 70
    nothing = linear_soft_values(case.hidden, case.weight, rows=torch.zeros(30, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros(30))


@pytest.mark.parametrize(
    "rows",
    [torch.ones(29, dtype=torch.bool), torch.ones(30), torch.ones(30, dtype=torch.bool, device="meta")],
    ids=["length", "dtype", "device"],
)
def test_rows_that_do_not_fit(kit: SimpleNamespace, rows: Tensor) -> None:
    case = kit.case(30, 9, 70)
    with pytest.raises(ValueError, match=r"rows must be \(30,\) bool|rows on meta: move one"):
        linear_soft_values(case.hidden, case.weight, rows=rows)


@pytest.mark.parametrize("kappa", [0.7, 1.0])
def test_opcheck_of_rows(kit: SimpleNamespace, kappa: float) -> None:
    case, rows = kit.case(11, 6, 30), torch.arange(11) < 4
    head = (case.hidden, case.weight, None, 4.0, 0.5, kappa, "torch", rows)
    torch.library.opcheck(torch.ops.tvkd_fast.linear_lse.default, head)
