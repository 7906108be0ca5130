"""Exponentials of a block, tile by tile, against float64's of the whole."""

from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.exponentials import SLACK, Exponentials

INF = float("inf")


@pytest.fixture(params=["compiled", "torch"])
def passes(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    elif native.passes(torch.zeros(1)) is None:
        pytest.skip("numba is not installed")
    return str(request.param)


def taken(z: Tensor, size: int, softcap: float | None = None) -> tuple[Tensor, Exponentials]:
    """What a block [V, R] becomes in tiles of so many columns, and the sums."""
    block = z.clone()
    found = Exponentials(block, z.shape[1], softcap)
    for tile in block.split(size):
        found.take(tile)
    found.finish()
    return block, found


def check(z: Tensor, size: int, softcap: float | None = None) -> None:
    block, found = taken(z, size, softcap)
    exact = z.double()
    shift = found.shift.double()
    assert ((exact.amax(0) - shift) <= SLACK + 1e-3).all()
    wanted = (exact - shift).exp()
    torch.testing.assert_close(found.total, wanted.sum(0), rtol=2e-5, atol=0)
    if softcap is not None:
        wanted *= (1 - (exact / softcap).square()).clamp(min=0)
    # A difference of float32s is rounded, and what an earlier tile is multiplied by may be too small for one: it then
    # was below e^-63 of the row's largest.
    torch.testing.assert_close(block.double(), wanted, rtol=1e-4 if z.dtype == torch.float32 else 1e-12, atol=1e-26)


@draws(40)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 300), st.floats(0.0, 300.0), st.integers(0, 999))
def test_any_block(rows: int, size: int, vocab_size: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    check(torch.randn(vocab_size, rows) * spread, size)


@pytest.mark.parametrize("step", [-90.0, -10.0, 10.0, 39.0, 41.0, 200.0, 1e4])
def test_logits_that_drift_from_tile_to_tile(step: float, passes: str) -> None:
    """Every row at a pace of its own, the first at none."""
    torch.manual_seed(0)
    pace = torch.arange(5) / 4
    check(torch.randn(96, 5) + torch.arange(96)[:, None] // 8 * step * pace, 8)


def test_a_softcap_keeps_its_derivative_apart_from_the_sums(passes: str) -> None:
    torch.manual_seed(0)
    check(torch.tanh(torch.randn(50, 4)) * 30.0, 7, softcap=30.0)


def test_double_precision(passes: str) -> None:
    torch.manual_seed(0)
    check(torch.randn(50, 4, dtype=torch.float64) * 20.0, 7)


def test_rows_whose_logits_begin_or_stay_at_minus_infinity(passes: str) -> None:
    z = torch.full((6, 2), -INF)
    z[4, 0] = 3.0
    block, found = taken(z, 2)
    assert found.shift.tolist() == [3.0, -INF]
    assert found.total.tolist() == [1.0, 0.0]
    assert block[:, 0].tolist() == [0, 0, 0, 0, 1, 0]
    assert not block[:, 1].any()


@pytest.mark.parametrize("broken", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 5])
def test_a_broken_logit_shows_in_its_row_alone(broken: float, place: int, passes: str) -> None:
    z = torch.zeros(6, 2)
    z[place, 0] = broken
    block, found = taken(z, 2)
    assert found.total[0].isnan()
    assert found.total[1] == 6.0
    assert (block[:, 1] == 1).all()


def test_no_rows_at_all(passes: str) -> None:
    block, found = taken(torch.zeros(6, 0), 2)
    assert block.shape == (6, 0)
    assert found.total.shape == (0,)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed: pip install 'tvkd_fast[numba]'")
    from tvkd_fast.ops.tiles import numba_passes

    torch.manual_seed(0)
    z, threads = torch.randn(1024, 300).numpy(), numba.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            numba.set_num_threads(count)
            results.append(torch.zeros(300, dtype=torch.float64))
            numba_passes.exponentiate(z.copy(), torch.full((300,), -INF).numpy(), results[-1].numpy(), SLACK)
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(*results)
