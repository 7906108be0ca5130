"""Step 3: the kernels' own tests, compiled; without the census, whose gates are of one Triton, and without -x.

One pytest takes all files where xdist spreads them over processes: a crash there loses one test. Without xdist each
file has a pytest of its own, and a crash loses the rest of the file.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from bench.minutes.cases import Case, NotTriedError, Row, Scale

ROOT = Path(__file__).parents[2]
FILES = tuple(f"tests/kernels/test_{name}.py" for name in ("head", "sparse", "fused", "preference_epilogue"))
DRY = (
    "test_head.py::test_nor_is_its_gradient_a_number",
    "test_sparse.py::test_tiles_are_whole_words",
    "test_preference_epilogue.py::test_psi_without_discount_is_a_difference_of_two_states",
)
NEEDED = ("pytest", "hypothesis", "transformers", "tokenizers")
"""Modules that the tests import."""
PROCESSES = 12
LIMIT, DRY_LIMIT = 105.0, 50.0
"""Seconds; what is still running then is ended and counted as not run."""
RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"(tests/\S+\.py)::(\S+)")


def cases(scale: Scale) -> list[Case]:
    limit = scale.of(LIMIT, DRY_LIMIT)
    until = time.monotonic() + limit
    groups = {"tests/kernels": [f"tests/kernels/{one}" for one in DRY] if scale.dry else [*FILES]}
    if not scale.dry and find_spec("xdist") is None:
        groups = {name: [name] for name in FILES}
    return [
        Case(name=name, run=partial(suite, scale, chosen, until), limit=limit + 10) for name, chosen in groups.items()
    ]


def suite(scale: Scale, chosen: Sequence[str], until: float) -> list[Row]:
    """A row per file, and one of pytest itself where it did not come to its end."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise NotTriedError(
            f"the tests import {', '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *chosen]
    if not scale.dry:
        command += ["-m", "gpu and not census"]
    if not scale.dry and find_spec("xdist") is not None:
        command += ["-n", str(min(PROCESSES, max(1, len(os.sched_getaffinity(0)) - 1)))]
    # A file and not a pipe: a process of xdist's that hangs would hold a pipe open for good.
    with TemporaryFile("w+") as log:
        running = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            status: int | None = running.wait(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            running.kill()
            status = None
        log.seek(0)
        return rows_of(log.read(), status)


def rows_of(output: str, status: int | None) -> list[Row]:
    """Rows of what `pytest -v` wrote until it ended with a status, None where it was out of time."""
    counts: dict[str, Counter[str]] = {}
    failing: dict[str, list[str]] = {}
    last, begun = "", "the start"
    for line in output.splitlines():
        last = line.strip() or last
        test, result = TEST.search(line), RESULT.search(line)
        if test is None:
            continue
        begun = test[0]
        # The summary at the end names failures again, with the result in front and the reason behind.
        if result is None or line.startswith(("FAILED", "ERROR", "SKIPPED")):
            continue
        counts.setdefault(test[1], Counter())[result[1]] += 1
        if result[1] in ("FAILED", "ERROR"):
            failing.setdefault(test[1], []).append(test[2])
    rows: list[Row] = [{"name": file, "passed": count["PASSED"]} for file, count in counts.items()]
    for row in rows:
        if names := failing.get(row["name"]):
            row["failed"] = f"{len(names)} tests: {', '.join(names)}"
    if status is None:
        rows.append({"name": "pytest", "cut": f"out of time, at {begun}"})
    elif status not in (0, 1):
        how = f"killed by {signal.Signals(-status).name} at {begun}" if status < 0 else f"status {status}: {last}"
        rows.append({"name": "pytest", "failed": how[:300]})
    return rows
