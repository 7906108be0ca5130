"""The imports among the benchmarks: the harness imports none of them."""

import ast
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
MAY_IMPORT = {
    "architecture": set(),
    "harness": set(),
    "tables": {"harness", "census"},
    "census": {"harness"},
    "roofline": {"harness", "census"},
    "head": {"harness"},
    "divergence": {"harness", "head"},
    "gpu": {"harness", "head"},
    "minutes": {"harness", "head", "divergence", "gpu", "step", "tables"},
    "step": {"harness", "head"},
    "rollout": {"harness"},
    "runs": {"harness"},
    "learning": {"harness", "head", "tables"},
}


def imported(file: Path) -> set[str]:
    """Folders of bench that a file imports from."""
    nodes = ast.walk(ast.parse(file.read_text()))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[1] for module in modules if module.startswith("bench.")}


def test_the_harness_knows_no_benchmark() -> None:
    folders = {file.parent.name for file in BENCH.glob("*/*.py")}
    assert folders == set(MAY_IMPORT)
    for folder, below in MAY_IMPORT.items():
        for file in (BENCH / folder).rglob("*.py"):
            assert imported(file) <= below | {folder}, file.name
