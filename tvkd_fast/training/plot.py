"""The picture of a road: learning curves of DPO and TVKD beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLES: dict[str, dict[str, Any]] = {
    # The first line lies under the second where they meet, so it is the broader one.
    "dpo": {"color": "#a9a9a9", "linewidth": 3.0},
    "tvkd": {"color": "#c1440e", "linewidth": 1.5},
}


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path, *, title: str) -> None:
    """Held-out accuracy and margin, and the training loss, against the step, a line a run; written as PNG.

    `runs` maps a run's name to the lines of its metrics.jsonl. Needs matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing curves needs matplotlib: pip install 'tvkd_fast[plot]'") from error
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    panels = (
        ("eval/accuracy", "held-out accuracy"),
        ("eval/margin", "held-out margin (nats)"),
        ("loss", "training loss, each its own (running mean)"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        for name, lines in runs.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if not points:
                continue
            steps = [step for step, _ in points]
            values = [value for _, value in points]
            if key == "loss":
                values = _running_mean(values)
            marker = "o" if key.startswith("eval/") else None
            axis.plot(steps, values, label=name.upper(), marker=marker, markersize=4, **STYLES.get(name, {}))
        if key == "eval/accuracy":
            low, high = axis.get_ylim()
            axis.set_ylim(max(0.0, low - 0.05), min(1.0, high + 0.05))
        axis.ticklabel_format(useOffset=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential, without the pull of its start towards zero."""
    total = norm = 0.0
    means = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        means.append(total / norm)
    return means
