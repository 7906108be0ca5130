"""The layers of the package, and every import statement between them, read from the source."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "tvkd_fast"

LAYERS = (
    "cli",
    "commands",
    "planning",
    "training",
    "evaluation",
    "rollout",
    "objectives",
    "scoring",
    "distributed",
    "models",
    "data",
    "synthetic",
    "fused",
    "ops",
    "losses",
    "kernels",
)
"""The layers from the top: each may import those below it, but for `APART`."""
APART: dict[str, set[str]] = {
    "kernels": set(),
    "losses": set(),
    "ops": {"kernels"},
    "fused": {"ops", "losses", "kernels"},
    "synthetic": set(),
    "data": {"synthetic"},
    "models": {"ops", "kernels"},
    "distributed": {"models", "ops", "kernels"},
    "integrations": {"ops", "losses", "models", "data", "scoring", "objectives"},
    "__init__": {"fused", "ops", "losses"},
    "__main__": {"cli"},
}
"""The imports of a layer that may not import all below it, and of files that are no layer."""
MAY_IMPORT: dict[str, set[str]] = {layer: set(LAYERS[i + 1 :]) for i, layer in enumerate(LAYERS)} | APART
FOR_EVERYBODY = {"version", "_compat", "files", "ranges", "transfer"}
"""Single files at the top of the package, which import none of its layers."""


def python_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent) / name for name in names if name.endswith(".py"))


def module_of(file: Path, package: Path) -> str:
    return ".".join((PACKAGE, *file.relative_to(package).with_suffix("").parts))


def imports(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """The modules that a file imports, by absolute name, with their lines; a relative import is resolved."""
    parents = module_of(file, package).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, full_name(origin, alias.name, package)) for alias in node.names)


def full_name(origin: str, name: str, package: Path) -> str:
    """`from origin import name` imports the module origin.name where there is one, and origin otherwise."""
    inside = Path(package.parent, *origin.split("."), name)
    return f"{origin}.{name}" if inside.is_dir() or inside.with_suffix(".py").is_file() else origin


def layer_of(module: str) -> str:
    """The layer that a module belongs to; the package itself is its `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports_between_layers(root: Path = ROOT) -> Counter[tuple[str, str]]:
    """Return the number of names that each layer imports from each other one."""
    package, found = root / PACKAGE, Counter[tuple[str, str]]()
    for file in python_files(package):
        layer = layer_of(module_of(file, package))
        for _, target in imports(file, package):
            if target.split(".")[0] == PACKAGE and layer_of(target) != layer:
                found[layer, layer_of(target)] += 1
    return found
