"""`bench.minutes` on a CPU: processes that crash or hang, limits, the exit status, guards, tables, and the dry walk."""

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def minutes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.minutes import cases, exact, guards, plan, runner, suites, walk
    from bench.tables import minutes as tables

    found = {"cases": cases, "exact": exact, "guards": guards, "plan": plan, "runner": runner, "suites": suites}
    return SimpleNamespace(**found, walk=walk, tables=tables)


# Kernels as a walk may meet them, run by the worker itself.
PLANTED = """
import os, signal, time
from bench.minutes.cases import Case, NotTriedError

def raises():
    raise RuntimeError("ptxas failed\\nwith a long log")

def skips():
    raise NotTriedError("needs a GPU")

def prints():
    os.write(1, b"a kernel's own words\\n")
    return {"shown": "printed"}

def several():
    yield {"shown": "first"}
    yield {"name": "another", "shown": "second"}
    raise ValueError("third")

def imports():
    import no_such_module

RUNS = {
    "raises": raises,
    "segfaults": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hangs": lambda: time.sleep(600),
    "skips": skips,
    "prints": prints,
    "several": several,
    "imports": imports,
    "last": lambda: {"shown": "right"},
}

def cases(scale):
    assert scale.dry
    return [Case(name=name, run=run, limit=1.0 if name == "hangs" else 60.0) for name, run in RUNS.items()]
"""

# A worker that speaks the protocol and imports nothing: NAME is answered, or does what it says.
FAKE = """
import json, os, sys, time
cases = os.environ["CASES"].split()
if cases == ["crash"]:
    sys.exit("no module named torch")
print("warning: not JSON")
print(json.dumps({"cases": [[name, 5.0, name.startswith("peer")] for name in cases]}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["case"]
    if "exit" in name:
        sys.exit("out of luck")
    if "leave" in name:
        print(json.dumps({"row": {"name": name, "failed": "illegal address"}}))
        print(json.dumps({"leaving": name}), flush=True)
        os._exit(1)
    if "stop" in name:
        print(json.dumps({"row": {"name": name, "failed": "no device", "stops": True}}))
        print(json.dumps({"done": name}), flush=True)
        continue
    if "sleep" in name:
        time.sleep(600)
    row = {"name": name} | ({"wrong": "dW"} if "wrong" in name else {"shown": "right"})
    print(json.dumps({"row": row}))
    print(json.dumps({"done": name}), flush=True)
"""


@pytest.fixture
def fake(minutes, tmp_path, monkeypatch):
    """A walk of one step per list of cases, by the fake worker."""
    worker = tmp_path / "fake.py"
    worker.write_text(FAKE)

    def run(cases, whole=30.0, jobs=1, **options):
        monkeypatch.setenv("CASES", cases)
        step = minutes.plan.Step(name="fake", title="a step", seconds=1, dry_seconds=1, jobs=2, **options)
        file = tmp_path / "report.json"
        command = [sys.executable, str(worker)]
        report = minutes.walk.walk([step], dry=True, file=file, whole=whole, jobs=jobs, worker=command)
        assert json.loads(file.read_text()) == report
        (part,) = report["steps"]
        return {row["name"]: row for row in part["rows"]}, part, report

    return run


def test_a_kernel_that_raises_crashes_or_hangs_is_a_row_and_the_rest_goes_on(minutes, tmp_path, capfd):
    (tmp_path / "planted.py").write_text(PLANTED)
    rows: list[dict[str, Any]] = []
    pool = minutes.runner.Pool(
        [sys.executable, "-m", "bench.minutes.worker", "planted", "--dry"],
        environment=os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        jobs=2,
        deadline=time.monotonic() + 120,
        emit=rows.append,
    )
    outcome = pool.run()
    assert outcome == minutes.runner.Outcome()
    by_name = {row["name"]: row for row in rows}
    assert by_name["raises"]["failed"] == "RuntimeError: ptxas failed"
    assert by_name["segfaults"]["failed"].startswith(
        "its process was killed by SIGSEGV: Segmentation fault, planted.py"
    )
    assert by_name["hangs"]["failed"] == "no answer within 1 s: its process was killed"
    assert by_name["skips"]["skipped"] == "needs a GPU"
    assert by_name["prints"]["shown"] == "printed"
    assert [row.get("shown", row.get("failed")) for row in rows if row["name"] in ("several", "another")] == [
        "first",
        "second",
        "ValueError: third",
    ]
    assert by_name["imports"]["failed"].startswith("not installed: ")
    assert by_name["last"]["shown"] == "right"
    assert "own words" not in capfd.readouterr().out


def test_a_process_that_ends_costs_its_case_alone(fake, minutes):
    rows, part, report = fake("one exit two peer-exit leave-1 leave-2 leave-3 leave-4 leave-5 three")
    assert rows["exit"]["failed"] == "its process ended with status 1: out of luck"
    assert [rows[name]["shown"] for name in ("one", "two", "three")] == ["right"] * 3
    assert [rows[f"leave-{i}"]["failed"] for i in range(1, 6)] == ["illegal address"] * 5
    assert part["left_out"] == []
    assert [line.split(":")[1].strip() for line in minutes.tables.failures(report)] == [
        "exit",
        *(f"leave-{i}" for i in range(1, 6)),
    ]


@pytest.mark.parametrize("checks", [True, False])
def test_the_whole_limit_holds_and_names_what_was_left_out(fake, minutes, checks, capsys):
    since = time.monotonic()
    rows, part, report = fake("one sleep two three", whole=2.0, checks=checks)
    assert time.monotonic() - since < 10
    assert rows["one"]["shown"] == "right"
    assert rows["sleep"]["cut"] == "cut off at the step's limit"
    assert part["left_out"] == ["sleep", "two", "three"]
    assert minutes.tables.failures(report) == (["fake: not checked: sleep, two, three"] if checks else [])
    assert "Left out when the step's time was over: sleep, two, three." in capsys.readouterr().out


def test_a_step_that_cannot_begin_fails(fake, minutes):
    rows, _, report = fake("crash")
    assert rows["the step"]["failed"] == "could not begin: its process ended with status 1: no module named torch"
    assert len(minutes.tables.failures(report)) == 1


def test_without_a_device_the_later_steps_are_not_begun(minutes, tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("CASES", "one stop")
    steps = [minutes.plan.Step(name=name, title="a step", seconds=1) for name in ("first", "second")]
    report = minutes.walk.walk(steps, dry=False, whole=30.0, worker=[sys.executable, str(tmp_path / "fake.py")])
    assert [step["step"] for step in report["steps"]] == ["first"]
    assert minutes.tables.failures(report) == ["first: stop: no device"]


def test_several_processes_share_a_steps_cases(fake):
    rows, part, _ = fake(" ".join(f"case-{i}" for i in range(12)), jobs=2)
    assert sorted(rows) == sorted(f"case-{i}" for i in range(12))
    assert part["left_out"] == []


@pytest.mark.parametrize(("cases", "status"), [("one two", 0), ("one peer-wrong", 0), ("one wrong two", 1)])
def test_the_exit_status_is_that_of_our_checks(minutes, tmp_path, monkeypatch, capsys, cases, status):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("CASES", cases)
    monkeypatch.setattr(minutes.walk.signal, "signal", lambda *_: None)
    monkeypatch.setattr(minutes.walk, "WORKER", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(minutes.walk, "STEPS", (minutes.plan.Step(name="fake", title="a step", seconds=1),))
    monkeypatch.setattr(sys, "argv", ["minutes", "--dry", "--json", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit) as left:
        minutes.walk.main()
    assert left.value.code == status
    printed = capsys.readouterr().out
    assert '{"step": "fake", "name": "one", "shown": "right"}' in printed
    assert ("no check failed" in printed) == (status == 0)
    assert "fake: wrong: dW" in printed or status == 0


def test_later_steps_keep_all_of_their_time(minutes):
    plan = minutes.plan
    assert sum(step.seconds for step in plan.STEPS) <= plan.WHOLE <= 540
    assert sum(step.dry_seconds for step in plan.STEPS) <= plan.DRY_WHOLE
    found = plan.deadlines(plan.STEPS, 100.0, plan.WHOLE, dry=False)
    assert found[-1] == 100.0 + plan.WHOLE
    assert [later - sooner for sooner, later in pairwise(found)] == [s.seconds for s in plan.STEPS[1:]]


@pytest.mark.parametrize(("place", "said"), [(-1, "written before"), (6, "written after")])
def test_a_write_outside_a_tensor_is_found(minutes, place, said):
    with minutes.guards.Guarded() as memory:
        out = torch.empty(2, 3)
        like, new = torch.empty_like(out.T), out.new_empty(5, dtype=torch.int64)
        assert out.isnan().all()
        assert like.stride() == out.T.stride()
        assert (new == -1).all()
        given = memory.copied(torch.arange(4))
    assert given.tolist() == [0, 1, 2, 3]
    out.zero_()
    assert memory.touched() == []
    torch.as_strided(out, (1,), (1,), out.storage_offset() + place).fill_(1.0)
    assert memory.touched() == [f"{said} [2, 3] torch.float32"]


def test_what_is_no_number_is_wrong(minutes):
    assert minutes.cases.judged({"dH": math.nan, "dW": 0.5}, {"dH": 1.0, "dW": 1.0})["wrong"] == "dH beyond 1"
    assert "wrong" not in minutes.cases.judged({"dH": 0.0}, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transforms", [{}, {"bias": True, "softcap": 5.0, "logit_scale": -0.5}], ids=["plain", "all"])
def test_sliced_numbers_are_the_twins(minutes, monkeypatch, dtype, transforms):
    from tvkd_fast.ops import reference

    monkeypatch.setattr(minutes.exact, "COLUMNS", 32)
    call = minutes.exact.random_call((12, 8, 70), dtype, "cpu", **transforms)
    leaves = [x.double().requires_grad_() for x in (call.hidden, call.weight, call.bias) if x is not None]
    logps = reference.linear_logps(
        *leaves[:2], call.labels, bias=(leaves[2:] or [None])[0], softcap=call.softcap, logit_scale=call.logit_scale
    )
    grads = torch.autograd.grad(logps, leaves, call.upstream.double())
    twin = {"logps": logps.detach(), **dict(zip(("hidden", "weight", "bias"), grads, strict=False))}
    row = minutes.exact.compared(call, twin | {"frozen hidden": twin["hidden"]})
    assert "wrong" not in row
    assert all(error <= 1e-12 for error in row["errors"].values())
    for name in twin:
        broken = twin | {name: twin[name] * 1.2}
        assert minutes.exact.compared(call, broken)["wrong"].startswith(f"{name} ")
        broken[name] = twin[name].index_fill(0, torch.tensor([3]), torch.nan)
        assert math.isnan(minutes.exact.compared(call, broken)["errors"][name])


def test_a_timed_contender_has_its_times_over_the_products(minutes, monkeypatch):
    """On a CPU under a clock that counts: the figures that a GPU would fill in, for heads that need none."""
    from bench.minutes import whole
    from bench.minutes.cases import Scale

    class Counted(Scale):
        device, dtypes = "cpu", (torch.bfloat16,)

        def of(self, full, tiny):
            return tiny

        def milliseconds(self, runs, rounds):
            for run in runs.values():
                run()
            return {name: float(2**i) for i, name in enumerate(runs)}

    peak = SimpleNamespace(peak_bytes=lambda: 3 * 2**20)
    monkeypatch.setattr(whole, "GpuMeter", lambda: SimpleNamespace(start=lambda make, measure: peak))
    cases = {case.name: case for case in whole.cases(Counted(dry=False))}
    timed = {"ms": 2.0, "over_product": 2.0, "peak_mb": 3.0}
    for name, times in {
        "exact: cuBLAS in chunks": timed | {"forward_ms": 4.0},
        "frozen: cuBLAS in chunks": timed,
        "values: eager": timed,
    }.items():
        row = cases[f"24x16x97, {name}"].run()
        assert {key: value for key, value in row.items() if key not in ("errors", "limits")} == times


def test_every_dtype_meets_every_width_and_every_vocabulary_every_batch(minutes):
    from bench.minutes import numbers

    names = [case.name for case in numbers.cases(minutes.cases.Scale(dry=False))]
    shapes = {
        (tuple(name.split(", ")[0].split("x")), name.split(", ")[1]) for name in names if "x" in name.split(",")[0]
    }
    sizes = numbers.SIZES
    assert {(d, dtype) for (_, d, _), dtype in shapes} == {
        (str(d), dtype) for d in sizes["D"] for dtype in ("bf16", "fp16", "fp32")
    }
    assert {(n, v) for (n, _, v), _ in shapes} == {(str(n), str(v)) for n in sizes["N"] for v in sizes["V"]}
    assert len(set(names)) == len(names)


def test_what_pytest_wrote_is_a_row_per_file(minutes):
    output = """
[gw0] [ 10%] PASSED tests/kernels/test_head.py::test_a[x PASSED]
tests/kernels/test_head.py::test_b FAILED [ 20%]
tests/kernels/test_sparse.py::test_c SKIPPED [ 30%]
[gw1] [ 40%] PASSED tests/kernels/test_sparse.py::test_d
FAILED tests/kernels/test_head.py::test_b - AssertionError
"""
    assert minutes.suites.rows_of(output, 1) == [
        {"name": "tests/kernels/test_head.py", "passed": 1, "failed": "1 tests: test_b"},
        {"name": "tests/kernels/test_sparse.py", "passed": 1},
    ]
    died = minutes.suites.rows_of("tests/kernels/test_head.py::test_e Fatal Python error: Segmentation fault", -11)
    assert died == [{"name": "pytest", "failed": "killed by SIGSEGV at tests/kernels/test_head.py::test_e"}]
    late = minutes.suites.rows_of("tests/kernels/test_head.py::test_e ", None)
    assert late == [{"name": "pytest", "cut": "out of time, at tests/kernels/test_head.py::test_e"}]


def report():
    rows = [
        {"name": "8192x4096x128256, exact: tvkd_fast", "ms": 58.123, "over_product": 5.4, "peak_mb": 1024.4}
        | {"errors": {"logps": 1e-4, "weight": 3e-3}, "limits": {"logps": 1e-3, "weight": 4e-3}},
        {"name": "Liger", "skipped": "not installed: liger_kernel", "peer": True},
        {"name": "CCE", "wrong": "hidden nan | <1", "peer": True},
    ]
    machine = {"step": "machine", "title": "the machine", "checks": True, "left_out": [], "seconds": 3.2}
    device = {"name": "device", "shown": "H, driver 1, torch 2", "facts": {"device": "H", "driver": "1"}}
    machine["rows"] = [device, {"name": "kernels", "failed": "no link"}]
    whole = {"step": "whole", "title": "the head", "checks": False, "rows": rows, "left_out": ["TRL"], "seconds": 9.0}
    made = {"torch": "2", "commit": "c" * 40, "machine": "Linux x86_64, 4 threads, EPYC", "command": "run it"}
    return {"dry": False, "steps": [machine, whole], "made_by": made, "seconds": 13.0}


def test_the_page_of_a_report(minutes):
    text = minutes.tables.minutes_table(report())
    assert text.startswith("Failed:\n\n- machine: kernels: no link\n\n### 1. The machine\n")
    assert "| case | ms | time over one product | peak memory, MB | error over the allowed | remark |" in text
    assert "| 8192x4096x128256, exact: tvkd_fast | 58.12 | 5.40 | 1,024 | 0.75 | – |" in text
    assert "| Liger | – | – | – | – | skipped: not installed: liger_kernel |" in text
    assert "wrong: hidden nan \\| &lt;1" in text
    assert "Left out when the step's time was over: TRL." in text
    assert text.endswith("H, driver 1; 13 s; EPYC, 4 threads, [ccccccc](JSON).")
    with pytest.raises(ValueError, match="a dry walk measures nothing"):
        minutes.tables.minutes_table(report() | {"dry": True})


def test_a_page_without_a_report_says_so(minutes, monkeypatch, tmp_path):
    from bench.tables import pages

    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "gpu.md"
    page.write_text("<!-- table minutes gpu -->\nold\n<!-- end -->\n")
    assert "No GPU has run this walk yet" in pages.render(page)
    (tmp_path / "gpu.json").write_text(json.dumps(report()))
    assert "[ccccccc](../bench/results/gpu.json)" in pages.render(page)
    assert "No GPU has run" not in pages.render(page)


def make_gpu(*arguments):
    """`make gpu` with this interpreter, whatever make the tests themselves run under."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "gpu", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to walk on")
def test_without_a_gpu_make_says_how_to_name_another_interpreter():
    done = make_gpu()
    assert done.returncode != 0
    assert "make gpu PYTHON=/path/to/python names one" in done.stdout


@pytest.mark.slow
def test_the_dry_walk(tmp_path):
    file = tmp_path / "gpu.json"
    done = make_gpu("DRY=1", f"ARGS=--json {file}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A dry walk, which says nothing of a GPU" in done.stdout
    found = json.loads(file.read_text())
    steps = {step["step"]: step for step in found["steps"]}
    assert list(steps) == ["machine", "alone", "suites", "numbers", "speed", "whole", "training"]
    for step in steps.values():
        assert step["rows"]
        assert step["left_out"] == []
        # Not one time or rate: a dry walk has none.
        figures = {"ms", "forward_ms", "tflops", "gb_per_s", "host_us", "tokens_per_s", "mfu", "peak_mb"}
        assert not [row for row in step["rows"] if row.keys() & figures]
        assert not [row for row in step["rows"] if row.keys() & {"failed", "wrong", "cut"}]
    kernels = {row["name"].split(",")[0] for row in steps["alone"]["rows"]}
    assert {"head_stats", "logit_sums", "dlogits", "selection_bits", "sparse_columns", "block_exponentials"} <= kernels
    assert {"joint_stats", "joint_values", "joint_dlogits"} <= kernels
    skipped = {row["name"] for row in steps["numbers"]["rows"] if "skipped" in row}
    assert skipped == {"the same bits on two streams", "the same bits under a CUDA graph"}
    assert sum(row["passed"] for row in steps["suites"]["rows"]) > 2
