"""Whether a contender is right: its numbers beside float64's, before its time is shown.

Of values the largest error in nats, of gradients the relative error in Frobenius' norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

GRADIENTS = ("hidden", "weight")
"""Numbers that are gradients, by what; all others are values."""
Limits = Mapping[str, float]


@dataclass(frozen=True)
class Reference:
    """float64's numbers by name; `rows` says which of a number's rows these are, where they are not all."""

    numbers: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)

    def errors(self, got: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the errors of the numbers that both have."""
        return {name: self._error(name, got[name]) for name in got if name in self.numbers}

    def _error(self, name: str, got: Tensor) -> float:
        if name in self.rows:
            got = got[self.rows[name]]
        return (relative if name in GRADIENTS else largest)(got, self.numbers[name])


def largest(got: Tensor, want: Tensor) -> float:
    """The largest absolute difference; NaN where either is, 0 where there is nothing to compare."""
    return float((_alike(got, want).double() - want.double()).abs().max()) if want.numel() else 0.0


def relative(got: Tensor, want: Tensor) -> float:
    """The difference over what is wanted, in Frobenius' norm; NaN where a number is."""
    return float((_alike(got, want).double() - want).norm() / want.norm())


def _alike(got: Tensor, want: Tensor) -> Tensor:
    if got.shape != want.shape:
        raise ValueError(f"result of shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    return got


def checked(errors: Mapping[str, float], limits: Limits) -> dict[str, Any]:
    """A row's part: errors, what they may be at most, and "wrong" where one is more, or is no number."""
    row: dict[str, Any] = {"errors": dict(errors), "limits": {name: limits[name] for name in errors}}
    if off := [f"{name} beyond {limits[name]:.3g}" for name, error in errors.items() if not error <= limits[name]]:
        row["wrong"] = ", ".join(off)
    if not errors:
        row["wrong"] = "no number that float64 has"
    return row
