"""The range of every number in a config: stated beside the field, and checked when the config is made."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

LARGEST = 2**63 - 1
"""The largest whole number that torch takes as a size or as a seed."""
_RANGE = "range"


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, all of them finite."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max
    without_low: bool = False
    """Whether `low` itself is too small."""
    without_high: bool = False
    """Whether `high` itself is too large."""

    def __contains__(self, value: Any) -> bool:
        # NaN is neither above nor below anything.
        above = self.low < value if self.without_low else self.low <= value
        below = value < self.high if self.without_high else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        if self.high not in (LARGEST, sys.float_info.max):
            return f"in {'(' if self.without_low else '['}{self.low}, {self.high}{')' if self.without_high else ']'}"
        if self.low == 0 and self.without_low:
            return "a positive number"
        return "finite" if self.low == -sys.float_info.max else f"at least {self.low}"


FINITE = Range()
POSITIVE = Range(0, without_low=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
"""A share of a whole, such as a ratio or a discount."""


def at_least(low: int) -> Range:
    """The whole numbers from `low`."""
    return Range(low, LARGEST)


def number(default: Any, limits: Range) -> Any:
    """A dataclass field of a number, of one that may be None, or of a tuple of numbers, all of them in `limits`."""
    return dataclasses.field(default=default, metadata={_RANGE: limits})


def range_of(field: dataclasses.Field[Any]) -> Range | None:
    """The range that `number` gave a field."""
    found: Range | None = field.metadata.get(_RANGE)
    return found


def changed(config: Any) -> list[str]:
    """The fields of a config that are not what they are by default, of those whose default is a plain value."""
    plain = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    return [field.name for field in plain if getattr(config, field.name) != field.default]


def check_numbers(config: Any, group: str = "") -> None:
    """Raise a ValueError for the first number of a config that is not in its range, by its option's name.

    `group` is the options' prefix, such as "optim". Groups inside the config check themselves.
    """
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        limits, value = range_of(field), getattr(config, field.name)
        if limits is None or value is None:
            continue
        option = f"--{group}.{field.name}" if group else f"--{field.name}"
        several = get_origin(types[field.name]) is tuple
        if several and len(value) != len(get_args(types[field.name])):
            wanted = len(get_args(types[field.name]))
            raise ValueError(f"{field.name} must be {wanted} numbers, got {list(value)}: set {option}")
        whole = int in (types[field.name], *get_args(types[field.name]))
        for one in value if several else (value,):
            if not isinstance(one, Integral if whole else Real) or isinstance(one, bool):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{field.name} must be {kind}, got {one!r}: set {option}")
            if one not in limits:
                raise ValueError(f"{field.name} must be {limits}, got {one}: set {option}")
