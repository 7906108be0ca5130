"""Columns of the vocabulary whose gradient is exact: the batch's labels, and those that a sample of rows selects most.

Letters: N tokens, V vocabulary, K dense columns, W words of 32 bits per row.

Labels carry the peaks that a lower bound of the softmax's sum needs. Nothing is remembered from call to call.
docs/sparse.md counts what that finds on real states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.head_stats import head_sums
from tvkd_fast.kernels.records import Head, SelectionRule
from tvkd_fast.kernels.selection_bits import selection_bits, selection_tiles, words_per_row

DENSE_COLUMNS = 8192
DENSE_SHARE = 6
"""At most one column in this many is dense."""
SAMPLE_ROWS = 64
SAMPLE_SHARE = 16
"""At most one row in this many is sampled; the sample takes two products."""


@dataclass(frozen=True)
class DenseColumns:
    """Columns of the vocabulary whose gradient is exact, and which of the others have a sparse one."""

    columns: Tensor
    """(K,) int64, ascending."""
    is_sparse: Tensor
    """(V,) int8: 1 of a column that is neither dense nor taken out by a bias of −inf."""

    @staticmethod
    def of(columns: Tensor, head: Head) -> DenseColumns:
        is_sparse = torch.ones(head.vocab_size, dtype=torch.int8, device=columns.device)
        if head.bias is not None:
            is_sparse.masked_fill_(head.bias.isneginf(), 0)
        return DenseColumns(columns, is_sparse.index_fill_(0, columns, 0))

    def head(self, head: Head) -> Head:
        """The dense columns' own head, a copy."""
        bias = None if head.bias is None else head.bias[self.columns]
        return Head(head.weight[self.columns], bias, head.softcap, head.logit_scale)

    def sparse_words(self, width: int) -> Tensor:
        """(W,) int32: `is_sparse` as bits, in the layout of selected bits."""
        bits = torch.nn.functional.pad(self.is_sparse.int(), (0, 32 * width - len(self.is_sparse))).view(width, 32)
        return (bits << torch.arange(32, device=bits.device, dtype=torch.int32)).sum(1, dtype=torch.int32)

    def local(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels as places in `columns`: K where a label is not dense, −100 where it is ignored."""
        count, vocab = len(self.columns), len(self.is_sparse)
        place = torch.full((vocab,), count, device=labels.device, dtype=torch.int64)
        place[self.columns] = torch.arange(count, device=labels.device)
        return place[labels.clamp(0, vocab - 1)].masked_fill(labels == ignore_index, -100)


def choose_dense_columns(
    hidden: Tensor, head: Head, labels: Tensor, rule: SelectionRule, *, ignore_index: int
) -> DenseColumns:
    """K columns: the batch's labels, then those that a sample of rows selects most, then those that come first."""
    vocab = head.vocab_size
    known = torch.where((labels < 0) | (labels >= vocab) | (labels == ignore_index), vocab, labels)
    present = known.new_zeros(vocab + 1).index_fill_(0, known, 1)[:-1]
    sampled = _sampled(hidden, head, labels, rule, ignore_index)
    if head.bias is not None:
        # Except labels: a label that a bias takes out still has its δ, and a sparse column has no entry for it.
        sampled.masked_fill_(head.bias.isneginf() & (present == 0), -1)
    first = rank(present, sampled).topk(min(DENSE_COLUMNS, vocab // DENSE_SHARE)).indices
    return DenseColumns.of(first.sort().values, head)


def rank(present: Tensor, sampled: Tensor) -> Tensor:
    """(V,) int64, higher is chosen sooner: by label, then by how many of SAMPLE_ROWS select it, then the lower column.

    No two are equal, so that the choice is the same each time.
    """
    vocab = len(present)
    lower = torch.arange(vocab - 1, -1, -1, device=present.device)
    return (present * (SAMPLE_ROWS + 1) + sampled) * vocab + lower


def _sampled(hidden: Tensor, head: Head, labels: Tensor, rule: SelectionRule, ignore_index: int) -> Tensor:
    """(V,) int64: how many of some rows, evenly spaced among those with a label, have p ≥ ε."""
    n = hidden.shape[0]
    ignored = labels == ignore_index
    wanted = ignored.sort(stable=True).indices
    spaced = torch.arange(min(SAMPLE_ROWS, n // SAMPLE_SHARE), device=labels.device)
    rows = wanted[spaced * (n - ignored.sum()) // max(len(spaced), 1)]
    if not len(rows):
        return labels.new_zeros(head.vocab_size)
    states, known = hidden[rows], labels[rows]
    lse = head_sums(states, head, labels=known, ignore_index=ignore_index).lse
    config = selection_tiles(states, head, unbiased=False)
    words = hidden.new_zeros((len(rows), words_per_row(head, config)), dtype=torch.int32)
    none = DenseColumns.of(labels.new_empty(0), head)
    selection_bits(
        states,
        head,
        known,
        rule,
        words,
        {name: torch.empty_like(lse) for name in ("maximum", "log_total", "lse_kappa", "target")},
        config,
        lse_bounds=lse,
        is_sparse=none.is_sparse,
        sparse_words=none.sparse_words(words.shape[1]),
        hashes=None,
        ignore_index=ignore_index,
    )
    bits = torch.stack([((words >> bit) & 1).sum(0) for bit in range(32)], 1)
    return bits.flatten()[: head.vocab_size]
