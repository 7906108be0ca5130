"""Tables of the first ten minutes on a GPU (`python -m bench.minutes`): a table per step, a row per case."""

from __future__ import annotations

import math
from typing import Any

from bench.tables.markdown import cell, markdown, provenance

FIGURES = {
    "shown": "found",
    "passed": "tests passed",
    "seconds": "seconds",
    "ms": "ms",
    "forward_ms": "forward alone, ms",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "over_library": "time over cuBLAS",
    "over_product": "time over one product",
    "host_us": "host time per launch, µs",
    "tokens_per_s": "tokens/s",
    "mfu": "model FLOPs utilization",
    "peak_mb": "peak memory, MB",
}
"""Of rows, by name, with the heading of their column."""
WHOLE_NUMBERS = ("passed", "tokens_per_s", "peak_mb")
REASONS = ("failed", "wrong", "cut", "skipped")
NOT_YET = (
    "**No GPU has run this walk yet**, so there are no figures on this page. On a machine with a GPU, `make gpu`\n"
    "takes nine minutes and leaves `bench/results/gpu.json`, of which `python -m bench.tables write` makes the tables."
)


def minutes_table(report: dict[str, Any]) -> str:
    """Return a table per step, with what failed above them."""
    if report["dry"]:
        raise ValueError("a dry walk measures nothing: keep the report that `make gpu` leaves on a machine with a GPU")
    failed = failures(report)
    verdict = "Failed:\n\n" + "\n".join(f"- {cell(line)}" for line in failed) if failed else "No check failed."
    made = {"commit": None, "machine": "unknown machine"} | report["made_by"]
    what = f"{device(report)}; {report.get('seconds', 0):.0f} s"
    return f"{verdict}\n\n{steps_text(report)}\n" + provenance(made, what)


def failures(report: dict[str, Any]) -> list[str]:
    """Return what makes the walk fail, one line each: rows of ours that failed or are wrong, and checks not made.

    A peer may refuse or be wrong, and times may be left out.
    """
    found = []
    for step in report["steps"]:
        for row in step["rows"]:
            if not row.get("peer") and (why := row.get("failed") or row.get("wrong")):
                found.append(f"{step['step']}: {row['name']}: {why}")
        if step["checks"] and step.get("left_out"):
            found.append(f"{step['step']}: not checked: {', '.join(step['left_out'])}")
    return found


def device(report: dict[str, Any]) -> str:
    """Return the device and its driver, without the rest of what the first step found."""
    rows = [row for step in report["steps"] for row in step["rows"] if step["step"] == "machine"]
    facts = [row["facts"] for row in rows if "facts" in row]
    return f"{facts[0]['device']}, driver {facts[0]['driver']}" if facts else "unknown device"


def steps_text(report: dict[str, Any]) -> str:
    """Return every step so far: its title and seconds, its table, and what was left out."""
    parts = []
    for number, step in enumerate(report["steps"], 1):
        parts.append(f"### {number}. {step['title'][:1].upper()}{step['title'][1:]}")
        if step["rows"]:
            parts.append(_table(step["rows"]))
        if step.get("left_out"):
            parts.append(f"Left out when the step's time was over: {cell(', '.join(step['left_out']))}.")
        if "seconds" in step:
            parts.append(f"{step['seconds']:.0f} s.")
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    """A column per figure that any row has, the worst error over what is allowed, and why a row has none."""
    figures = [name for name in FIGURES if any(name in row for row in rows)]
    has_errors = any("errors" in row for row in rows)
    has_reasons = any(row.get(reason) for row in rows for reason in REASONS)
    head = ["case", *(FIGURES[name] for name in figures), *["error over the allowed"] * has_errors]
    lines = []
    for row in rows:
        cells = [cell(row["name"]), *(_figure(row, name) for name in figures)]
        cells += [_worst(row)] * has_errors
        lines.append(cells + [_reason(row)] * has_reasons)
    return markdown([*head, *["remark"] * has_reasons], lines)


def _figure(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    if isinstance(value, str):
        return cell(value)
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if name in WHOLE_NUMBERS else f"{value:,.2f}"


def _worst(row: dict[str, Any]) -> str:
    """The largest of its errors over what each may be; nothing may differ where 0 is allowed."""
    errors = row.get("errors", {})
    shares = [error / row["limits"][name] if row["limits"][name] else error for name, error in errors.items()]
    if any(math.isnan(share) for share in shares):
        return "NaN"
    return f"{max(shares):.2f}" if shares else "–"


def _reason(row: dict[str, Any]) -> str:
    return next((f"{name}: {cell(row[name])}" for name in REASONS if row.get(name)), "–")
