"""The first ten minutes on a GPU: is every kernel right, how fast is each, and what does a whole step take.

    make gpu           on a machine with a GPU; leaves bench/results/gpu.json, of which docs/gpu.md is made
    make gpu DRY=1     the same walk on a CPU, in Triton's interpreter, with tiny shapes and without times

Seven steps, from the tree as it is, with whatever torch from 2.11 on there is, and without a network. Each step's cases
run in processes of their own, which may crash or hang: that costs the case and no other. A line of JSON is printed as
each case ends, the tables after each step, and what failed at the end. The exit status is 1 where a check failed or was
not made; what a peer refuses, and times that were not taken, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.machine import command, write_report
from bench.minutes.plan import DRY_WHOLE, STEPS, WHOLE, Step, deadlines
from bench.minutes.runner import ROOT, Pool
from bench.tables.minutes import failures, steps_text

REPORT = ROOT / "out" / "gpu.json"
WORKER = (sys.executable, "-m", "bench.minutes.worker")
TF32 = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
"""Variables that override what torch says of float32 products."""
Report = dict[str, Any]


def walk(
    steps: Sequence[Step],
    *,
    dry: bool,
    file: Path | None = None,
    whole: float | None = None,
    jobs: int = 1,
    worker: Sequence[str],
) -> Report:
    """The report of all steps, written anew to `file` as each row comes.

    Args:
        whole: seconds that the walk may take, its plan's where None.
        jobs: processes at once, in steps that take more than one.
        worker: the command of a process, to which the module of its step is added.
    """
    begin = time.monotonic()
    report: Report = {"dry": dry, "steps": [], "made_by": {"command": command()}}
    whole = whole if whole is not None else DRY_WHOLE if dry else WHOLE
    for step, deadline in zip(steps, deadlines(steps, begin, whole, dry=dry), strict=True):
        part: dict[str, Any] = {"step": step.name, "title": step.title, "checks": step.checks, "rows": []}
        report["steps"].append(part)

        def emit(row: dict[str, Any], part: dict[str, Any] = part) -> None:
            part["rows"].append(row)
            print(json.dumps({"step": part["step"]} | row), flush=True)
            report["made_by"] |= row.get("provenance", {})
            write_report(report, file)

        since = time.monotonic()
        pool = Pool(
            [*worker, step.path, *(["--dry"] if dry else [])],
            environment=environment(dry),
            jobs=min(step.jobs, jobs),
            deadline=deadline,
            emit=emit,
        )
        outcome = pool.run()
        part |= {"seconds": round(time.monotonic() - since, 1), "left_out": outcome.cut + outcome.left_out}
        write_report(report, file)
        print(steps_text(report), flush=True)
        if any(row.get("stops") for row in part["rows"]):
            break
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_report(report, file)
    return report


def environment(dry: bool) -> dict[str, str]:
    """The workers' environment: Triton's interpreter, no GPU and one thread each where dry; else the compiler.

    Some images let float32 products of torch be TF32's: limits that are a multiple of their error would let all pass.
    """
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", *TF32)}
    if dry:
        return own | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return own


def processes() -> int:
    """How many workers this machine's cores serve, one left for the walk itself."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.minutes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, tiny and without times")
    parser.add_argument("--json", type=Path, default=REPORT, help="the report (default: out/gpu.json)")
    parser.add_argument("--step", action="append", choices=[step.name for step in STEPS], help="this step alone")
    arguments = parser.parse_args()
    # An impatient machine ends a command by SIGTERM: the processes must not outlive the walk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    steps = [step for step in STEPS if arguments.step is None or step.name in arguments.step]
    jobs = 2 if arguments.dry else processes()
    report = walk(steps, dry=arguments.dry, file=arguments.json, jobs=jobs, worker=WORKER)
    failed = failures(report)
    verdict = f"{len(failed)} failed:\n" + "\n".join(failed) if failed else "no check failed"
    kind = "A dry walk, which says nothing of a GPU" if arguments.dry else "The walk"
    print(f"{kind}: {report['seconds']:.0f} s, {verdict}")
    print(f"Its report is {arguments.json}.")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
