"""The tables of docs/evidence.md."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench.tables.markdown import markdown, provenance

SCREEN = "screen, 6 layers"


def study_kept(report: dict[str, Any]) -> dict[str, Any]:
    """A study without its runs' figures pair by pair, which its rows sum up, and of teachers with margins alone."""
    runs = [{name: value for name, value in run.items() if name != "pairs"} for run in report["runs"]]
    teachers = [teacher | {"pairs": {"margin": teacher["pairs"]["margin"]}} for teacher in report["teachers"]]
    return report | {"runs": runs, "teachers": teachers}


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
        for row in report["rows"][SCREEN]
    ]
    what = f"{report['rows'][SCREEN][0]['pairs']} held-out pairs; 95% bootstrap over pairs"
    return f"{markdown(head, rows)}\n\n{_budget(report, 'screen')}.\n{_made(report, [SCREEN], what)}"


def finals_table(report: dict[str, Any]) -> str:
    """Finalists beside DPO, a table a cell, and what the teacher itself does."""
    head = ["margin, nats", "ahead of DPO", "by seed", "p", "accuracy", "ahead of DPO", "p", "reward accuracy"]
    head += ["chosen gained, nats", "CPU s"]
    parts, found = [], [cell for cell, rows in report["rows"].items() if cell != SCREEN and rows]
    for cell in found:
        rows = report["rows"][cell]
        seeds, pairs = max(row["seeds"] for row in rows), rows[0]["pairs"]
        lines = [_final(row) for row in rows]
        lines += [_teacher(one, len(head) - 3) for one in report["teachers"] if cell.startswith(one["data"])]
        parts.append(markdown([f"{cell}; {seeds} seeds, {pairs:,} pairs", *head], lines))
    budgets = dict.fromkeys(cell.partition(",")[0] for cell in found)
    parts.append("; ".join(f"{data}: {_budget(report, data)}" for data in budgets) + ".")
    return "\n\n".join(parts) + "\n" + _made(report, found, "95% intervals over seeds and pairs")


def data_table(report: dict[str, Any]) -> str:
    """Return the table of each data set's rows that were kept, cut or dropped."""
    head = ["data", "rows", "pairs", "answers cut", "prompt too long", "dropped otherwise", "at most, tokens"]
    rows = []
    for data, splits in report["data"].items():
        for split, one in splits.items():
            otherwise = sum(one["dropped_bad"].values())
            counts = [one["pairs"] + one["dropped_overlong"] + otherwise, one["pairs"], one["truncated"]]
            counts += [one["dropped_overlong"], otherwise, one["max_length"]]
            rows.append([f"{data}, {split.replace('_', ' ')}", *(f"{count:,}" for count in counts)])
    return markdown(head, rows) + "\n" + provenance(report["made_by"], "rows left out and cut")


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
        f"{row['chosen_gain']:+.2f}",
        f"{row['cpu_seconds']:,.0f}",
    ]


def _teacher(teacher: dict[str, Any], left: int) -> list[str]:
    margins = teacher["pairs"]["margin"]
    right = f"{mean(margin > 0 for margin in margins):.3f}"
    dashes = ["–"] * (left - 2)
    return [f"the teacher, {len(margins)} pairs", f"{mean(margins):+.2f}", "–", "–", "–", right, *dashes]


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    digits = 3 if name == "better" else 2
    return f"{row[name]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _budget(report: dict[str, Any], data: str) -> str:
    budget, train = report["budgets"][data], report["data"][data]["train"]
    return f"{budget['steps']} steps of {budget['pairs']} pairs out of {train['pairs']:,}"


def _made(report: dict[str, Any], cells: list[str], what: str) -> str:
    """Return the line of provenance, with the commits that made the runs."""
    commits = list(dict.fromkeys(commit for cell in cells for row in report["rows"][cell] for commit in row["commits"]))
    return provenance(report["made_by"], what, commits)
