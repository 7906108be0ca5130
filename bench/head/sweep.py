"""The head's benchmark along an axis: tokens, vocabulary, or entries per token. A point is a run of `bench.head`.

    python -m bench.head.sweep tokens 512 1024 2048 4096 8192 16384 --json FILE [--data PAIRS.jsonl.gz …]
    python -m bench.head.sweep vocabulary 32768 65536 131072 262144 --shape 2048x576x49152 --json FILE
    python -m bench.head.sweep entries 100 300 1000 5000 --shape 4096x2048x128256 --json FILE

Along the tokens a line a + b·N is fitted to the seconds, and the worst point's distance from it is reported. What else
is given goes to `bench.head`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import made_by, write_report

OURS = ("sparse 2^-14", "sparse 2^-14, memory touched", "sparse 2^-16", "fused loss, exact", "exact", "values")
UNGUARDED = "sparse 2^-14, whatever the tail"
"""The contender without the guard against flat softmaxes."""
PEERS = ("eager log-softmax", "torch.compile", "CCE, torch_compile", "Liger, fused DPO")
AXES = {"tokens": (*OURS, *PEERS), "vocabulary": (*OURS, *PEERS), "entries": (*OURS[:2], UNGUARDED)}
"""Whom a sweep measures."""


def point(axis: str, value: int, shape: str, more: list[str]) -> dict[str, Any]:
    n, d, v = shape.split("x")
    shape = {"tokens": f"{value}x{d}x{v}", "vocabulary": f"{n}x{d}x{value}"}.get(axis, shape)
    if axis == "entries":
        more = [*more, "--entries", str(value)]
    names = [word for name in AXES[axis] for word in ("--only", name)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "point.json"
        command = [sys.executable, "-m", "bench.head", "--shape", shape, *names, *more, "--json", str(file)]
        subprocess.run(command, check=True)
        report = json.loads(file.read_text())
    return {"value": value} | {key: report[key] for key in ("shape", "states", "results", "entries", "made_by")}


def fit(x: list[float], seconds: list[float]) -> dict[str, float]:
    """a + b·x by least squares of relative errors: the small points count as the large ones do."""
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    design = torch.stack([torch.ones_like(xs), xs], 1) / ys[:, None]
    a, b = torch.linalg.lstsq(design, torch.ones_like(ys)[:, None]).solution[:, 0].tolist()
    worst = float(((a + b * xs) / ys - 1).abs().max())
    return {"a": a, "b": b, "worst": worst}


def fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the fits by contender, for those that every point has."""
    found = {}
    for name in (row["name"] for row in points[0]["results"]):
        rows: list[dict[str, Any]] = [next((row for row in x["results"] if row["name"] == name), {}) for x in points]
        if all("seconds" in row for row in rows):
            found[name] = fit([x["value"] for x in points], [row["seconds"] for row in rows])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", choices=AXES)
    parser.add_argument("values", type=int, nargs="+")
    parser.add_argument("--shape", default="4096x576x49152", help="tokens x hidden x vocabulary, of what stands still")
    parser.add_argument("--json", type=Path)
    arguments, more = parser.parse_known_args()
    points = []
    for value in arguments.values:
        points.append(point(arguments.axis, value, arguments.shape, more))
        if arguments.axis == "entries":
            # The product is the same one, and its seven tilings take longer than what is measured.
            more = [*more, "--tiling", "x".join(map(str, points[0]["results"][0]["tiling"]))]
    report: dict[str, Any] = {"axis": arguments.axis, "points": points}
    if arguments.axis == "tokens":
        report["fits"] = fits(points)
        print(json.dumps(report["fits"], indent=1))
    report["made_by"] = made_by()
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
