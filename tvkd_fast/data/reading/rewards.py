"""Numbers that a preference set has for both of its answers: a reward model's, or a judge's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvkd_fast.data.pairs import BadPair, Preference
from tvkd_fast.data.reading.formats import ReadRow, to_preference

KNOWN = ("score", "reward", "rating", "avg_rating")
"""The names that are read without being asked for: those of UltraFeedback's binarised copies, dpo-mix-7k and others."""
_FORMS = ("{side}_{name}", "{name}_{side}", "{side}-{name}", "{name}-{side}")
_OPTION = "--data.rewards"


def with_rewards(names: Sequence[str] | None) -> ReadRow:
    """What reads a row with its rewards: those called `names`, or the one that there is.

    A reward NAME is two columns: chosen_NAME and rejected_NAME, or NAME_chosen and NAME_rejected, or with a hyphen.
    The row is a BadPair where a column is missing, holds no finite number, or no reward tells the answers apart.
    """

    def read(record: Mapping[str, Any], row: str) -> Preference:
        pair = to_preference(record, row)
        asked = [_the_one(record, row)] if names is None else list(names)
        rewards = tuple(_of_both(record, name, row) for name in asked)
        check_told_apart(rewards, asked, row)
        return replace(pair, rewards=rewards)

    return read


def check_told_apart(rewards: Sequence[tuple[float, float]], names: Sequence[str], row: str) -> None:
    """Raise BadPair where every reward, called so, is the same for both answers."""
    if all(chosen == rejected for chosen, rejected in rewards):
        held = ", ".join(f"{name} {chosen:g}" for name, (chosen, _) in zip(names, rewards, strict=True))
        remedy = "Leave such rows out, --data.bad_pairs drop where they are columns"
        raise BadPair(row, "both answers have the same reward", held, remedy)


def _columns(record: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """The columns of a reward of the chosen and of the rejected answer."""
    for form in _FORMS:
        both = form.format(side="chosen", name=name), form.format(side="rejected", name=name)
        if all(column in record for column in both):
            return both
    return None


def _the_one(record: Mapping[str, Any], row: str) -> str:
    held = [name for name in KNOWN if _columns(record, name) is not None]
    if len(held) > 1:
        raise BadPair(
            row, "more than one reward", ", ".join(held), f"Name the one that is meant: {_OPTION} [{held[0]}]"
        )
    if not held:
        raise _missing(record, "score", row)
    return held[0]


def _of_both(record: Mapping[str, Any], name: str, row: str) -> tuple[float, float]:
    columns = _columns(record, name)
    if columns is None:
        raise _missing(record, name, row)
    chosen, rejected = (_number(record[column], column, row) for column in columns)
    return chosen, rejected


def _missing(record: Mapping[str, Any], name: str, row: str) -> BadPair:
    detail = (
        f"chosen_{name} and rejected_{name}, or {name}_chosen and {name}_rejected; found: {', '.join(map(str, record))}"
    )
    remedy = f"Add them, name those that there are, {_OPTION} [NAME], or have a model score: tvkd score --reward_model"
    return BadPair(row, "missing reward columns", detail, remedy)


def _number(value: Any, column: str, row: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        remedy = "Score the row again, or leave such rows out, --data.bad_pairs drop"
        raise BadPair(row, "a reward is no finite number", f"{column} is {value!r}", remedy)
    return float(value)
