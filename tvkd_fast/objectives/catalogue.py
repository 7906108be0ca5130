"""All objectives in one table: their formulas, what they need, what they cost, and where they were read."""

from __future__ import annotations

import inspect

from tvkd_fast.objectives.contract import Need, Objective
from tvkd_fast.objectives.registry import DEFAULT, objectives

COLUMNS = (
    "name",
    "loss per pair",
    "needs",
    "settings and defaults",
    "bytes on disk",
    "products",
    "passes",
    "source",
)
_IN_WORDS = {
    Need.REJECTED: "rejected",
    Need.REFERENCE: "reference",
    Need.TEACHER_SUMS: "teacher's sums",
    Need.TEACHER_REWARDS: "teacher's rewards",
    Need.TEACHER_LOGPS: "teacher's log-probabilities",
    Need.REWARDS: "rewards of the data",
    Need.LABELS: "labels",
}
_KEPT_PER_TOKEN = {Need.TEACHER_SUMS: 4, Need.TEACHER_REWARDS: 4}
_KEPT_PER_RESPONSE = {Need.REFERENCE: 4, Need.TEACHER_LOGPS: 4}
_FROZEN_PASSES = {Need.REFERENCE: 1, Need.TEACHER_SUMS: 1, Need.TEACHER_REWARDS: 2, Need.TEACHER_LOGPS: 1}
_PASSES_OVER_OTHERS = 2
"""Passes of policy and reference over responses to other prompts, without a gradient."""


def table() -> str:
    """The table in Markdown, a line per objective under its default settings, as docs/objectives.md has it."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(row, objectives().values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def row(cls: type[Objective]) -> tuple[str, ...]:
    """The cells of one objective under its default settings."""
    made = cls()
    needs = [need for need in Need if need in made.needs]
    name = f"`{cls.name}`{' (default)' if cls.name == DEFAULT else ''}"
    cells = (
        name,
        formula(cls),
        ", ".join(_IN_WORDS[need] for need in needs if need in _IN_WORDS) or "–",
        ", ".join(f"`{setting}` {_value(value)}" for setting, value in made.settings().items()) or "–",
        _on_disk(needs),
        str(products(made)),
        str(1 + sum(_FROZEN_PASSES.get(need, 0) for need in needs) + _PASSES_OVER_OTHERS * (Need.LABELS in needs)),
        _link(cls.source),
    )
    return tuple(cell.replace("|", r"\|") for cell in cells)


def formula(cls: type[Objective]) -> str:
    """The first paragraph of its docstring, without the full stop."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")


def products(objective: Objective) -> int:
    """The head's products per step of tokens × hidden × vocabulary under exact gradients: forward, dH and dW; one more
    where the logits are computed again in the backward, one for Σp², and one for responses to other prompts."""
    return (3 if objective.per_pair else 4) + len({Need.COLLISIONS, Need.LABELS} & objective.needs)


def _on_disk(needs: list[Need]) -> str:
    token, response = (sum(kept.get(need, 0) for need in needs) for kept in (_KEPT_PER_TOKEN, _KEPT_PER_RESPONSE))
    parts = [f"{size} per {what}" for size, what in ((token, "token"), (response, "response")) if size]
    return ", ".join(parts) or "0"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value).lower()


def _link(source: str) -> str:
    kind, _, number = source.partition(" ")
    return f"[{number}](https://arxiv.org/abs/{number})" if kind == "arXiv" else source
