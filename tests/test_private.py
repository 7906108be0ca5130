"""Other libraries' private names are reached for in `tvkd_fast/_compat.py` alone, and each says what it stands for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPAT = Path("tvkd_fast/_compat.py")
ELSEWHERE = {
    # A subclass of TRL's trainer stands on what it overrides; setup.py holds TRL to one release for that.
    "tvkd_fast/integrations/trl.py": {
        "_fingerprint",
        "_get_cache_file_path",
        "_is_vision_dataset",
        "_tokenizer",
    },
    "tvkd_fast/integrations/trl_step.py": {"_metrics"},
    # Python's own.
    "tvkd_fast/cli/parser.py": {"_actions"},
    "tvkd_fast/distributed/watch.py": {"_current_frames"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def modules(root: Path) -> dict[Path, ast.Module]:
    files = [*(root / "kernels").glob("*.py"), *(root / "tvkd_fast").rglob("*.py")]
    ours = (file for file in files if "kernels" not in file.relative_to(root).parts[1:])
    return {file.relative_to(root): ast.parse(file.read_text()) for file in ours}


def defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
        yield from [node.attr] * (node.value.id in ("self", "cls"))


def reached(node: ast.AST) -> Iterator[str]:
    """Private names that a node takes of something else: an attribute, or a part of an import."""
    if isinstance(node, ast.Attribute) and is_private(node.attr):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from (name for name in names if is_private(name))
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))


def violations(root: Path) -> list[str]:
    parsed = modules(root)
    own = {"_compat"} | {name for tree in parsed.values() for node in ast.walk(tree) for name in defined(node)}
    return [
        f"{file}:{getattr(node, 'lineno', 0)}: {name}"
        for file, tree in parsed.items()
        if file != COMPAT
        for node in ast.walk(tree)
        for name in reached(node)
        if name not in own | ELSEWHERE.get(str(file), set())
    ]


def test_other_libraries_private_names_are_in_one_file() -> None:
    assert violations(ROOT) == []


def test_what_stands_elsewhere_is_still_reached_for() -> None:
    parsed = modules(ROOT)
    for file, names in ELSEWHERE.items():
        assert names <= {name for node in ast.walk(parsed[Path(file)]) for name in reached(node)}


@pytest.mark.parametrize(
    "code",
    ["from torch._C import x", "import torch._dynamo", "def f(model): return model._modules", "from torch import _foo"],
)
def test_a_planted_one_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "tvkd_fast" / "ops").mkdir(parents=True)
    (tmp_path / "tvkd_fast" / "ops" / "planted.py").write_text(code + "\n")
    assert len(violations(tmp_path)) == 1
