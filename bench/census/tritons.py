"""The binaries nearest to a spill, compiled under the Triton that is installed: one row of a report, a row per Triton.

    python -m bench.census.tritons --json FILE     exit 1 where a binary breaks a gate

Nearest are those that took most registers in the census of bench/results, which is of one Triton. Another compiler
allots registers otherwise, and these are the first that it would spill. The whole census is `python -m bench.census`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

from bench.census.binaries import PRODUCTS, TARGETS, Build, Row, builds, row, table
from bench.harness.machine import made_by, write_report
from tvkd_fast.kernels.configs import OLDER
from tvkd_fast.kernels.releases import RELEASE

CENSUS = Path(__file__).parents[1] / "results" / "census.json"
LEAST = 240
"""Registers of 255."""
NOT_LAUNCHED = ("all sums", "logps and both sums")
"""Variants that no op asks for, which the census builds for who calls the kernels."""


def nearest(census: dict[str, Any], least: int) -> Iterator[Build]:
    """Builds with a product that ops launch and that took so many registers, on targets whose threads have 255; and
    those of kernels with tiles of their own under the installed Triton."""
    kept = {identity(entry["build"]): entry["facts"]["registers"] for entry in census["rows"]}
    own = {(x.kernel, x.target) for x in OLDER.get(RELEASE, ())}
    for build in builds():
        if build.kernel not in PRODUCTS or build.target.startswith("gfx") or build.variant.startswith(NOT_LAUNCHED):
            continue
        near = kept[identity(vars(build))] >= least
        if near or ((build.kernel, TARGETS[build.target][0]) in own and build.dtype != "fp16"):
            yield build


def identity(build: dict[str, Any]) -> tuple[str, ...]:
    return tuple(build[name] for name in ("kernel", "variant", "dtype", "target"))


def added(report: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The report with a row in place of the one of the same Triton; the newest last."""
    rows = [other for other in report.get("rows", []) if other["triton"] != found["triton"]] + [found]
    return {"rows": sorted(rows, key=lambda x: [int(part) for part in x["triton"].split(".")])}


def summary(rows: list[Row], least: int) -> dict[str, Any]:
    broken = [f"{x.build.name}: {', '.join(x.broken)}" for x in rows if x.broken]
    return {"triton": triton.__version__, "least": least, "binaries": len(rows), "broken": broken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--least", type=int, default=LEAST, help="registers that a binary must have taken")
    arguments = parser.parse_args()
    chosen = list(nearest(json.loads(CENSUS.read_text()), arguments.least))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row, chosen, chunksize=4))
    found = summary(rows, arguments.least)
    print(table([x for x in rows if x.broken]))
    print(f"Triton {triton.__version__}: {len(rows)} binaries, {len(found['broken'])} with a broken gate")
    if arguments.json is not None:
        report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        write_report(added(report, found | {"made_by": made_by()}), arguments.json)
    raise SystemExit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
