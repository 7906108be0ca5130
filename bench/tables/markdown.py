"""Tables in Markdown, and the line of provenance under each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MOVED = {
    "head_learning": "learning.head_learning",
    "head_training": "learning.head_training",
    "hot": "head.dense_columns",
    "loop_overhead": "runs.loop_overhead",
    "numerics": "head.numerics",
    "planned": "runs.planned",
    "scaling": "runs.scaling",
    "soak": "runs.soak",
    "step_lengths": "step.lengths",
    "step_profile": "step.profile",
    "sweep": "head.sweep",
    "teacher_cost": "step.teacher_cost",
    "values": "head.values",
    "ways": "head.variants",
}
"""Modules of `bench` by the names that results were measured under, and by those that they have now."""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def provenance(made: dict[str, Any], what: str, commits: Sequence[str] = ()) -> str:
    """`commits` are those of what was measured, where it was not measured all at once."""
    versions = f"torch {made['torch']}, transformers {made['transformers']}, Python {made['python']}"
    known = ", ".join(dict.fromkeys(_short(commit) for commit in commits or [made["commit"]]))
    return f"\n{what}; {_command(made['command'])}; {made['machine']}; {versions}; commit {known}."


def _command(recorded: str) -> str:
    """Return the command as it was given, and the module to call today where that has another name."""
    module = recorded.split()[2].removeprefix("bench.") if recorded.startswith("python -m bench.") else ""
    return f"`{recorded}`" + (f" (now `python -m bench.{MOVED[module]}`)" if module in MOVED else "")


def _short(commit: str | None) -> str:
    """Return the short commit, with the + of a tree that was changed since."""
    return "no checkout" if commit is None else commit[:12] + "+" * commit.endswith("+")


def cell(text: str) -> str:
    """Text of others, which might hold what a table is made of."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def error(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1e}" if name in row else "–"


def raised(name: str) -> str:
    return re.sub(
        r"2\^-(\d+)", lambda found: "2⁻" + found[1].translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")), name
    )
