"""The model of the head's time on GPUs that nobody has run it on: ours beside its peers, by the same rules.

    python -m bench.roofline [--json FILE]

Instructions behind a tile's product are those of bench/results/census.json. `bench/roofline/model.py` says what is
counted and what is assumed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.census.epilogue import plain_rows
from bench.harness.machine import made_by, write_report
from bench.roofline.model import ASSUMPTIONS, Estimate, estimates

CENSUS = Path(__file__).resolve().parents[1] / "results" / "census.json"


def epilogues(census: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Instructions behind a tile's product in bf16, by kernel and target."""
    return {(row["build"]["kernel"], row["build"]["target"]): row["facts"]["epilogue"] for row in plain_rows(census)}


def text(found: list[Estimate]) -> str:
    lines = ["A model, not a measurement: " + "; ".join(ASSUMPTIONS) + "."]
    lines.append(
        f"{'shape':<18}{'chip':<10}{'algorithm':<37}{'products':>9}{'forward':>9}{'backward':>9}{'/product':>9}"
    )
    for x in found:
        shape = "x".join(map(str, x.shape))
        lines.append(
            f"{shape:<18}{x.chip:<10}{x.algorithm:<37}{x.products:>9.1f}{x.forward_ms:>6.2f} ms{x.backward_ms:>6.2f} ms"
            f"{x.over_product:>9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = estimates(epilogues(json.loads(CENSUS.read_text())))
    print(text(found))
    report = {"estimates": [asdict(x) for x in found], "assumptions": ASSUMPTIONS, "made_by": made_by()}
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
