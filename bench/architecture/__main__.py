"""The pictures of docs/architecture.md, drawn from the code: who imports whom, and the calls of one batch.

    python -m bench.architecture      writes docs/pictures/layers.png and docs/pictures/batch.png

Imports are read from the source; the batch is sent through a tiny model, in Triton's interpreter, and watched.
"""

from __future__ import annotations

import os
import re

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from bench.architecture.calls import Frame, batch_path
from bench.architecture.imports import LAYERS, PACKAGE, ROOT, imports_between_layers

FOLDER = ROOT / "docs" / "pictures"
INK, SOFT, WARM, COOL = "#222222", "#e8e8e8", "#d1495b", "#30638e"
SHOWN = (*LAYERS, "integrations")


def purpose(layer: str) -> str:
    """The first sentence of the folder's docstring."""
    if layer == "kernels":
        return "Triton kernels, their launchers, and the table of their tiles"
    text = (ROOT / PACKAGE / layer / "__init__.py").read_text().split('"""')[1]
    return re.split(r"[.:]\s", text.replace("\n", " ") + " ")[0]


def draw_layers(path: Path) -> None:
    """Layers from the top, and how many names each imports from which: all below the diagonal."""
    counts = imports_between_layers()
    figure, axes = plt.subplots(figsize=(12, 6.6))
    for row, layer in enumerate(SHOWN):
        y = -row
        axes.add_patch(FancyBboxPatch((-13.9, y - 0.36), 2.9, 0.72, "round,pad=0.02", fc=SOFT, ec="none"))
        axes.text(-12.45, y, layer, ha="center", va="center", fontsize=9, color=INK, fontweight="bold")
        axes.text(-10.8, y, purpose(layer), ha="left", va="center", fontsize=7.5, color=INK)
        for column, other in enumerate(LAYERS):
            count = counts[layer, other]
            if count:
                axes.scatter(column, y, s=18 + 3.2 * count, color=COOL if layer in LAYERS else WARM, alpha=0.85, lw=0)
                axes.text(column, y, str(count), ha="center", va="center", fontsize=5.5, color="white")
    axes.plot([-0.5, len(LAYERS) - 0.5], [0.5, -len(LAYERS) + 0.5], color=INK, lw=0.8, ls=":")
    for column, layer in enumerate(LAYERS):
        axes.text(column, 0.75, layer, rotation=55, ha="left", va="bottom", fontsize=8, color=INK)
    legend = "names that the layer of a row\nimports from that of a column"
    axes.text(1.0, -len(LAYERS) + 2.5, legend, fontsize=8, ha="left", color=INK)
    axes.set_xlim(-14.1, len(LAYERS) + 1.2)
    axes.set_ylim(-len(SHOWN) + 0.3, 3.2)
    axes.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_batch(path: Path) -> None:
    """The files that a batch comes through, with the functions that it is in."""
    steps: list[tuple[str, list[str]]] = []
    for frame in batch_path():
        if not steps or steps[-1][0] != frame.file:
            steps.append((frame.file, []))
        steps[-1][1].append(_short(frame))
    figure, axes = plt.subplots(figsize=(7, 5.1))
    for row, (file, functions) in enumerate(steps):
        axes.add_patch(FancyBboxPatch((0.0, -row - 0.34), 6.0, 0.68, "round,pad=0.03", fc=SOFT, ec="none"))
        axes.text(0.15, -row + 0.11, file, va="center", fontsize=8.5, color=COOL, fontweight="bold")
        axes.text(0.15, -row - 0.17, " → ".join(functions), va="center", fontsize=7, color=INK)
        if row:
            axes.annotate("", (3.0, -row + 0.36), (3.0, -row + 0.64), arrowprops={"arrowstyle": "->"})
    axes.set_xlim(-0.2, 6.2)
    axes.set_ylim(0.4 - len(steps), 0.6)
    axes.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _short(frame: Frame) -> str:
    return frame.function.replace("<locals>.", "").replace("differentiate.", "")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw_layers(FOLDER / "layers.png")
    draw_batch(FOLDER / "batch.png")
    print(FOLDER / "layers.png", FOLDER / "batch.png", sep="\n")


if __name__ == "__main__":
    main()
