"""Lists from bits: the columns that each row has selected, in order. Popcounts, prefix sums, no atomics.

Letters: N tokens, V vocabulary, W words of 32 bits per row, E selected entries, K dense columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import UNTILED
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.records import SelectionRule

COUNT_WORDS = 256
LIST_WORDS = 64


@dataclass(frozen=True)
class SelectedLists:
    """The selected entries of N softmaxes, row by row, columns ascending, each label's among them.

    A label in a dense column has no entry, nor has any other column that is dense.
    """

    columns: Tensor
    """(E,) int32"""
    starts: Tensor
    """(N + 1,) int64: where each row's entries begin."""
    tail: Tensor
    """(N,) Σ p·J over entries of sparse columns that are not selected."""
    dense_rows: Tensor
    """(rows,) int64: rows without entries, whose gradient is to be the exact one."""
    dense_columns: Tensor
    """(K,) int64: columns whose gradient is exact."""
    numbers: Tensor | None = None
    """(3,) float64: entries beside the labels', Σ tail and dense rows. Not needed by a backward."""

    @property
    def rows(self) -> Tensor:
        """(E,) int32"""
        places = torch.arange(len(self.tail), dtype=torch.int32, device=self.columns.device)
        return places.repeat_interleave(self.starts.diff(), output_size=len(self.columns))

    @staticmethod
    def of(
        columns: Sequence[Tensor],
        counts: Tensor,
        own: Tensor,
        dense_rows: Tensor,
        tail: Tensor,
        wanted: Tensor,
        dense_columns: Tensor,
        rule: SelectionRule,
    ) -> SelectedLists:
        """Lists from blocks of `columns` and numbers of all rows; where `rule` finds them too flat, every row is dense.

        Args:
            counts, own, dense_rows: (N,) selected entries, whether the label's is among them, whether the row is dense.
            tail, wanted: (N,) what is not selected, and whether the row counts.
        """
        counts = counts.masked_fill(dense_rows, 0)
        entries = (counts - own.long()).masked_fill(dense_rows, 0).sum()
        lost = tail.masked_fill(dense_rows, 0.0).sum(dtype=torch.float64)
        rows = (wanted & ~dense_rows).sum()
        flat = bool((lost > rule.max_tail * rows) | (entries > rule.max_entries * rows))
        if flat:
            columns, counts, dense_rows = [], torch.zeros_like(counts), wanted
        return SelectedLists(
            columns=torch.cat([counts.new_empty(0, dtype=torch.int32), *columns]),
            starts=_starts(counts),
            tail=tail,
            dense_rows=dense_rows.nonzero()[:, 0],
            dense_columns=dense_columns,
            numbers=torch.stack([entries * (not flat), lost * (not flat), dense_rows.sum()]),
        )


@triton.jit
def count_kernel(words_ptr, labels_ptr, counts_ptr, W, words_stride, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    if tl.load(labels_ptr + row) != ignore_index:
        for start in range(0, W, BLOCK):
            place = start + tl.arange(0, BLOCK)
            word = tl.load(words_ptr + row * words_stride + place, mask=place < W, other=0)
            found += tl.sum((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1)
    tl.store(counts_ptr + row, tl.sum(found, 0).to(tl.int64))


@triton.jit
def list_kernel(words_ptr, starts_ptr, columns_ptr, W, words_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(starts_ptr + row)
    if tl.load(starts_ptr + row + 1) == base:
        return
    for start in range(0, W, BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = tl.load(words_ptr + row * words_stride + place, mask=place < W, other=0)
        bits = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK * 32,))
        rank = tl.cumsum(bits, 0)
        column = start * 32 + tl.arange(0, BLOCK * 32)
        tl.store(columns_ptr + base + rank - 1, column, mask=bits != 0)
        base += tl.sum(bits, 0)


def count_selected(words: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(N,) int64 bits per row of words [≥ N, W] int32; 0 of a row to ignore, whose words are not read."""
    counts = labels.new_empty(len(labels), dtype=torch.int64)
    launch(
        count_kernel,
        len(labels),
        on=words,
        options=UNTILED,
        words_ptr=words,
        labels_ptr=labels,
        counts_ptr=counts,
        W=words.shape[1],
        words_stride=words.stride(0),
        ignore_index=ignore_index,
        BLOCK=COUNT_WORDS,
    )
    return counts


def list_selected(words: Tensor, counts: Tensor) -> Tensor:
    """(E,) int32 columns of the bits of all rows that count any, row by row; waits for the device."""
    starts = _starts(counts)
    columns = words.new_empty(int(starts[-1]), dtype=torch.int32)
    launch(
        list_kernel,
        len(counts) if len(columns) else 0,
        on=words,
        options=UNTILED,
        words_ptr=words,
        starts_ptr=starts,
        columns_ptr=columns,
        W=words.shape[1],
        words_stride=words.stride(0),
        BLOCK=LIST_WORDS,
    )
    return columns


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
