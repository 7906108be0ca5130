"""The benchmark of whole steps: what it writes, and that whoever takes the same pairs comes to the same losses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def contest(model_folder: Any, write_jsonl: Any, tmp_path: Path) -> Any:
    def run(*arguments: str) -> dict[str, Any]:
        rows = [
            {"prompt": f"{i} is", "chosen": "odd" if i % 2 else "even", "rejected": "a number" * 3} for i in range(12)
        ]
        command = [sys.executable, "-W", "ignore", "-m", "bench.step", "--model", model_folder(), "--threads", "1"]
        command += ["--data", str(write_jsonl(rows)), "--pairs", "8", *arguments, "--json", "report.json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "report.json").read_text())

    return run


def test_every_way_to_the_head_comes_to_the_same_losses(contest: Any) -> None:
    report = contest("--ways")
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


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'tvkd_fast[trl]'"
)
def test_trl_comes_to_our_losses(contest: Any) -> None:
    report = contest("--peers", "trl")
    ours, trl = report["results"]
    assert (ours["name"], trl["name"]) == ("tvkd_fast", "trl")
    assert ours["logps_off"] < 1e-3
    assert ours["loss_off"] < 1e-4
    assert ours["grad_norm_off"] < 1e-3
    assert set(report["trl_seconds_by_batch"]) == {"1", "2", "4"}
