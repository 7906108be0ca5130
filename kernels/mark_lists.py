"""From bits to lists: which columns each row has marked, in order. Popcounts, prefix sums, no atomics.

Letters: N tokens, V vocabulary, W words of 32 bits a row, E marked entries, K hot columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import UNTILED
from tvkd_fast.kernels.head import MarkRule
from tvkd_fast.kernels.launch import launch

COUNT_WORDS = 256
LIST_WORDS = 64


@dataclass(frozen=True)
class MarkLists:
    """The marked entries of N softmaxes, row by row, columns ascending; a label's is among them unless it is hot."""

    columns: Tensor
    """(E,) int32"""
    rows: Tensor
    """(E,) int32"""
    starts: Tensor
    """(N + 1,) int64: where each row's entries begin."""
    tail: Tensor
    """(N,) Σ p·J over what is neither marked nor hot."""
    dense: Tensor
    """(rows,) int64: rows without entries, whose gradient is to be the exact one."""
    hot: Tensor
    """(K,) int64: columns whose gradient is exact."""
    counts: Tensor | None = None
    """(3,) float64: entries beside the labels', Σ tail and dense rows. Not needed by a backward."""

    @staticmethod
    def joined(
        found: Sequence[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]],
        hot: Tensor,
        tail: Tensor,
        wanted: Tensor,
        rule: MarkRule,
    ) -> MarkLists:
        """Of blocks of rows: which are dense, which have their label's bit, and their counts, columns and rows."""
        dense = torch.cat([x for x, _, _ in found]) if found else torch.zeros_like(wanted)
        own = torch.cat([x for _, x, _ in found]) if found else dense
        counts = torch.cat([x for _, _, (x, _, _) in found]) if found else dense.long()
        sparse = wanted & ~dense
        entries = (counts - own.long()).masked_fill(~sparse, 0).sum()
        lost = tail.masked_fill(~sparse, 0.0).sum(dtype=torch.float64)
        rows = sparse.sum().clamp(min=1)
        flat = bool((lost > rule.max_tail * rows) | (entries > rule.max_entries * rows)) if len(tail) else False
        if flat:
            dense, counts, found = wanted, torch.zeros_like(counts), []
            entries, lost = entries * 0, lost * 0
        columns = [x for _, _, (_, x, _) in found] or [hot.new_empty(0, dtype=torch.int32)]
        places, offset = [hot.new_empty(0, dtype=torch.int32)], 0
        for _, _, (count, _, row) in found:
            places.append(row + offset)
            offset += len(count)
        return MarkLists(
            columns=torch.cat(columns),
            rows=torch.cat(places),
            starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            tail=tail,
            dense=dense.nonzero()[:, 0],
            hot=hot,
            counts=torch.stack([entries.double(), lost, dense.sum().double()]),
        )


@triton.jit
def count_kernel(words, labels, counts, W, words_stride, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    if tl.load(labels + row) != ignore_index:
        for start in range(0, W, BLOCK):
            place = start + tl.arange(0, BLOCK)
            word = tl.load(words + row * words_stride + place, mask=place < W, other=0)
            found += tl.sum((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1)
    tl.store(counts + row, tl.sum(found, 0).to(tl.int64))


@triton.jit
def list_kernel(words, starts, columns, rows, W, words_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(starts + row)
    if tl.load(starts + row + 1) == base:
        return
    for start in range(0, W, BLOCK):
        place = start + tl.arange(0, BLOCK)
        word = tl.load(words + row * words_stride + place, mask=place < W, other=0)
        bits = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK * 32,))
        rank = tl.cumsum(bits, 0)
        column = start * 32 + tl.arange(0, BLOCK * 32)
        tl.store(columns + base + rank - 1, column, mask=bits != 0)
        tl.store(rows + base + rank - 1, row.to(tl.int32), mask=bits != 0)
        base += tl.sum(bits, 0)


def counted(words: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(N,) int64 bits a row of words [≥ N, W] int32; 0 of a row to ignore, whose words are not read."""
    counts = labels.new_empty(len(labels), dtype=torch.int64)
    launch(
        count_kernel, len(labels), words, labels, counts, words.shape[1], words.stride(0), ignore_index,
        on=words, options=UNTILED, BLOCK=COUNT_WORDS,
    )  # fmt: skip
    return counts


def listed(words: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`counts` (N,) as they came, and columns and rows (E,) int32 of the bits of all rows that count any."""
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(starts[-1])
    columns, rows = (words.new_empty(total, dtype=torch.int32) for _ in range(2))
    launch(
        list_kernel, len(counts) if total else 0, words, starts, columns, rows, words.shape[1], words.stride(0),
        on=words, options=UNTILED, BLOCK=LIST_WORDS,
    )  # fmt: skip
    return counts, columns, rows
