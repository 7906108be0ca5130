"""The benchmark of whole steps: what it writes, and that whoever takes the same pairs comes to the same losses."""

import importlib.util
from typing import Any

import pytest

EIGHT_PAIRS = ("--pairs", "8", "--threads", "1")


@pytest.mark.e2e
def test_every_way_to_the_head_comes_to_the_same_losses(bench: Any) -> None:
    report = bench("step", *EIGHT_PAIRS, "--ways")
    rows = {row["name"]: row for row in report["results"]}
    ways = ("logits kept", "sparse 2^-16", "rows of 1,024 tokens")
    assert {"tvkd_fast", *(f"tvkd_fast, {way}" for way in ways)} <= set(rows)
    for row in rows.values():
        assert len(row["losses"]) == 2
        assert row["pairs_per_s"] > 0
        assert row["peak_mb"] > 100
        assert row["loss_off"] < 1e-3
    assert rows["tvkd_fast, logits kept"]["grad_norm_off"] < 1e-4
    assert rows["tvkd_fast"]["losses"][0] != pytest.approx(0.6931472, abs=1e-4)
    assert report["tokens"] < report["padded_tokens"]


@pytest.mark.e2e
@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'tvkd_fast[trl]'"
)
def test_trl_comes_to_our_losses(bench: Any) -> None:
    report = bench("step", *EIGHT_PAIRS, "--peers", "trl")
    ours, trl = report["results"]
    assert (ours["name"], trl["name"]) == ("tvkd_fast", "trl")
    assert ours["logps_off"] < 1e-3
    assert ours["loss_off"] < 1e-4
    assert ours["grad_norm_off"] < 1e-3
    assert set(report["trl_seconds_by_batch"]) == {"1", "2", "4"}
