"""Tables of what kinds of head gradients learn: the head alone, and whole runs."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench.tables.markdown import markdown, provenance, raised, states_of


def learning_table(report: dict[str, Any]) -> str:
    """Gradients of the first step, then what AdamW made of them, by kind of gradient."""
    steps = [f"step {k}" for k in report["steps"]]
    head = ["gradient", "dH", "dW", "signs of dW"]
    for step in steps:
        head += [f"{step}: labels", "vocabulary", "weight"]
    rows = []
    for row in report["rows"]:
        cells = [row["kind"], f"{row['dh']:.1e}", f"{row['dw']:.1e}", f"{row['signs']:.1%}"]
        for step in steps:
            cells += [f"{row[step][name]:.1%}" for name in ("label", "vocabulary", "weight")]
        rows.append(cells)
    what = f"{report['tokens']} tokens per step, rate {report['lr']:g}; {states_of(report).removeprefix('states of ')}"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def training_table(report: dict[str, Any]) -> str:
    """A kind of gradient a row: where the runs end, then how far they are from the exact run of their seed."""
    marks, last = list(report["rows"][0]["marks"]), str(report["steps"])
    head = ["gradient", "loss at the end", "held-out reward accuracy", "held-out margin, nats"]
    parts = [
        key
        for key in ("head_off", "backbone_off")
        if any(x is not None for x in report["rows"][-1]["marks"][last][key])
    ]
    head += [f"ΔW of the {key.removesuffix('_off')} off, step {mark}" for key in parts for mark in marks]
    head += ["training loss off", *(f"margins off, step {mark}" for mark in marks)]
    rows = []
    for row in report["rows"]:
        end = row["marks"][last]
        cells = [raised(row["arm"]), f"{mean(row['loss']):.4f}"]
        cells += [f"{mean(end['accuracy']):.3f} ({_spread(end['accuracy'])})", f"{mean(end['margin']):+.3f}"]
        for key in (*parts, "margins_off"):
            if key == "margins_off":
                cells.append("–" if row["arm"] == "exact" else f"{mean(row['loss_off']):.1e}")
            found = [row["marks"][mark][key] for mark in marks]
            cells += ["–" if row["arm"] == "exact" else f"{mean(x):.2%}" for x in found]
        rows.append(cells)
    start, seeds = report["start"].removeprefix("smollm2-135m, "), len(report["rows"][0]["seeds"])
    what = f"{start}; {report['steps']} steps of {report['pairs']} pairs; {seeds} seeds"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def _spread(numbers: list[float]) -> str:
    return f"{min(numbers):.3f}–{max(numbers):.3f}"
