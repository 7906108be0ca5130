"""A block of products to log-probabilities and to the gradient by the logits, and the op that is made of both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels.block_softmax import SCALE, SLACK, BlockSums, block_exponentials
from tvkd_fast.kernels.records import Head
from tvkd_fast.losses import segment_sums
from tvkd_fast.ops import reference, triton_walk
from tvkd_fast.ops.known import Upstream, known_logps

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
TRANSFORMS: tuple[dict[str, Any], ...] = ({}, {"softcap": 5.0}, {"logit_scale": -2.0}, {"softcap": 30.0})
INF = float("inf")


def inputs(rows: int, vocab_size: int, spread: float, seed: int, **transforms: Any) -> tuple[Tensor, Head, Tensor]:
    """Products [R, V], a head with a bias, and labels (R,)."""
    torch.manual_seed(seed)
    bias = torch.randn(vocab_size, device=DEVICE)
    head = Head(torch.empty(vocab_size, 1, device=DEVICE), bias, **transforms)
    labels = torch.randint(vocab_size, (rows,), device=DEVICE)
    return torch.randn(rows, vocab_size, device=DEVICE) * spread, head, labels


def logits_of(products: Tensor, head: Head) -> Tensor:
    a = (products.double() + (0.0 if head.bias is None else head.bias.double())) * head.logit_scale
    return a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap)


def exponentials_place(products: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """[R, V] of a dtype: where the products lie, each row's at its beginning, or apart from them."""
    if in_place:
        return products.view(dtype)[:, : products.shape[1]]
    return products.new_empty(products.shape, dtype=dtype)


def check(
    products: Tensor, head: Head, labels: Tensor, dtype: torch.dtype, *, in_place: bool = True
) -> tuple[BlockSums, Tensor]:
    z, place = logits_of(products, head), labels[:, None]
    others = z.scatter(1, place, -INF)
    out = exponentials_place(products, dtype, in_place=in_place)
    found = block_exponentials(products, head, labels, out)
    shift = found.shift.double()
    e = (others - shift.nan_to_num(neginf=0.0)[:, None]).exp()
    assert e.max() <= math.exp(SLACK[dtype]) * 1.001
    torch.testing.assert_close(found.total.double(), e.sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.target.double(), z.gather(1, place)[:, 0], rtol=1e-5, atol=1e-5)
    bare = e.scatter(1, place, -e.sum(1, keepdim=True))
    # J = 1 − (z/softcap)² near 0 is a difference of float32 numbers near 1.
    wanted, of_derivative = bare, 0.0
    if head.softcap is not None:
        wanted, of_derivative = bare * (1 - (z / head.softcap).square()), 1e-6
    # A part that was multiplied once more was rounded once more.
    tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    least = 1e-30 if dtype != torch.float16 else 1e-6
    error = (out.double() / SCALE[dtype] - wanted).abs()
    assert bool((error <= tolerance * wanted.abs() + of_derivative * bare.abs() + least).all())
    return found, out


@draws(30)
@given(
    rows=st.integers(1, 5),
    vocab_size=st.integers(1, 400),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    transforms=st.sampled_from(TRANSFORMS),
    dtype=st.sampled_from(DTYPES),
    in_place=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_block(
    rows: int,
    vocab_size: int,
    spread: float,
    transforms: dict[str, Any],
    dtype: torch.dtype,
    in_place: bool,
    seed: int,
) -> None:
    check(*inputs(rows, vocab_size, spread, seed, **transforms), dtype, in_place=in_place)


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 2047, 2048, 2049])
def test_edges_of_parts(vocab_size: int) -> None:
    check(*inputs(3, vocab_size, 3.0, 0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", [-90.0, -10.0, 7.0, 9.0, 39.0, 41.0, 200.0])
def test_logits_that_rise_or_fall_from_part_to_part(rise: float, dtype: torch.dtype) -> None:
    """The shift stays while they are within its slack, and earlier parts are brought under the last one."""
    products, head, labels = inputs(2, 500, 1.0, 0)
    products += rise * (torch.arange(500, device=DEVICE) // 128)
    found, _ = check(products.clone(), head, labels, dtype)
    first = logits_of(products, head).scatter(1, labels[:, None], -INF)[:, :128].amax(1)
    moved = (found.shift.double() - first).abs() > 1e-4
    assert bool(moved.all()) == (3 * rise > SLACK[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_finite_logit_beside_the_labels(dtype: torch.dtype) -> None:
    products, head, labels = inputs(2, 300, 1.0, 0)
    assert head.bias is not None
    head.bias.fill_(-INF)
    head.bias[5] = 0.0
    labels[0], labels[1] = 5, 7
    out = exponentials_place(products, dtype, in_place=True)
    found = block_exponentials(products, head, labels, out)
    assert found.total.tolist() == [0.0, 1.0]
    assert not out[0].any()
    assert out[1].nonzero()[:, 0].tolist() == [5, 7]


def test_a_flat_rows_label_stays_within_float16() -> None:
    """T = 4,999 of 16 bits: 16·T is more than float16 holds."""
    products, head, labels = inputs(1, 5000, 0.0, 0)
    assert head.bias is not None
    head.bias.zero_()
    _, out = check(products, head, labels, torch.float16)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("broken", [float("nan"), INF])
def test_a_broken_product_shows_in_its_row_alone(broken: float) -> None:
    products, head, labels = inputs(3, 300, 1.0, 0)
    labels.fill_(7)
    products[1, 200] = broken
    found = block_exponentials(products, head, labels, products)
    assert found.total.isnan().tolist() == [False, True, False]


def test_a_label_that_lies_in_no_column_is_nan() -> None:
    products, head, labels = inputs(3, 300, 1.0, 0)
    labels[0], labels[2] = -1, 300
    assert block_exponentials(products, head, labels, products).target.isnan().tolist() == [True, False, True]


LENGTHS = [6, 0, 9, 5, 3, 4]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)


def losses(logps: Tensor) -> Tensor:
    chosen, rejected = (0.1 * logps).view(2, -1)
    return -torch.nn.functional.logsigmoid(chosen - rejected)


def upstream() -> Upstream:
    def derivative(logps: Tensor, responses: Tensor) -> Tensor:
        with torch.enable_grad():
            summed = logps.detach().requires_grad_()
            return torch.autograd.grad(losses(summed).sum(), summed)[0]

    return Upstream(derivative, CU.to(DEVICE))


BOTH = (True, True)
CASES: list[tuple[dict[str, Any], tuple[bool, bool], int | None]] = [
    ({}, BOTH, None),
    ({"softcap": 5.0}, BOTH, 7),
    ({"logit_scale": -2.0}, BOTH, 7),
    ({}, (True, False), 7),
    ({}, (False, True), None),
]


@pytest.mark.parametrize(("transforms", "wants", "rows"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_is_the_float64_twin(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    transforms: dict[str, Any],
    wants: tuple[bool, bool],
    rows: int | None,
) -> None:
    """Of a workspace of seven rows a pair takes several parts, or a block to itself."""
    if rows is not None:
        monkeypatch.setattr(triton_walk, "rows_of_workspace", lambda *_: rows)
    torch.manual_seed(0)
    n, d, v = int(CU[-1]), 12, 300
    hidden, weight, bias = (torch.randn(*size).to(dtype) for size in ((n, d), (v, d), (v,)))
    labels = torch.randint(v, (n,))
    labels[::9] = -100

    def grads_of(op: Any, to: torch.dtype, device: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
        h, w, b = (x.to(device, to) for x in (hidden, weight, bias))
        leaves = [x.requires_grad_() for x, want in zip((h, w, b), (*wants, wants[1]), strict=True) if want]
        logps = op(h, w, labels.to(device), bias=b, **transforms, **options)
        summed = segment_sums(logps, CU.to(device))
        return logps, list(torch.autograd.grad(2 * losses(summed).sum(), leaves))

    def ours(*args: Any, **options: Any) -> Tensor:
        return known_logps(*args[:3], upstream(), impl="triton", **options)

    logps, grads = grads_of(ours, dtype, DEVICE)
    wanted_logps, wanted = grads_of(reference.linear_logps, torch.float64, "cpu")
    torch.testing.assert_close(logps.cpu().double(), wanted_logps, rtol=1e-5, atol=1e-5)
    for got, exact in zip(grads, wanted, strict=True):
        assert got.dtype == dtype
        # Of 16 bits the exponentials are rounded, the states times their factors, and the result.
        tolerance = 3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert (got.cpu().double() - exact).norm() <= tolerance * exact.norm()
