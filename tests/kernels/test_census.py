"""The gates that every shipped binary passes, and for each gate a mutant that it stops.

The kernels are compiled in processes of their own: those of this one may be the interpreter's.
"""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the census compiles with Triton, which is not installed")

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

MUTANTS = {
    "a tile that the registers do not hold": (
        'build("head_stats", "logps", "bf16", "sm_90", config=TileConfig(128, 256, 64, warps=4, stages=3, bulk=True))',
        ["bytes of stack", "spills"],
    ),
    "a pipeline that shared memory does not hold": (
        'build("product", "dH, sum", "bf16", "sm_90", config=TileConfig(128, 128, 64, warps=8, stages=8, bulk=True))',
        ["KiB of shared memory, over 227"],
    ),
    "the same on a consumer's GPU": (
        'build("product", "dH, sum", "bf16", "sm_86", config=TileConfig(128, 128, 64, warps=8, stages=5))',
        ["KiB of shared memory, over 99"],
    ),
    "float32 products outside the tensor cores": (
        'build("product", "dH, sum", "fp32", "sm_80", config=TileConfig(64, 64, 16, warps=8, stages=2), '
        'switches={"PRECISION": "ieee"})',
        ["a product without tensor cores"],
    ),
    "operands whose alignment the compiler is not told": (
        'build("product", "dH, sum", "bf16", "sm_80", config=TileConfig(64, 64, 32, warps=8, stages=2), '
        "hide_alignment=True)",
        ["narrow and 0 16-byte loads in the main loop"],
    ),
}

PROGRAM = """
import json
from dataclasses import replace
from bench import census
from tvkd_fast.kernels.configs import TileConfig

def build(kernel, variant, dtype, target, config, switches={}, hide_alignment=False):
    for build in census.builds((target,)):
        if (build.kernel, build.variant, build.dtype) == (kernel, variant, dtype):
            mutant = replace(build, config=config, switches=build.switches | switches, aligned=not hide_alignment)
            # The gate must see the mutant as the shipped build that it stands for.
            return census.broken_gates(build, census.compiled(mutant))
    raise LookupError(kernel, variant, dtype, target)

print(json.dumps(EXPRESSION))
"""


def compiling(*command: str) -> str:
    """What a Python process prints that compiles kernels and does not interpret them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_binary_holds_every_gate(target: str, tmp_path: Path) -> None:
    compiling("-m", "bench.census", "--check", "--target", target, "--json", str(tmp_path / "census.json"))
    rows = json.loads((tmp_path / "census.json").read_text())["rows"]
    assert len(rows) > 50
    for row in rows:
        facts = row["facts"]
        assert row["broken"] == []
        assert facts["stack"] == facts["spills"] == 0
        assert facts["length"] > 100
        if row["build"]["config"] is not None:
            assert sum(facts["tensor"].values()) > 0
            assert facts["registers"] > 32


@cache
def broken_by(expression: str) -> list[str]:
    found: list[str] = json.loads(compiling("-c", PROGRAM.replace("EXPRESSION", expression)).splitlines()[-1])
    return found


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_stopped(mutant: str) -> None:
    expression, gates = MUTANTS[mutant]
    broken = broken_by(expression)
    for gate in gates:
        assert any(gate in problem for problem in broken), broken


def products_without_precision(source: str) -> list[int]:
    """Lines of `tl.dot` calls that leave the precision of float32 to Triton's default, which is TF32."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "dot":
            given: dict[str | None, Any] = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get("input_precision")
            if not (isinstance(value, ast.Name) and value.id == "PRECISION"):
                found.append(node.lineno)
    return found


def test_every_product_says_its_precision() -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert sum(file.read_text().count("tl.dot(") for file in files) >= 4
    assert {file.name: lines for file in files if (lines := products_without_precision(file.read_text()))} == {}


def test_a_product_that_does_not_is_found() -> None:
    assert products_without_precision("c = tl.dot(a, b, c)") == [1]
    assert products_without_precision("c = tl.dot(a, b, c, input_precision='tf32')") == [1]
    assert products_without_precision("c = tl.dot(a, b, c, input_precision=PRECISION)") == []


def test_the_precision_of_float32() -> None:
    import torch

    from tvkd_fast.kernels.configs import TARGETS as FAMILIES
    from tvkd_fast.kernels.configs import precision

    for family in FAMILIES:
        assert precision(torch.float32, family) == ("ieee" if family == "gfx942" else "tf32x3")
        assert precision(torch.bfloat16, family) == "ieee"


def test_what_was_rejected_breaks_a_gate() -> None:
    program = "from bench import census; print([census.row(x).broken for x in census.rejected()])"
    broken = ast.literal_eval(compiling("-c", program).splitlines()[-1])
    assert len(broken) >= 10
    assert all(broken)
