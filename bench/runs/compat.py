"""The first tier of tests under the versions that are installed: one row of a report that keeps a row per versions.

    python -m bench.runs.compat --json FILE [PYTEST'S ARGUMENTS]
    python -m bench.runs.compat --json FILE --junit A.xml B.xml

`make compat TORCH=2.11.0 TRITON=3.6.0 TRANSFORMERS=5.24.0` makes an environment of these and runs it there. It ends
with 1 where a test failed. Where pytest is run in pieces, each with `--junitxml`, `--junit` makes one row of all their
reports; of a test that was run twice the later report counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.harness.machine import made_by, versions, write_report

NAMES = ("torch", "triton", "transformers", "trl", "peft", "numpy")
SHOWN = 20
"""Failures that a row names."""
REFUSALS = ("The version of PEFT you are using is not compatible",)
"""What one library says of another's version: no fault of ours, and counted apart."""


def counted(*junit: str) -> dict[str, Any]:
    """Tests that passed, failed, were skipped, or ended where a library refuses another, of pytest's XML; and the names
    of those that failed. Of reports of the same test the last one counts."""
    found_cases = [case for report in junit for case in ElementTree.fromstring(report).iter("testcase")]
    cases = list({(case.get("classname"), case.get("name")): case for case in found_cases}.values())
    ended = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    refused = [case for case in ended if any(refusal in "".join(case.itertext()) for refusal in REFUSALS)]
    failed = [case for case in ended if case not in refused]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname', '')}::{case.get('name', '')}" for case in failed]
    found = {"passed": len(cases) - len(ended) - skipped, "failed": len(failed), "skipped": skipped}
    return found | {"refused": len(refused), "failures": names[:SHOWN]}


def added(report: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The report with a row in place of the one of the same versions; the newest torch last."""
    rows = [other for other in report.get("rows", []) if other["versions"] != row["versions"]] + [row]
    order = [[int(x) for x in str(r["versions"]["torch"]).split("+")[0].split(".")] for r in rows]
    return {"rows": [r for _, r in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]}


def run(pytest: list[str]) -> tuple[dict[str, Any], int]:
    """What the tests say, and pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={junit}", *pytest]
        status = subprocess.run(command, check=False).returncode
        if not junit.exists():
            raise SystemExit(f"pytest ended with {status} and left no report: look at what it printed")
        return counted(junit.read_text()), status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--junit", type=Path, nargs="+", help="reports of pytest, which was run in pieces")
    arguments, pytest = parser.parse_known_args()
    if arguments.junit is not None:
        found = counted(*(file.read_text() for file in arguments.junit))
        status = int(found["failed"] > 0)
    else:
        found, status = run(pytest)
    row = {"versions": versions(*NAMES), **found, "made_by": made_by()}
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    write_report(added(report, row), arguments.json)
    numbers = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped", "refused"))
    print(f"{numbers}: {row['versions']}")
    # Status 1 is of failures, which are counted here; any other says that the tests did not run to their end.
    raise SystemExit(int(found["failed"] > 0) if status == 1 else status)


if __name__ == "__main__":
    main()
