"""Whole steps by length at a fixed number of tokens: pairs a second and peak memory, ours and TRL's.

    python -m bench.step.lengths 512 1024 2048 4096 8192 --layers 4 --data PAIRS.jsonl.gz --json FILE

Pairs of one length are cut from the data's running text, half of each its prompt, and a step has as many as the longest
length has tokens for: packed rows of one and a half times the longest length. With `--alike` a micro-batch of ours has
one pair, as TRL's has under `--trl_batches 1`: memory is compared at the same pairs in a micro-batch. A point is a run
of `bench.step`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness.machine import made_by, write_report


def point(length: int, longest: int, steps: int, more: list[str], *, alike: bool) -> dict[str, Any]:
    pairs = longest // length
    row = 3 * ((length if alike else longest) // 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "point.json"
        command = [sys.executable, "-m", "bench.step", "--made_length", str(length), "--pairs", str(steps * pairs)]
        command += ["--pairs_per_step", str(pairs), "--tokens_per_micro_batch", str(row), *more]
        subprocess.run([*command, "--json", str(file)], check=True)
        return {"length": length} | json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=int, nargs="+", help="divisors of the longest")
    parser.add_argument("--steps", type=int, default=3, help="the first is no part of the figures")
    parser.add_argument("--alike", action="store_true", help="one pair in a micro-batch of ours; give --trl_batches 1")
    parser.add_argument("--json", type=Path)
    arguments, more = parser.parse_known_args()
    longest = max(arguments.lengths)
    alike = arguments.alike
    points = [point(length, longest, arguments.steps, more, alike=alike) for length in arguments.lengths]
    write_report({"alike": alike, "points": points, "made_by": made_by()}, arguments.json)


if __name__ == "__main__":
    main()
