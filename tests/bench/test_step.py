"""The benchmark of whole steps: what it writes, and that contenders come to the same losses on the same pairs."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EIGHT_PAIRS = ("--pairs", "8", "--threads", "1")


@pytest.mark.e2e
def test_every_variant_of_the_head_comes_to_the_same_losses(bench: Any) -> None:
    report = bench("step", *EIGHT_PAIRS, "--variants")
    rows = {row["name"]: row for row in report["results"]}
    variants = ("compiled", "sparse 2^-16", "rows of 1,024 tokens")
    assert set(rows) == {"tvkd_fast", *(f"tvkd_fast, {variant}" for variant in variants)}
    for row in rows.values():
        assert len(row["losses"]) == 2
        assert row["pairs_per_s"] > 0
        assert row["peak_mb"] > 100
        assert 0 < row["logps_error"] < 1e-5
        assert row["loss_off"] < 1e-3
    assert rows["tvkd_fast, compiled"]["grad_norm_off"] < 1e-4
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


def test_a_contender_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.step.comparison import check, text

    exact = torch.tensor([[-40.0, -55.0], [-31.0, -90.0]], dtype=torch.float64)
    task = SimpleNamespace(start_logps=exact)
    right = check(SimpleNamespace(logps=exact.float()), task)
    assert right["logps_error"] < 1e-6
    assert "wrong" not in right
    wrong = check(SimpleNamespace(logps=exact.float() * torch.tensor([1.0, 1.001])), task)
    assert wrong["wrong"] == "logps beyond 0.0001"
    assert text({"name": "a peer"} | wrong).split() == ["a", "peer", "logps", "beyond", "0.0001"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"tvkd_fast"}),
        ({"compiled": True}, {"tvkd_fast", "tvkd_fast, compiled"}),
        ({"peers": ["trl"]}, {"tvkd_fast", "trl"}),
        ({"variants": True}, {"tvkd_fast", "tvkd_fast, compiled", "tvkd_fast, sparse 2^-16"}),
    ],
)
def test_who_takes_part(asked: dict[str, Any], found: set[str]) -> None:
    from bench.step.comparison import takes_part
    from bench.step.contenders import contenders

    arguments = SimpleNamespace(**{"peers": [], "compiled": False, "variants": False, "max_length": 1024} | asked)
    task = SimpleNamespace(batching=SimpleNamespace(tokens=2048))
    assert {name for name in contenders(1024, 1) if takes_part(name, task, arguments)} == found
