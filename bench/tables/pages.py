"""Tables of README.md and docs/ from the JSON that the measuring commands wrote.

python -m bench.tables add NAME REPORT.json    keep a report as bench/results/NAME.json
python -m bench.tables write                   write every table anew between its markers
python -m bench.tables check                   fail where a table differs from its JSON
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.machine import without_paths
from bench.tables import caches, gradients, head, kernels, learning, minutes, runs, step
from bench.tables.markdown import JSON_LINK

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "benchmarks",
            "divergences",
            "evidence",
            "faq",
            "gpu",
            "kernels",
            "numerics",
            "objectives",
            "reliability",
            "results",
            "scaling",
            "sparse",
        )
    ),
)
BLOCK = re.compile(r"(<!-- table (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


TABLES = {
    "census": kernels.census_table,
    "epilogues": kernels.epilogues_table,
    "model": kernels.model_table,
    "goals": kernels.goals_table,
    "rejected": kernels.rejected_table,
    "demo": runs.demo_table,
    "shaping": runs.shaping_table,
    "head": head.head_table,
    "heads": head.heads_table,
    "values": head.values_table,
    "divergences": head.divergences_table,
    "sweep": head.sweep_table,
    "step": step.step_table,
    "lengths": step.lengths_table,
    "profile": step.profile_table,
    "teacher": step.teacher_table,
    "learning": gradients.learning_table,
    "training": gradients.training_table,
    "screen": learning.screen_table,
    "pairs": learning.data_table,
    "finals": learning.finals_table,
    "scaling": runs.scaling_table,
    "soak": runs.soak_table,
    "overhead": runs.overhead_table,
    "selection": runs.selection_table,
    "compat": runs.compat_table,
    "planned": runs.planned_table,
    "variants": head.variants_table,
    "dense_columns": head.dense_columns_table,
    "gpu": kernels.gpu_table,
    "minutes": minutes.minutes_table,
    "numerics": kernels.numerics_table,
    "caches": caches.caches_table,
}

PENDING = {"minutes": minutes.NOT_YET}
"""What stands in place of a table that no machine has measured yet, by the table's name."""

KEPT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "census": kernels.census_kept,
    "learning_value": learning.study_kept,
}
"""The parts of large reports that are kept: all that a table or a picture is made of."""


def render(page: Path) -> str:
    """The page's text with every table made from its JSON."""
    to_root = "" if page.name == "README.md" else "../"

    def block(found: re.Match[str]) -> str:
        file = RESULTS / f"{found[3]}.json"
        if found[2] in PENDING and not file.exists():
            return f"{found[1]}{PENDING[found[2]]}\n{found[4]}"
        table = TABLES[found[2]](json.loads(file.read_text()))
        table = table.replace(f"]({JSON_LINK})", f"]({to_root}bench/results/{found[3]}.json)")
        return f"{found[1]}{table}\n{found[4]}"

    return BLOCK.sub(block, page.read_text())


def stale() -> list[str]:
    """Pages whose tables differ from their JSON."""
    return [page.name for page in PAGES if render(page) != page.read_text()]


def add(name: str, report: Path) -> None:
    """Keep a report and the picture beside it, without paths of the machine."""
    RESULTS.mkdir(exist_ok=True)
    kept = KEPT.get(name, dict)(json.loads(report.read_text()))
    (RESULTS / f"{name}.json").write_text(without_paths(by_lines(kept)))
    for picture in (report.with_name("curves.png"), report.with_suffix(".png")):
        if picture.exists():
            shutil.copy(picture, PICTURES / f"{name}.png")


def by_lines(report: dict[str, Any]) -> str:
    """JSON with an item of a list a line, so that a change of one is a change of one line."""
    parts = []
    for name, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n ]"
        parts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    match sys.argv[1:]:
        case ["add", name, report]:
            add(name, Path(report))
        case ["write"]:
            for page in PAGES:
                page.write_text(render(page))
        case ["check"]:
            if stale():
                raise SystemExit(f"tables are stale in {', '.join(stale())}: run python -m bench.tables write")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
