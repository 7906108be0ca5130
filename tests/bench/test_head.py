"""The CPU benchmarks of the head: what they write, what they refuse to time, and their processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


def modules(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    for known in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, known)
    return [__import__(f"bench.{name}", fromlist=[name]) for name in names]


def run(folder: Path, name: str, *arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"bench.{name}", *arguments, "--json", "report.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.e2e
def test_every_row_is_judged_and_timed(tmp_path: Path) -> None:
    made = ("--shape", "64x32x2000", "--entries", "40", "--rounds", "2", "--threads", "2")
    report = run(tmp_path, "head", *made, "--only", "tvkd_fast", "--only", "eager")
    # Of the contenders' processes: this benchmark's own has one.
    assert ", 2 threads, " in report["made_by"]["machine"]
    rows = {row["name"]: row for row in report["results"]}
    assert report["checked"] == "64 rows of dH, 2000 of dW"
    assert report["states"] == "made states, 40 entries a token above 2^-14"
    assert rows.pop("product")["over_floor"] == 1.0
    assert {"tvkd_fast, exact", "tvkd_fast, sparse 2^-14", "eager log-softmax"} <= set(rows)
    for name, row in rows.items():
        assert row.get("seconds", 0) > 0, row
        assert row["over_floor"] > 0
        assert len(row["rounds"]) == 2
        assert row["err_nats"] < 1e-4
        assert ("rel_err_dh" in row) == (name != "tvkd_fast, values")
        assert ("rel_err_dw" in row) == (name != "tvkd_fast, values" and "frozen" not in name)
    assert rows["tvkd_fast, exact"]["rel_err_dw"] < 1e-5
    assert 1e-5 < rows["tvkd_fast, sparse 2^-14"]["rel_err_dh"] < 5e-2
    # The spread was searched for these: 40 entries above 2⁻¹⁴, on a sample.
    assert report["entries"]["2^-14"]["head_entries"] == pytest.approx(40, rel=0.5)


def test_values_are_judged_and_timed(tmp_path: Path) -> None:
    report = run(
        tmp_path, "head.values", "--shape", "64x32x2000", "--entries", "40", "--only", "tvkd", "--only", "eager"
    )
    rows = {row["name"]: row for row in report["results"][1:]}
    assert set(rows) == {"tvkd_fast", "tvkd_fast, without numba", "tvkd_fast, kappa 1/2", "eager logsumexp"}
    for row in rows.values():
        assert row["err_nats"] < 1e-4
        assert row["seconds"] > 0
        assert "rel_err_dh" not in row


@pytest.mark.e2e
def test_a_sweep_is_the_benchmark_point_by_point(tmp_path: Path) -> None:
    made = ("--shape", "64x32x2000", "--entries", "40", "--rounds", "1")
    report = run(tmp_path, "head.sweep", "tokens", "32", "64", "96", *made)
    assert [point["shape"] for point in report["points"]] == ["32x32x2000", "64x32x2000", "96x32x2000"]
    assert {"product", "tvkd_fast, sparse 2^-14", "tvkd_fast, exact"} <= set(report["fits"])
    for line in report["fits"].values():
        assert set(line) == {"a", "b", "worst"}


def test_a_line_is_fitted_by_relative_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    (sweep,) = modules(monkeypatch, "head.sweep")
    line = sweep.fit([512, 1024, 4096], [0.1 + 2e-3 * x for x in (512, 1024, 4096)])
    assert line == {"a": pytest.approx(0.1), "b": pytest.approx(2e-3), "worst": pytest.approx(0, abs=1e-9)}
    assert sweep.fit([1, 2, 3, 4], [1.1, 2, 3, 4])["worst"] == pytest.approx(0.04, abs=0.02)


def test_contenders_are_chosen_by_name_or_part(monkeypatch: pytest.MonkeyPatch) -> None:
    head, contest = modules(monkeypatch, "head.contenders", "head.comparison")
    everyone = head.contenders()
    assert list(contest.selected(everyone, ["exact"])) == ["tvkd_fast, exact"]
    assert list(contest.selected(everyone, ["frozen"])) == [name for name in everyone if "frozen" in name]
    assert set(contest.selected(everyone, None)) <= set(everyone)
    asked = "tvkd_fast, sparse 2^-14, whatever the tail"
    assert asked not in contest.selected(everyone, None) | contest.selected(everyone, ["sparse"])
    assert list(contest.selected(everyone, [asked.removeprefix("tvkd_fast, ")])) == [asked]


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, contest, states, truth = modules(
        monkeypatch, "head.contenders", "head.comparison", "harness.states", "harness.reference"
    )
    with torch.no_grad():
        made = states.made_states((32, 16, 300), 20.0)
    found = contest.measure(
        made,
        truth.compute(made),
        {
            "right": contest.Contender(head.eager),
            "wrong": contest.Contender(lambda h, w, y: 1.01 * head.eager(h, w, y)),
            "broken": contest.Contender(lambda h, w, y: h @ w),
        },
        rounds=1,
        threads=1,
    )
    rows = {row["name"]: row for row in found["results"]}
    assert "seconds" in rows["right"]
    assert rows["wrong"]["wrong"] == "rel_err_dh beyond 0.0001, rel_err_dw beyond 0.0001, err_nats beyond 0.001"
    assert rows["broken"]["refused"].startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "seconds" not in rows["wrong"]
    assert "seconds" not in rows["broken"]


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (runners,) = modules(monkeypatch, "harness.processes")
    runner = runners.Runner(lambda: lambda: os._exit(9), lambda result: result, threads=1, reuse=False)
    with pytest.raises(RuntimeError, match="the process died"):
        runner.seconds()


def test_liger_goes_backward_from_the_coefficients_that_it_is_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    (truth,) = modules(monkeypatch, "harness.reference")
    logps = torch.randn(64, dtype=torch.float64, requires_grad=True)
    chosen, rejected = logps.unflatten(0, (8, 8)).sum(1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(truth.BETA * (chosen - rejected)).mean()
    (wanted,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(truth.preference_coefficients(logps.detach()), wanted)


def test_hot_columns_hold_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    (hot,) = modules(monkeypatch, "head.dense_columns")
    torch.manual_seed(0)
    z = torch.randn(6, 3000) * 4
    everything = hot.counted(z, torch.arange(3000), 10)
    assert everything["held"] == everything["marked"] == 1
    nothing, half = (hot.counted(z, torch.arange(k), 10) for k in (1, 1500))
    assert nothing["held"] < half["held"] < 1
    assert nothing["marked"] > half["marked"] > 1
    labels = torch.tensor([2999, 7, 7])
    for rule in ("labels, then the sample", "labels, then the first"):
        assert set(hot.orders(labels, z, 10)[rule][:2].tolist()) == {7, 2999}


def test_a_program_of_a_peers_name_is_not_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    head, contest = modules(monkeypatch, "head.contenders", "head.comparison")
    monkeypatch.setattr(contest.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(contest.importlib.util, "find_spec", lambda name: None)
    found = set(contest.selected(head.contenders(), None))
    assert "TRL, chunked head" not in found
    assert {"torch.compile", "tvkd_fast, exact"} <= found
