"""The benchmark of divergences: what it writes, and what it refuses to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_every_row_is_checked_and_timed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.divergence", "--shape", "64x32x2000", "--threads", "2"]
    command += ["--only", "tvkd_fast", "--only", "eager", "--json", "report.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "moved at random" in report["student"]
    assert set(report["mean_nats"]) == {"forward_kl", "reverse_kl", "jsd"}
    rows = {row["name"]: row for row in report["results"]}
    assert {"tvkd_fast, jsd, known coefficients", "tvkd_fast, forward_kl", "eager, reverse_kl"} <= set(rows)
    # Of so few tokens all rows are over the cap, and sparse gradients are the exact ones.
    assert {"tvkd_fast, forward_kl, sparse 2^-14", "tvkd_fast, forward_kl, frozen head, cached teacher"} <= set(rows)
    for row in rows.values():
        assert row.get("seconds", 0) > 0, row
        assert len(row["rounds"]) == 2
        assert row["err_mean_nats"] < 1e-5
        assert row["rel_err_dh"] < 1e-5
        assert ("rel_err_dw" in row) == ("frozen head" not in row["name"])
        assert row.get("rel_err_dw", 0.0) < 1e-5
