"""The tables of docs/evidence.md."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench.markdown import markdown, provenance


def screen_table(report: dict[str, Any]) -> str:
    """Every arm from one seed, where finalists are selected."""
    head = ["arm, one seed", "margin, nats", "ahead of DPO", "accuracy", "ahead of DPO", "chosen gained, nats", "CPU s"]
    rows = [
        [
            row["arm"],
            f"{row['margin']:+.2f}",
            _interval(row, "further"),
            f"{row['accuracy']:.3f}",
            _interval(row, "better"),
            f"{row['chosen_gain']:+.2f}",
            f"{row['cpu_seconds']:,.0f}",
        ]
        for row in report["rows"]["screened"]
    ]
    count = report["rows"]["screened"][0]["pairs"]
    rows_of = f"rows 1200-{1199 + report['budgets']['human']['select']} of the training file"
    what = f"{count} pairs of {rows_of}, {_budget(report, 'human')}; 95% bootstrap over pairs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def finals_table(report: dict[str, Any]) -> str:
    """Finalists beside DPO, a table a cell, and what the teacher itself does."""
    head = ["margin, nats", "ahead of DPO", "by seed", "p", "accuracy", "ahead of DPO", "p", "reward accuracy"]
    parts = []
    for cell, rows in report["rows"].items():
        if cell == "screened" or not rows:
            continue
        seeds, pairs = max(row["seeds"] for row in rows), rows[0]["pairs"]
        lines = [_final(row) for row in rows]
        for teacher in report["teachers"]:
            if cell.startswith(teacher["data"]):
                lines.append(_teacher(teacher))
        parts.append(markdown([f"{cell}; {seeds} seeds, {pairs:,} pairs", *head], lines))
    what = f"human: {_budget(report, 'human')}; rule: {_budget(report, 'rule')}; 95% bootstrap over seeds and pairs"
    return "\n\n".join(parts) + "\n" + provenance(report["made_by"], what)


def _final(row: dict[str, Any]) -> list[str]:
    first = row["arm"] == "DPO"
    return [
        row["arm"],
        f"{row['margin']:+.2f}",
        "–" if first else _interval(row, "further"),
        "–" if first else ", ".join(f"{x:+.2f}" for x in row["further_by_seed"]),
        "–" if first else f"{row['further_p']:.2g}",
        f"{row['accuracy']:.3f}",
        "–" if first else _interval(row, "better"),
        "–" if first else f"{row['better_p']:.2g}",
        f"{row['reward_accuracy']:.3f}",
    ]


def _teacher(teacher: dict[str, Any]) -> list[str]:
    margins = teacher["pairs"]["margin"]
    right = mean(margin > 0 for margin in margins)
    return [f"the teacher, {len(margins)} pairs", f"{mean(margins):+.2f}", "–", "–", "–", f"{right:.3f}", "–", "–", "–"]


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    digits = 3 if name == "better" else 2
    return f"{row[name]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _budget(report: dict[str, Any], data: str) -> str:
    budget = report["budgets"][data]
    return f"{budget['steps']} steps of {budget['pairs']} pairs out of {budget['train']:,}"
