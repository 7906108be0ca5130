"""Learning curves of runs over each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvkd_fast.files import written
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.training.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    # The first line lies under the second where they meet, so it is the broader one.
    DPO.name: {"color": "#a9a9a9", "linewidth": 3.0},
    TVKD.name: {"color": "#c1440e", "linewidth": 1.5},
}


PANELS = (
    ("eval/accuracy", "held-out accuracy"),
    ("eval/margin", "held-out margin (nats)"),
    ("loss", "training loss, each its own (running mean)"),
)
MORE_PANELS = (
    ("margin", "training margin of rewards (running mean)"),
    ("grad_norm", "gradient norm (running mean)"),
    ("lr", "learning rate"),
)


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A picture to save, in inches; no window and no global state. ValueError where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'tvkd_fast[plot]'") from error
    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def plot_curves(
    runs: dict[str, list[dict[str, Any]]], path: Path, *, title: str, panels: Sequence[tuple[str, str]] = PANELS
) -> None:
    """Held-out accuracy and margin, and the training loss, against the step, one line per run; written as PNG.

    `runs` maps a run's name to the lines of its metrics.jsonl, `panels` a metric to its title. Needs matplotlib.
    """
    rows = -(-len(panels) // 3)
    figure = new_figure(12, 3.8 * rows, layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, label) in zip(axes, panels, strict=False):
        for i, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if not points:
                continue
            steps = [step for step, _ in points]
            values = [value for _, value in points]
            if "running mean" in label:
                values = _running_mean(values)
            marker = "o" if key.startswith("eval/") else None
            # A line that another one covers is the broader of the two.
            style = STYLES.get(name.lower(), {"linewidth": 1.5 * (len(runs) - i)})
            axis.plot(steps, values, label=name, marker=marker, markersize=4, **style)
        if key == "eval/accuracy":
            low, high = axis.get_ylim()
            axis.set_ylim(max(0.0, low - 0.05), min(1.0, high + 0.05))
        axis.ticklabel_format(useOffset=False, axis="x")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    drawn = next((axis for axis in axes if axis.lines), axes[0])
    if drawn.lines:
        drawn.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    with written(path):
        figure.savefig(path, dpi=130)


def plot_runs(folders: Sequence[Path]) -> Path:
    """`curves.png` in the first of the runs' folders, of all of them. ValueError where one has no metrics."""
    runs = {}
    for folder in folders:
        lines = read_metrics(folder / METRICS)
        if not lines:
            raise ValueError(f"{folder} has no {METRICS}: give the output_dir of a run")
        runs[str(folder)] = lines
    common = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent
    named = {str(Path(name).relative_to(common)): lines for name, lines in runs.items()}
    path = folders[0] / "curves.png"
    evaluated = any(line.get("eval/accuracy") is not None for lines in runs.values() for line in lines)
    plot_curves(named, path, title=", ".join(named), panels=(*PANELS[0 if evaluated else 2 :], *MORE_PANELS)[:6])
    return path


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential, without the pull of its start towards zero."""
    total = norm = 0.0
    means = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        means.append(total / norm)
    return means
