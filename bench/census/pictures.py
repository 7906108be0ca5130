"""The pictures of docs/kernels.md: in which order tiles are taken, and where a block's numbers go.

    python -m bench.census.pictures      writes docs/pictures/*.png

The order is not drawn by hand: the kernels' own function is asked for it, in Triton's interpreter.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import triton
import triton.language as tl

from tvkd_fast.kernels.logits import grouped_tile

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
INK, SOFT, WARM, COOL = "#222222", "#d9d9d9", "#d1495b", "#30638e"


@triton.jit
def order_kernel(places: Any, rows: Any, columns: Any, GROUP: tl.constexpr) -> None:  # noqa: N803
    program = tl.program_id(0)
    m, n = grouped_tile(program, rows, columns, GROUP)
    tl.store(places + m * columns + n, program)


def order(rows: int, columns: int, group: int) -> torch.Tensor:
    """[rows, columns] the program that takes each tile."""
    places = torch.full((rows, columns), -1, dtype=torch.int32)
    order_kernel[(rows * columns,)](places, rows, columns, group)
    return places


def draw_order(axes: Axes, group: int, title: str, at_once: int = 16) -> None:
    """Row tiles by splits, the ones that run at the same time in colour."""
    rows, columns = 8, 12
    places = order(rows, columns, group)
    for m in range(rows):
        for n in range(columns):
            program = int(places[m, n])
            axes.add_patch(Rectangle((n, rows - 1 - m), 1, 1, fc=WARM if program < at_once else "white", ec=SOFT))
            colour = "white" if program < at_once else INK
            axes.text(n + 0.5, rows - 0.5 - m, str(program), ha="center", va="center", fontsize=7, color=colour)
    first = (places < at_once).nonzero()
    taken = f"{len(first[:, 0].unique())} row tiles, {len(first[:, 1].unique())} splits"
    axes.set(xlim=(0, columns), ylim=(0, rows), ylabel="row tiles", title=title)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.set_xlabel(f"splits of the vocabulary\nthe first {at_once} programs read {taken}")


def forward_picture() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    draw_order(left, 1, "one row after the other")
    draw_order(right, 4, "in groups of four rows")
    figure.tight_layout()
    figure.savefig(FOLDER / "order.png", dpi=150)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = "white") -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float], text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=COOL, lw=1.4))
    if text:
        axes.text((start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2 + 0.12, text, ha="center", fontsize=8, color=COOL)


def backward_picture() -> None:
    """Draw one block of dlogits: its inputs and its uses."""
    figure, axes = plt.subplots(figsize=(9, 4))
    box(axes, 0, 1.2, 1.0, 2.4, "hidden\n[R, D]")
    box(axes, 1.9, 4.0, 2.6, 0.9, "weight slice [C, D]")
    axes.add_patch(Rectangle((1.9, 1.2), 2.6, 2.4, fc="#f6e3e6", ec=WARM, lw=1.5))
    for i in range(1, 4):
        axes.plot([1.9, 4.5], [1.2 + 0.6 * i] * 2, color=SOFT, lw=0.8)
        axes.plot([1.9 + 0.65 * i] * 2, [1.2, 3.6], color=SOFT, lw=0.8)
    axes.text(3.2, 2.4, "dlogits [R, C]\nat most 32 MiB,\nwritten once, read twice", ha="center", va="center")
    box(axes, 6.4, 1.2, 1.5, 2.4, "dH [R, D]\nfloat32 sum\nover blocks")
    box(axes, 1.9, -0.4, 2.6, 0.9, "dW slice [C, D], written once")
    arrow(axes, (1.0, 2.4), (1.9, 2.4))
    arrow(axes, (3.2, 4.0), (3.2, 3.6))
    arrow(axes, (4.5, 2.4), (6.4, 2.4), "· weight slice")
    arrow(axes, (3.2, 1.2), (3.2, 0.5))
    axes.text(3.35, 0.83, "transposed · hidden", fontsize=8, color=COOL, va="center")
    arrow(axes, (5.2, 4.4), (7.9, 4.4), "next slice of the vocabulary")
    axes.set(xlim=(-0.2, 8.2), ylim=(-0.6, 5.1))
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(FOLDER / "backward.png", dpi=150)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    forward_picture()
    backward_picture()
