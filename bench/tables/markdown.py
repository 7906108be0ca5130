"""Tables in Markdown, and the line of provenance under each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

JSON_LINK = "JSON"
"""Where a table links to the report that it was made from."""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def provenance(made: dict[str, Any], what: str, commits: Sequence[str] = ()) -> str:
    """One short line: what was measured, on which machine, at which commit. The rest is in the JSON that it links to.

    `commits` are those of what was measured, where it was not measured all at once. `pages.render` fills `JSON_LINK`.
    """
    known = ", ".join(dict.fromkeys(_short(commit) for commit in commits or [made["commit"]]))
    return f"\n{what}; {_machine(made['machine'])}, [{known}]({JSON_LINK})."


def _machine(machine: str) -> str:
    """The processor and its threads, without the system and what a maker's name is decorated with."""
    threads, _, processor = machine.rpartition("x86_64, ")[2].rpartition(", ")
    name = re.sub(r"\(R\)|Intel|Processor", "", processor).strip()
    return f"{name}, {threads}".replace(" 1 threads", " 1 thread") if threads else name


def states_of(report: dict[str, Any]) -> str:
    """Whose states they are, without the data that they were taken over or the parameters they were made by."""
    return str(re.split(" over |, ", report["states"])[0])


def _short(commit: str | None) -> str:
    """With the + of a tree that was changed since."""
    return "no checkout" if commit is None else commit[:7] + "+" * commit.endswith("+")


def cell(text: str) -> str:
    """Text of others, which might hold what a table is made of."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def error(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1e}" if name in row else "–"


def raised(name: str) -> str:
    return re.sub(
        r"2\^-(\d+)", lambda found: "2⁻" + found[1].translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")), name
    )
