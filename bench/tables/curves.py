"""The pictures of docs/benchmarks.md and docs/numerics.md, drawn from the JSON of the measuring commands.

python -m bench.tables.curves [head training lengths]      writes docs/pictures/*.png from bench/results/*.json
"""

from __future__ import annotations

import json
import sys
from statistics import mean
from typing import Any

import matplotlib as mpl

from bench.tables.pages import PICTURES, RESULTS

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

COLOURS = {
    "tvkd_fast, sparse 2^-14": "#d1495b",
    "tvkd_fast, sparse 2^-16": "#edae49",
    "tvkd_fast, fused loss, exact": "#5f0f80",
    "tvkd_fast, exact": "#30638e",
    "tvkd_fast, values": "#00798c",
    "CCE, torch_compile": "#b08968",
    "torch.compile": "#555555",
    "Liger, fused DPO": "#a8a8a8",
    "eager log-softmax": "#222222",
}
ARMS = {
    "exact, by eager log-softmax": "#30638e",
    "sparse, 2^-14": "#d1495b",
    "sparse, 2^-16": "#edae49",
    "sparse, 2^-18": "#66a182",
    "bf16 logits": "#222222",
}
SMOOTHED = 20
"""Steps that a point of a loss curve is a mean over."""


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def pretty(name: str) -> str:
    return name.replace("2^-14", "$2^{-14}$").replace("2^-16", "$2^{-16}$").replace("2^-18", "$2^{-18}$")


def draw_sweep(axes: Axes, report: Any, key: str, *, product: bool = False) -> None:
    """A line a contender, over the axis of the sweep; a point that was not measured is left out."""
    for name, colour in COLOURS.items():
        found = [(x["value"], row[key]) for x in report["points"] for row in x["results"] if _has(row, name, key)]
        if found:
            axes.plot(*zip(*found, strict=True), "o-", color=colour, label=pretty(name), ms=4, lw=1.4)
    if product:
        axes.axhline(1, color="#bbbbbb", lw=1)
    ticks = [x["value"] for x in report["points"]]
    axes.set(xscale="log", yscale="log", xticks=ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _has(row: dict[str, Any], name: str, key: str) -> bool:
    return row["name"] == name and row.get(key, 0) > 0 and "seconds" in row


def draw_errors(axes: Axes, report: Any) -> None:
    """Error of dH and dW against ε."""
    rows = [row for row in report["rows"] if row["kind"].startswith("even")]
    bits = [int(row["kind"].split("2^-")[1]) for row in rows]
    for key, label, colour in (("dh", "dH", "#d1495b"), ("dw", "dW", "#30638e")):
        axes.plot(bits, [row[key] for row in rows], "o-", color=colour, label=f"{label}, even tail", ms=4, lw=1.4)
        for row in report["rows"]:
            if row["kind"] == "bf16 logits":
                axes.axhline(row[key], color=colour, ls=":", lw=1.2, label=f"{label}, bf16 logits")
    axes.set(yscale="log", xticks=bits, xlabel="ε", ylabel="relative error, Frobenius", title="error against ε")
    axes.set_xticklabels([f"$2^{{-{bit}}}$" for bit in bits])
    axes.legend(fontsize=7)


def head_picture() -> None:
    tokens, vocabulary, learning = load("tokens"), load("vocabulary"), load("head_learning")
    figure, ((time, by_tokens), (by_vocabulary, errors)) = plt.subplots(2, 2, figsize=(10, 7.2))
    draw_sweep(time, tokens, "over_floor", product=True)
    time.set(xlabel="tokens N", ylabel="time over the product", title="time over the forward product")
    time.set_yticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
    time.yaxis.set_minor_formatter(NullFormatter())
    time.legend(fontsize=7, loc="center right")
    draw_sweep(by_tokens, tokens, "peak_mb")
    by_tokens.set(xlabel="tokens N", ylabel="MB beyond inputs and gradients", title="memory against N")
    draw_sweep(by_vocabulary, vocabulary, "peak_mb")
    shape = vocabulary["points"][0]["shape"].split("x")
    by_vocabulary.set(xlabel="vocabulary V", ylabel="MB beyond inputs and gradients")
    by_vocabulary.set_title(f"memory against V (N = {int(shape[0]):,})")
    draw_errors(errors, learning)
    figure.tight_layout()
    figure.savefig(PICTURES / "head.png", dpi=150)


def smoothed(losses: list[float]) -> list[float]:
    return [mean(losses[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(losses))]


def training_picture() -> None:
    """A row a model: the losses of every seed, where they end, and how far from the exact runs."""
    reports = [load("training"), load("training_full")]
    figure = plt.figure(figsize=(15, 8))
    for part, report in zip(figure.subfigures(len(reports), 1), reports, strict=True):
        draw_training(part, report)
    figure.savefig(PICTURES / "training.png", dpi=130)


def draw_training(figure: Any, report: Any) -> None:
    loss, accuracy, weight, margins = figure.subplots(1, 4)
    steps = range(1, report["steps"] + 1)
    rows = [row for row in report["rows"] if row["arm"] == "exact" or row["arm"] in ARMS]
    colours = {row["arm"]: ARMS.get(row["arm"], "#bbbbbb") for row in rows}
    for arm, colour in colours.items():
        curves = [x for name, x in report["losses"].items() if name.rsplit(", ", 1)[0] == arm]
        for i, curve in enumerate(curves):
            label = pretty(arm) if i == 0 else None
            loss.plot(steps, smoothed(curve), color=colour, label=label, lw=4 if arm == "exact" else 1)
    loss.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} steps", title="loss, every seed")
    loss.legend(fontsize=7)
    last = str(report["steps"])
    for place, row in enumerate(rows):
        found = row["marks"][last]["accuracy"]
        accuracy.plot([place] * len(found), found, "o", color=colours[row["arm"]])
        accuracy.plot([place - 0.25, place + 0.25], [mean(found)] * 2, color=colours[row["arm"]], lw=2)
    accuracy.set(ylabel="held-out reward accuracy", title=f"after {last} steps, every seed")
    accuracy.set_xticks(range(len(rows)), [pretty(row["arm"]) for row in rows], rotation=35, ha="right", fontsize=7)
    for axes, key, title in (
        (weight, "head_off", "head: ‖ΔW − ΔW*‖ / ‖ΔW*‖"),
        (margins, "margins_off", "held-out margins, relative error"),
    ):
        for row in rows[1:]:
            milestones = list(row["marks"])
            found = [mean(row["marks"][milestone][key]) for milestone in milestones]
            axes.plot(
                [int(milestone) for milestone in milestones],
                found,
                "o-",
                color=colours[row["arm"]],
                label=pretty(row["arm"]),
            )
        axes.set(xscale="log", yscale="log", xlabel="step", title=title)
        axes.set_xticks([int(milestone) for milestone in milestones], milestones)
        axes.xaxis.set_minor_formatter(NullFormatter())
    margins.legend(fontsize=7)
    seeds = len(rows[0]["seeds"])
    figure.suptitle(f"{report['start']}, DPO over {report['data']}: means over {seeds} seeds", fontsize=10)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.26, top=0.84, wspace=0.28)


def lengths_picture() -> None:
    """Tokens of pairs per second, prompts counted once, and peak memory, by a sequence's length."""
    report = load("step_lengths")
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    lengths = [point["length"] for point in report["points"]]
    for place, colour in ((0, "#30638e"), (-1, "#8d8d8d")):
        rows = [point["results"][place] for point in report["points"]]
        each = [point["tokens"] / point["pairs"] for point in report["points"]]
        label = rows[0]["name"]
        rates = [row["pairs_per_s"] * tokens for row, tokens in zip(rows, each, strict=True)]
        speed.plot(lengths, rates, "o-", color=colour, label=label)
        memory.plot(lengths, [row["peak_mb"] / 1024 for row in rows], "o-", color=colour, label=label)
    for axes, label in ((speed, "tokens per second"), (memory, "peak memory, GB")):
        axes.set(xscale="log", xlabel="tokens of prompt and response", ylabel=label, ylim=(0, None))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    first = report["points"][0]
    tokens = first["tokens"] // (first["pairs"] // first["pairs_per_step"])
    figure.suptitle(f"{first['model']}: a step of {tokens:,} tokens, whatever the length", fontsize=10)
    figure.tight_layout()
    figure.savefig(PICTURES / "lengths.png", dpi=150)


DRAWN = {"head": head_picture, "training": training_picture, "lengths": lengths_picture}


if __name__ == "__main__":
    for name in sys.argv[1:] or DRAWN:
        DRAWN[name]()
