"""Values and gradients of `linear_logps` against its float64 twin."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.ops import Head, linear_logps, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0},
    {"logit_scale": 0.25},
    {"softcap": 30.0, "logit_scale": -2.0},
)

shapes = st.tuples(st.integers(1, 40), st.integers(1, 33), st.integers(1, 150))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transforms", TRANSFORMS, ids=str)
def test_values_and_gradients(kit: SimpleNamespace, dtype: torch.dtype, bias: bool, transforms: dict[str, Any]) -> None:
    kit.logps_no_worse(kit.case(37, 19, 131, dtype, bias=bias, **transforms))


@draws(60)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    transforms=st.sampled_from(TRANSFORMS),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
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
    ignored: float,
    workspace: int,
    rows: int,
    seed: int,
) -> None:
    with kit.tile_sizes(workspace, rows):
        kit.logps_no_worse(kit.case(*shape, dtype, bias=bias, ignored=ignored, seed=seed, **transforms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_one_more_or_less_than_whole_tiles(kit: SimpleNamespace, dtype: torch.dtype, off: int) -> None:
    # float32: 8 rows and 512 / 2 / 8 = 32 columns; 16 bits: 512 / 2 / (8 + 2·8) = 10 columns.
    columns = 32 if dtype in (torch.float32, torch.float64) else 10
    with kit.tile_sizes(512, 8):
        case = kit.case(24 + off, 8, 4 * columns + off, dtype, ignored=0.0)
        assert case.labels[-1] == case.weight.shape[0] - 1
        kit.logps_no_worse(case)


@pytest.mark.parametrize(("n", "in_buffer"), [(16, True), (17, False)])
def test_both_walks_of_a_16_bit_hidden_gradient(kit: SimpleNamespace, n: int, in_buffer: bool) -> None:
    with kit.tile_sizes(512, 8), kit.Watch() as watch:
        case = kit.case(n, 32, 50, torch.bfloat16, ignored=0.0)
        kit.run(linear_logps, case)
        assert watch.multiply_adds == (4 if in_buffer else 5) * case.hidden.numel() * 50
        kit.logps_no_worse(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_walks_skip_ignored_rows(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    for workspace in (256, 2**22):
        with kit.tile_sizes(workspace, 5):
            grads = kit.logps_no_worse(case := kit.case(41, 12, 77, dtype, ignored=0.3, seed=3))
        ignored = case.labels == -100
        assert 0 < ignored.sum() < 41
        assert (grads.logps[ignored] == 0).all()
        assert (grads.hidden[ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_nothing_but_ignored_rows(kit: SimpleNamespace, dtype: torch.dtype, bias: bool) -> None:
    results = kit.run(linear_logps, kit.case(9, 5, 11, dtype, bias=bias, ignored=1.0))
    for tensor in (results.logps, results.hidden, results.weight, *([results.bias] if bias else [])):
        assert (tensor == 0).all()


def test_without_a_count_of_kept_rows_as_on_a_gpu(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kit.case(23, 7, 31, ignored=0.4, bias=True, softcap=4.0)
    assert (case.labels == -100).any()
    monkeypatch.setattr("tvkd_fast.ops.torch_backend.kept_rows", lambda labels, ignore_index: None)
    grads = kit.logps_no_worse(case)
    assert (grads.hidden[case.labels == -100] == 0).all()


@pytest.mark.parametrize("ignore_index", [0, 3, -1])
def test_an_ignore_index_of_ones_own(kit: SimpleNamespace, ignore_index: int) -> None:
    case = kit.case(30, 7, 8, ignore_index=ignore_index)
    results = kit.logps_no_worse(case)
    assert torch.equal(results.logps == 0, case.labels == ignore_index)


def test_labels_of_32_bits(kit: SimpleNamespace) -> None:
    case = kit.case(30, 7, 50)
    assert torch.equal(
        linear_logps(case.hidden, case.weight, case.labels),
        linear_logps(case.hidden, case.weight, case.labels.int()),
    )


def test_an_ignored_row_may_hold_nan(kit: SimpleNamespace) -> None:
    case = kit.case(20, 6, 30, ignored=0.3)
    broken = case.hidden.clone()
    broken[case.labels == -100] = torch.nan
    clean, got = kit.run(linear_logps, case), kit.run(linear_logps, replace(case, hidden=broken))
    assert torch.equal(clean.logps, got.logps)
    assert torch.equal(clean.hidden, got.hidden)
    assert torch.equal(clean.weight, got.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [100.0, 2500.0])
@pytest.mark.parametrize("seed", range(3))
def test_huge_logits(kit: SimpleNamespace, dtype: torch.dtype, spread: float, seed: int) -> None:
    case = kit.case(33, 16, 200, dtype, spread=spread, seed=seed)
    assert reference.logits(case.hidden, case.weight).abs().max() > 3 * spread
    with kit.tile_sizes(2048, 16):
        kit.logps_no_worse(case)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_logits_far_from_zero(kit: SimpleNamespace, level: float) -> None:
    case = kit.case(33, 16, 200, bias=True)
    assert case.bias is not None
    with kit.tile_sizes(2048, 16):
        kit.logps_no_worse(replace(case, bias=case.bias + level))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_a_peaked_softmax(kit: SimpleNamespace, dtype: torch.dtype, sharpness: float) -> None:
    """States that copy their label's row of the head: the target holds nearly all probability."""
    case = kit.case(40, 24, 90, dtype)
    weight = torch.nn.functional.normalize(case.weight.float(), dim=1)
    hidden = sharpness * weight[case.labels.clamp(min=0)]
    with kit.tile_sizes(1024, 16):
        results = kit.logps_no_worse(replace(case, hidden=hidden.to(dtype), weight=weight.to(dtype)))
    if sharpness == 30.0:
        assert results.logps.min() > -0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [slice(0, 40), slice(60, 69), slice(0, 69)])
def test_tokens_that_a_bias_takes_out(kit: SimpleNamespace, dtype: torch.dtype, masked: slice) -> None:
    case = kit.case(21, 10, 70, dtype, bias=True)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[masked] = -torch.inf
    labels = torch.where(bias.isneginf()[case.labels.clamp(min=0)], 69, case.labels)
    with kit.tile_sizes(256, 8):
        results = kit.logps_no_worse(replace(case, bias=bias, labels=labels))
    assert (results.weight[masked] == 0).all()
    assert (results.bias[masked] == 0).all()


def test_a_label_that_a_bias_takes_out_has_no_probability(kit: SimpleNamespace) -> None:
    case = kit.case(9, 10, 70, bias=True, ignored=0.0)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[case.labels[2]] = -torch.inf
    logps = linear_logps(case.hidden, case.weight, case.labels, bias=bias)
    assert logps[2] == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["tied", "copied"])
def test_a_head_tied_to_the_embeddings(kit: SimpleNamespace, dtype: torch.dtype, shared: bool) -> None:
    """The gradient reaches a tied weight by both of its uses, and a copy of it by one."""
    case = kit.case(25, 12, 60, dtype, ignored=0.0, spread=1.0)
    tokens = case.labels.roll(1)

    def gradients(op: Any, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        table = case.weight.detach().clone().to(wide).requires_grad_()
        head = table if shared else table.detach().clone().requires_grad_()
        # Each use is an edge of its own, so that the two gradients can be distinguished before they are summed.
        hidden, weight = table[tokens], head.view_as(head)
        logps = op(hidden, weight, case.labels)
        torch.autograd.backward(logps, case.upstream.to(logps.dtype))
        return table.grad, head.grad

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours, twin = gradients(linear_logps, dtype), gradients(reference.linear_logps, torch.float64)
    plain = gradients(reference_in(wide), wide)
    for got, exact, eager in zip(ours, twin, plain, strict=True):
        # Each 16-bit addition of autograd's own rounds once more than the float32 sum that is rounded at the end.
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * (eager.to(dtype).double() - exact).abs().max() + 2 * rounding


def reference_in(dtype: torch.dtype) -> Any:
    def logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (hidden.to(dtype) @ weight.to(dtype).T).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    return logps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_at_all(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(0, 6, 13, dtype, bias=True)
    results = kit.run(linear_logps, case)
    assert results.logps.shape == (0,)
    assert results.hidden.shape == (0, 6)
    assert (results.weight == 0).all()
    assert (results.bias == 0).all()


@pytest.mark.parametrize("grad_mode", ["exact", "sparse"])
def test_a_head_stands_for_its_parts(kit: SimpleNamespace, grad_mode: str) -> None:
    case = kit.case(7, 5, 40, bias=True, softcap=8.0, logit_scale=0.5)

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **transforms: Any) -> Tensor:
        return linear_logps(hidden, Head(weight, bias, **transforms), labels, grad_mode=grad_mode)

    def parts(*tensors: Tensor, **options: Any) -> Tensor:
        return linear_logps(*tensors, grad_mode=grad_mode, **options)

    for ours, theirs in zip(vars(kit.run(whole, case)).values(), vars(kit.run(parts, case)).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beside", [{"bias": torch.zeros(9)}, {"softcap": 2.0}, {"logit_scale": 2.0}])
def test_nothing_stands_beside_a_head(kit: SimpleNamespace, beside: dict[str, Any]) -> None:
    case = kit.case(3, 4, 9)
    with pytest.raises(ValueError, match="weight is a Head, which has a bias, a softcap and a logit_scale of its own"):
        linear_logps(case.hidden, Head(case.weight), case.labels, **beside)
