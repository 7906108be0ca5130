"""The CPU benchmarks of the head: what they write, what they refuse to time, and their processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
def test_every_row_is_checked_and_timed(tmp_path: Path) -> None:
    made = ("--shape", "64x32x2000", "--entries", "40", "--rounds", "2", "--threads", "2")
    report = run(tmp_path, "head", *made, "--only", "tvkd_fast", "--only", "eager")
    # Of the contenders' processes: this benchmark's own has one.
    assert ", 2 threads, " in report["made_by"]["machine"]
    rows = {row["name"]: row for row in report["results"]}
    assert report["checked"] == "64 rows of dH, 2000 of dW"
    shown = "made states, 40 entries per token above 2^-14"
    assert report["states"] == f"{shown}, in responses as long as those of bundled:train"
    assert rows.pop("product")["over_floor"] == 1.0
    assert {"tvkd_fast, exact", "tvkd_fast, sparse 2^-14", "eager log-softmax"} <= set(rows)
    for name, row in rows.items():
        assert row.get("seconds", 0) > 0, row
        assert row["over_floor"] > 0
        assert len(row["rounds"]) == 2
        # A whole loss is compared by its gradients.
        assert row.get("err_nats", 0) < 1e-4
        assert ("err_nats" in row) == ("fused loss" not in name)
        assert ("rel_err_dh" in row) == (name != "tvkd_fast, values" and "frozen backbone" not in name)
        assert ("rel_err_dw" in row) == (name != "tvkd_fast, values" and "frozen head" not in name)
    assert rows["tvkd_fast, exact"]["rel_err_dw"] < 1e-5
    assert 1e-5 < rows["tvkd_fast, sparse 2^-14"]["rel_err_dh"] < 5e-2
    # The spread was searched for these: 40 entries above 2⁻¹⁴, on a sample.
    assert report["entries"]["2^-14"]["head_entries"] == pytest.approx(40, rel=0.5)


@pytest.mark.e2e
def test_values_are_checked_and_timed(tmp_path: Path) -> None:
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
    head, registry = modules(monkeypatch, "head.contenders", "harness.contenders")
    contenders = head.on_cpu()
    assert list(registry.selected(contenders, ["exact"])) == [name for name in contenders if "exact" in name][:1]
    assert list(registry.selected(contenders, ["frozen"])) == [name for name in contenders if "frozen" in name]
    asked = "tvkd_fast, sparse 2^-14, whatever the tail"
    assert set(registry.selected(contenders, None)) == set(contenders) - {asked}
    assert asked not in registry.selected(contenders, ["sparse"])
    assert list(registry.selected(contenders, [asked.removeprefix("tvkd_fast, ")])) == [asked]


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("head.contenders", "head.comparison", "head.peers", "harness.states", "harness.reference")
    head, comparison, peers, states, reference = modules(monkeypatch, *names)
    with torch.no_grad():
        made = states.made_states((32, 16, 300), 20.0)
    found = comparison.measure(
        made,
        reference.compute(made),
        {
            "right": head.of(peers.eager),
            "wrong": head.of(lambda h, w, y: 1.01 * peers.eager(h, w, y)),
            "broken": head.of(lambda h, w, y: h @ w),
            "missing": head.of(peers.eager, needs="no_such_peer"),
        },
        rounds=1,
        threads=1,
    )
    rows = {row["name"]: row for row in found["results"]}
    assert len(rows["right"]["rounds"]) == 1
    assert rows["wrong"]["wrong"] == "logps beyond 0.001, hidden beyond 0.0001, weight beyond 0.0001"
    assert re.match(r"RuntimeError: (mm: )?mat1 and mat2 shapes cannot be multiplied", rows["broken"]["refused"])
    assert rows["missing"]["refused"].startswith("not installed: no_such_peer (pip install")
    assert not [name for name in ("wrong", "broken", "missing") if "seconds" in rows[name]]


def test_the_product_is_timed_before_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (meters,) = modules(monkeypatch, "harness.meters")
    clock: list[str] = []

    def taking(name: str, seconds: float) -> Any:
        return lambda: clock.append(name) or seconds

    timers = {"a": taking("a", 2.0), "b": taking("b", 3.0)}
    found = meters.interleaved(timers, 2, before=taking("product", 0.5))
    assert clock == ["product", "a", "product", "b"] * 2
    assert found == {"a": [(0.5, 2.0)] * 2, "b": [(0.5, 3.0)] * 2}
    assert meters.interleaved(timers, 1) == {"a": [(0.0, 2.0)], "b": [(0.0, 3.0)]}


def test_the_checked_run_is_a_timed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (meters,) = modules(monkeypatch, "harness.meters")

    def make() -> Any:
        runs = iter(range(3))
        return lambda: (next(runs), torch.zeros(2**22))

    job = meters.CpuMeter(threads=1).start(make, lambda result: result[0])
    assert job.check() == 0
    assert job.peak_bytes() > 2**23
    first, second, third = (job.seconds() for _ in range(3))
    assert min(first, second, third) > 0
    # The checked run's time was given first: two more were run.
    with pytest.raises(RuntimeError, match="StopIteration"):
        job.seconds()
    job.close()


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (meters,) = modules(monkeypatch, "harness.meters")
    job = meters.CpuMeter(threads=1).start(lambda: lambda: os._exit(9), lambda result: result)
    with pytest.raises(RuntimeError, match=r"the process died \(9\)"):
        job.seconds()
    job.close()


def test_a_number_without_a_reference_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    (checker,) = modules(monkeypatch, "harness.checker")
    reference = checker.Reference({"logps": torch.zeros(3, dtype=torch.float64)})
    assert checker.checked(reference.errors({"other": torch.zeros(3)}), {}) == {
        "errors": {},
        "limits": {},
        "wrong": "no number that float64 has",
    }
    assert "wrong" not in checker.checked(reference.errors({"logps": torch.full((3,), 0.5)}), {"logps": 0.5})
    nan = torch.tensor([0.0, float("nan"), 0.0])
    assert checker.checked(reference.errors({"logps": nan}), {"logps": 0.5})["wrong"] == "logps beyond 0.5"
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        reference.errors({"logps": torch.zeros(2)})


def test_a_selection_of_rows_is_compared_with_those_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    (checker,) = modules(monkeypatch, "harness.checker")
    want = torch.randn(6, 4, dtype=torch.float64)
    rows = torch.tensor([1, 4])
    reference = checker.Reference({"weight": want[rows]}, {"weight": rows})
    assert reference.errors({"weight": want.float()})["weight"] < 1e-6
    off = want.float()
    off[4] *= 2
    assert reference.errors({"weight": off})["weight"] > 0.1


def test_liger_goes_backward_from_the_coefficients_that_it_is_checked_by(monkeypatch: pytest.MonkeyPatch) -> None:
    (reference,) = modules(monkeypatch, "harness.reference")
    logps = torch.randn(64, dtype=torch.float64, requires_grad=True)
    chosen, rejected = logps.unflatten(0, (8, 8)).sum(1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(reference.BETA * (chosen - rejected)).mean()
    (wanted,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(reference.preference_coefficients(logps.detach()), wanted)


def test_dense_columns_hold_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    (dense,) = modules(monkeypatch, "head.dense_columns")
    torch.manual_seed(0)
    z = torch.randn(6, 3000) * 4
    everything = dense.counted(z, torch.arange(3000), 10)
    assert everything["held"] == everything["marked"] == 1
    nothing, half = (dense.counted(z, torch.arange(k), 10) for k in (1, 1500))
    assert nothing["held"] < half["held"] < 1
    assert nothing["marked"] > half["marked"] > 1
    labels = torch.tensor([2999, 7, 7])
    for rule in ("labels, then the sample", "labels, then the first"):
        assert set(dense.orders(labels, z, 10)[rule][:2].tolist()) == {7, 2999}


def test_a_program_of_a_peers_name_is_not_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    head, registry = modules(monkeypatch, "head.contenders", "harness.contenders")
    monkeypatch.setattr(registry.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    contenders = head.on_cpu()
    assert contenders["TRL, chunked head"].refusal.startswith("not installed: trl ")
    assert contenders["torch.compile"].refusal is None
    assert contenders["tvkd_fast, exact"].refusal is None
    monkeypatch.setattr(registry.shutil, "which", lambda name: None)
    assert contenders["torch.compile"].refusal == "not installed: g++"
