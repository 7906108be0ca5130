"""The log-sum-exp of the library's products: no worse than torch, odd rows as the kernel has them, when it serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels import logit_sums
from tvkd_fast.kernels.records import Head, HeadSums
from tvkd_fast.ops import linear_entropy, linear_logps, linear_lse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float16, torch.bfloat16) if GPU else (torch.float16, torch.float32)
INF = float("inf")
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True},
    {"softcap": 5.0, "logit_scale": -2.0},
    {"bias": True, "softcap": 9.0},
)


def inputs(
    n: int, v: int, dtype: torch.dtype, *, d: int = 16, bias: bool = False, **transforms: Any
) -> tuple[Tensor, Head]:
    draw = torch.Generator().manual_seed(n + v)
    hidden, weight = torch.randn(n, d, generator=draw), torch.randn(v, d, generator=draw)
    offsets = torch.randn(v, generator=draw).to(DEVICE, dtype) if bias else None
    return hidden.to(DEVICE, dtype), Head(weight.to(DEVICE, dtype), offsets, **transforms)


def logits(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    a = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        a = a + head.bias.to(dtype)
    a = head.logit_scale * a
    return a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap)


def right(kit: SimpleNamespace, hidden: Tensor, head: Head) -> HeadSums:
    found = logit_sums.logit_sums(hidden, head)
    exact, plain = (logits(hidden, head, x) for x in (torch.float64, torch.float32))
    assert found.target is None
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.maximum.double(), exact.amax(1), rtol=1e-5, atol=1e-5)
    kit.no_worse(found.lse, exact.logsumexp(1), plain.logsumexp(1), unit=1.0)
    return found


@draws(20)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    transforms=st.sampled_from(TRANSFORMS),
)
def test_any_shape(kit: SimpleNamespace, n: int, v: int, dtype: torch.dtype, transforms: dict[str, Any]) -> None:
    right(kit, *inputs(n, v, dtype, **transforms))


@pytest.mark.parametrize("v", [127, 128, 129, 257])
def test_blocks_of_rows_and_edges_of_parts(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, products: list[int], v: int
) -> None:
    hidden, head = inputs(11, v, DTYPES[0], bias=True)
    whole = right(kit, hidden, head)
    monkeypatch.setattr(logit_sums, "workspace_bytes", lambda _: 4 * 4 * v)
    parts = right(kit, hidden, head)
    # At most 4 rows fit: 11 are taken as evenly as can be.
    assert products == [11, 4, 4, 3]
    torch.testing.assert_close(parts.lse, whole.lse)


def test_logits_that_rise_from_part_to_part_and_lie_far_from_zero(kit: SimpleNamespace) -> None:
    hidden, head = inputs(3, 500, torch.float32, bias=True)
    assert head.bias is not None
    for rise, level in ((90.0, 0.0), (-90.0, 0.0), (1.0, 1e4), (1.0, -1e4)):
        head.bias[:] = level + rise * (torch.arange(500, device=DEVICE) // 128)
        # Their float32 has as many digits beside a large level as torch's.
        right(kit, hidden, head)


def test_no_rows() -> None:
    hidden, head = inputs(6, 150, DTYPES[0])
    assert logit_sums.logit_sums(hidden[:0], head).lse.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("value", [INF, torch.nan])
def test_a_broken_state_shows(softcap: float | None, value: float) -> None:
    hidden, head = inputs(3, 150, DTYPES[0], softcap=softcap)
    hidden[1, 0] = value
    assert logit_sums.logit_sums(hidden, head).lse.isnan().tolist() == [False, True, False]


def test_tokens_that_a_bias_takes_out(kit: SimpleNamespace) -> None:
    hidden, head = inputs(5, 300, DTYPES[0], bias=True)
    assert head.bias is not None
    head.bias[:200] = -INF
    right(kit, hidden, head)
    head.bias[:] = -INF
    assert logit_sums.logit_sums(hidden, head).lse.tolist() == [-INF] * 5


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that is made."""
    made: list[int] = []
    plain = logit_sums.accumulate

    def accumulate(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> None:
        made.append(len(left))
        plain(total, left, right, **options)

    monkeypatch.setattr(logit_sums, "accumulate", accumulate)
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [8, 16])
def test_it_serves_wide_states_of_16_bits(
    monkeypatch: pytest.MonkeyPatch, products: list[int], dtype: torch.dtype, d: int
) -> None:
    """Where LSE(z) alone is asked for, of all rows; as on a GPU whose library sums 16 bits in float32."""
    monkeypatch.setattr(logit_sums, "library_sums", lambda device, dtype: dtype != torch.float32)
    monkeypatch.setattr(logit_sums, "LEAST_WIDTH", 16)
    hidden, head = inputs(6, 150, dtype, d=d, softcap=5.0)
    every = torch.ones(6, dtype=torch.bool, device=DEVICE)
    linear_lse(hidden, head, kappa=0.5, impl="triton")
    linear_lse(hidden, head, rows=every, impl="triton")
    linear_entropy(hidden, head, impl="triton")
    linear_logps(hidden, head, every.long(), impl="triton")
    assert products == []
    lse, _ = linear_lse(hidden, head, impl="triton")
    assert products == ([6] if d == 16 and dtype == torch.float16 else [])
    torch.testing.assert_close(lse.double(), logits(hidden, head, torch.float64).logsumexp(1), rtol=1e-5, atol=1e-5)


def test_without_room_the_kernel_serves(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(logit_sums, "accumulate", full)
    right(kit, *inputs(6, 150, DTYPES[0]))
