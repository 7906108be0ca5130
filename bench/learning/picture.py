"""The picture of docs/evidence.md: margins along training, a panel a cell."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from bench.tables.learning import SCREEN
from tvkd_fast.commands.plot import new_figure

COLOURS = ("#8d8d8d", "#c1440e", "#30638e", "#6a994e")


def picture(file: Path) -> None:
    """NAME.json of a study to NAME.png beside it."""
    report = json.loads(file.read_text())
    cells = [cell for cell in report["rows"] if cell != SCREEN and report["rows"][cell]]
    arms = dict.fromkeys(row["arm"] for cell in cells for row in report["rows"][cell])
    colours = dict(zip(arms, COLOURS, strict=False))
    figure = new_figure(4.3 * len(cells), 3.8, layout="constrained")
    for axes, cell in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        _curves(axes, report, cell, colours)
    figure.savefig(file.with_suffix(".png"), dpi=130)


def _curves(axes: Any, report: dict[str, Any], cell: str, colours: dict[str, str]) -> None:
    """Means over seeds, and each seed beside them."""
    for row in report["rows"][cell]:
        colour = colours[row["arm"]]
        runs = [one for one in report["runs"] if (one["cell"], one["arm"]) == (cell, row["arm"])]
        steps = [point["step"] for point in runs[0]["curve"]]
        for one in runs:
            axes.plot(steps, [point["margin"] for point in one["curve"]], color=colour, alpha=0.25, linewidth=0.8)
        middle = [mean(one["curve"][i]["margin"] for one in runs) for i in range(len(steps))]
        axes.plot(steps, middle, color=colour, marker="o", markersize=4, linewidth=1.8, label=row["arm"])
    axes.set_title(
        f"{cell} ({len({one['seed'] for one in report['runs'] if one['cell'] == cell})} seeds)", fontsize=10, loc="left"
    )
    axes.set_xlabel("step")
    axes.set_ylabel(f"margin of {report['budgets'][cell.partition(',')[0]]['curve']} held-out pairs, nats")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
