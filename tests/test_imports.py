"""The imports that each layer of the package may make: every import statement is checked against the table below."""

from pathlib import Path

import pytest

from bench.architecture.imports import (
    FOR_EVERYBODY,
    LAYERS,
    MAY_IMPORT,
    PACKAGE,
    ROOT,
    imports,
    layer_of,
    module_of,
    python_files,
)

NEVER_IMPORTED = {"kernels", "bench", "tests"}
"""Folders of the project that are no packages of their own, though a working directory makes them look so."""


def violations(root: Path) -> list[str]:
    """Return the package's imports and files that break the rules, one line each."""
    package = root / PACKAGE
    found = [
        f"{file.relative_to(root)}:{line}: {problem}"
        for file in sorted(python_files(package))
        for line, target in imports(file, package)
        if (problem := forbidden(layer_of(module_of(file, package)), target))
    ]
    found += [f"{file.relative_to(root)}: name the file by what is in it" for file in named(package, "utils.py")]
    found += [
        f"{file.relative_to(root)}: kernels has no __init__.py" for file in named(package / "kernels", "__init__.py")
    ]
    return found


def named(folder: Path, name: str) -> list[Path]:
    return [file for file in python_files(folder) if file.name == name]


def forbidden(layer: str, target: str) -> str | None:
    """Return why a file of a layer must not import a module, or None where it may."""
    top = target.split(".")[0]
    if top in NEVER_IMPORTED:
        return f"imports the top-level {top}"
    if top != PACKAGE:
        return None
    if layer not in MAY_IMPORT and layer not in FOR_EVERYBODY:
        return f"{layer} is no layer: give it its place in LAYERS"
    imported = layer_of(target)
    if imported in {layer} | MAY_IMPORT.get(layer, set()) | FOR_EVERYBODY:
        return None
    return f"{layer} imports {imported}"


def planted(root: Path, file: str, code: str) -> list[str]:
    """The violations of a small package in which one file holds the given code."""
    for layer in (*LAYERS, "integrations"):
        (root / PACKAGE / layer).mkdir(parents=True)
    for name in FOR_EVERYBODY:
        (root / PACKAGE / f"{name}.py").touch()
    (root / PACKAGE / file).parent.mkdir(parents=True, exist_ok=True)
    (root / PACKAGE / file).write_text(code)
    return violations(root)


def test_imports_only_go_down() -> None:
    assert not violations(ROOT)


def test_the_kernels_live_at_the_top_and_are_linked_into_the_package() -> None:
    link = ROOT / PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.resolve() == (ROOT / "kernels").resolve()


def test_no_attic_outside_the_package_either() -> None:
    assert not [file for folder in ("bench", "tests") for file in named(ROOT / folder, "utils.py")]


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("ops/a.py", "import tvkd_fast.losses", "ops imports losses"),
        ("ops/a.py", "from tvkd_fast.models import loading", "ops imports models"),
        ("ops/a.py", "from ..models import loading", "ops imports models"),
        ("ops/a.py", "from .. import training", "ops imports training"),
        ("ops/a.py", "from tvkd_fast import linear_logps", "ops imports __init__"),
        ("ops/__init__.py", "from ..data import formats", "ops imports data"),
        ("ops/deep/a.py", "from ...data import formats", "ops imports data"),
        ("ops/a.py", "def f():\n    import tvkd_fast.training.step", "ops imports training"),
        ("losses/a.py", "from tvkd_fast.ops import linear_logps", "losses imports ops"),
        ("models/a.py", "from tvkd_fast.data import formats", "models imports data"),
        ("data/a.py", "from tvkd_fast.models import loading", "data imports models"),
        ("models/a.py", "from tvkd_fast.distributed import mesh", "models imports distributed"),
        ("distributed/a.py", "from tvkd_fast.data import formats", "distributed imports data"),
        ("training/a.py", "from tvkd_fast import cli", "training imports cli"),
        ("training/a.py", "from tvkd_fast.commands import models", "training imports commands"),
        ("training/a.py", "from tvkd_fast.planning import footprint", "training imports planning"),
        ("evaluation/a.py", "from tvkd_fast.training.step import train_step", "evaluation imports training"),
        ("objectives/a.py", "from tvkd_fast.evaluation import evaluate", "objectives imports evaluation"),
        ("scoring/a.py", "from tvkd_fast.objectives import Need", "scoring imports objectives"),
        ("data/a.py", "from tvkd_fast.scoring import Scores", "data imports scoring"),
        ("synthetic/a.py", "from tvkd_fast.data import formats", "synthetic imports data"),
        ("files.py", "from tvkd_fast.data import formats", "files imports data"),
        ("training/a.py", "from tvkd_fast.integrations import trl", "training imports integrations"),
        ("cli/a.py", "import tvkd_fast.integrations", "cli imports integrations"),
        ("integrations/a.py", "from tvkd_fast.training import step", "integrations imports training"),
        ("kernels/a.py", "from tvkd_fast.ops import checks", "kernels imports ops"),
        ("kernels/a.py", "from ..ops import checks", "kernels imports ops"),
        ("fused/a.py", "from tvkd_fast.models import loading", "fused imports models"),
        ("losses/a.py", "from tvkd_fast.fused import fused_linear_tvkd_loss", "losses imports fused"),
        ("__init__.py", "from tvkd_fast.training import step", "__init__ imports training"),
        ("__init__.py", "from .training import step", "__init__ imports training"),
        ("ops/a.py", "from kernels import lse", "imports the top-level kernels"),
        ("training/a.py", "import bench.census", "imports the top-level bench"),
        ("training/a.py", "from tests import conftest", "imports the top-level tests"),
        ("attic/a.py", "from tvkd_fast.ops import checks", "attic is no layer"),
        ("ops/utils.py", "", "name the file by what is in it"),
        ("kernels/__init__.py", "", "kernels has no __init__.py"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, code: str, problem: str) -> None:
    (found,) = planted(tmp_path, file, code)
    assert found.startswith(f"tvkd_fast/{file}:")
    assert problem in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "ops/a.py",
            "import torch\nfrom . import checks\nfrom ..kernels import lse\nfrom tvkd_fast.kernels.lse import f",
        ),
        ("kernels/a.py", "import triton\nfrom . import lse\nfrom tvkd_fast.kernels import lse"),
        ("losses/a.py", "from .segments import segment_sums"),
        ("distributed/a.py", "from tvkd_fast.models import loading"),
        ("training/a.py", "from .. import ops, losses, data, models, distributed\nfrom ..version import __version__"),
        ("cli/a.py", "from ..training import trainer\nfrom .. import data\nfrom tvkd_fast.version import __version__"),
        ("scoring/a.py", "from tvkd_fast.files import written\nfrom tvkd_fast import ranges"),
        ("integrations/a.py", "from tvkd_fast import models, losses\nfrom ..ops import linear_logps"),
        ("fused/a.py", "from . import op\nfrom ..ops import linear_logps\nfrom ..losses import tvkd_loss"),
        ("fused/a.py", "from tvkd_fast.fused.padded import rows_of\nfrom tvkd_fast.kernels.records import Head"),
        ("__init__.py", "from .ops import linear_logps\nfrom tvkd_fast.losses import tvkd_loss\nfrom . import fused"),
    ],
)
def test_imports_that_go_down_are_let_through(tmp_path: Path, file: str, code: str) -> None:
    assert planted(tmp_path, file, code) == []
