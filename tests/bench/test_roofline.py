"""The model of the head's time: its units, its limits, and what it must say of algorithms whose counts are known."""

import json

import pytest

from bench.roofline.__main__ import CENSUS, epilogues
from bench.roofline.model import (
    ALGORITHMS,
    CHIPS,
    KERNEL,
    LIBRARY,
    WORKSPACE,
    Count,
    Phase,
    _held,
    estimate,
    estimates,
)

H200 = next(chip for chip in CHIPS if chip.name == "H200 SXM")
LARGE = (8192, 4096, 128256)
EPILOGUES = {("head_stats", "sm_90"): 900, ("dlogits", "sm_90"): 1200}


def of(count: Count, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int] = LARGE) -> float:
    monkeypatch.setitem(ALGORITHMS, "one", lambda *_: count)
    return estimate(H200, shape, "one", EPILOGUES).over_product


def test_the_unit_is_one_product_of_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of(Count([Phase(1)]), monkeypatch) == pytest.approx(1.0)
    assert of(Count([Phase(1)], [Phase(2)]), monkeypatch) == pytest.approx(3.0)


def test_traffic_counts_where_it_is_slower_than_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v = LARGE
    seconds = 2 * n * d * v / (H200.flops * LIBRARY)
    assert of(Count([Phase(1, 0.5 * seconds * H200.bandwidth)]), monkeypatch) == pytest.approx(1.0)
    assert of(Count([Phase(1, 2 * seconds * H200.bandwidth)]), monkeypatch) == pytest.approx(2.0)


def test_what_lies_behind_a_tiles_product_is_added_to_a_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of(Count([Phase(1, kernel="head_stats")]), monkeypatch)
    # 900 instructions of eight warps at four schedulers, beside 16 cycles of tensor cores a step of D.
    tile_cycles = 2 * 128 * 256 * LARGE[1] / (H200.flops / H200.processors / H200.clock * LIBRARY)
    assert found == pytest.approx(1 / KERNEL + 1800 / tile_cycles, rel=1e-3)


def test_every_algorithm_is_counted_on_every_chip_and_none_holds_more_than_it_says() -> None:
    found = estimates(EPILOGUES)
    assert len({(x.algorithm, x.chip, x.shape) for x in found}) == len(found) == len(ALGORITHMS) * len(CHIPS) * 3
    products = {x.algorithm: round(x.products, 1) for x in found}
    assert products["tvkd_fast, exact"] == 4
    assert products["tvkd_fast, loss known"] == products["eager"] == products["torch.compile"] == 3
    assert products["tvkd_fast, frozen head"] == 2
    for x in found:
        assert x.forward_ms > 0
        assert x.over_product > 0.99 * x.products * (1 if x.algorithm != "tvkd_fast, sparse 2^-14" else 0)
        if x.algorithm in ("tvkd_fast, exact", "tvkd_fast, frozen head"):
            assert x.held_mib <= WORKSPACE / 2**20


@pytest.mark.parametrize(
    ("name", "goal"),
    [("loss known", 3.2), ("exact, exponentials kept", 3.6), ("frozen head", 2.3), ("values", 1.15)],
)
def test_goals_that_are_reached_by_count_stay_so(name: str, goal: float) -> None:
    """In the library's products at the large shape on an H200, with the instructions of the census (docs/gpu.md)."""
    counted = epilogues(json.loads(CENSUS.read_text()))
    assert estimate(H200, LARGE, f"tvkd_fast, {name}", counted).over_product <= goal


def test_dense_columns_hold_what_was_counted_at_their_share_of_the_vocabulary() -> None:
    assert [_held(share) for share in (0.0, 4096 / 49152, 1.0)] == [0.277, 0.676, 0.804]
    assert 0.500 < _held(3000 / 49152) < 0.676
