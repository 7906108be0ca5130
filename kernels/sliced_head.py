"""Heads whose rows are gathered or cast a slice of the vocabulary at a time, so that no copy of a whole one is made.

Letters: D hidden, V vocabulary, V' rows of the weight, C columns of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head


@dataclass(frozen=True)
class SlicedHead(Head):
    """The rows `index` (V,) of a head's weight [V', D], or all of them, in `dtype`: made by `columns` and nowhere else.

    `weight` and `bias` stay what they were given as.
    """

    index: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0] if self.index is None else self.index.shape[0]

    def columns(self, start: int, stop: int) -> Head:
        rows = slice(start, stop) if self.index is None else self.index[start:stop]
        bias = None if self.bias is None else self.bias[rows].to(self.dtype)
        return Head(self.weight[rows].to(self.dtype), bias, self.softcap, self.logit_scale)


def bytes_per_column(head: Head) -> int:
    """The memory that a column of a slice takes: none of a plain head's, which is a view."""
    if not isinstance(head, SlicedHead):
        return 0
    itemsize = head.weight.element_size() if head.dtype is None else head.dtype.itemsize
    return head.weight.shape[1] * itemsize


class LastColumns:
    """The slices of a head, the last of which is kept: a walk asks for one several times in a row."""

    def __init__(self, head: Head) -> None:
        self._head, self._at = head, slice(0, 0)
        self._last = head

    def __call__(self, columns: slice) -> Head:
        if columns != self._at:
            self._last = self._head.columns(columns.start, columns.stop)
            self._at = columns
        return self._last
