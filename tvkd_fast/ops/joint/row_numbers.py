"""The numbers that a joint walk leaves of each row: plain records, shared by every implementation.

Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Numbers = Mapping[str, Tensor]
"""One number per row, by name."""


@dataclass(frozen=True)
class RowSums:
    """LSE of both models' logits in two parts, (R,) each, as `HeadSums` has it."""

    maximum: Tensor
    log_total: Tensor
    teacher_maximum: Tensor
    teacher_log_total: Tensor

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_total

    @property
    def teacher_lse(self) -> Tensor:
        return self.teacher_maximum + self.teacher_log_total

    def of(self, rows: slice | Tensor) -> RowSums:
        return RowSums(*(x[rows] for x in vars(self).values()))

    def mirrored(self) -> RowSums:
        """With student and teacher exchanged."""
        return RowSums(self.teacher_maximum, self.teacher_log_total, self.maximum, self.log_total)
