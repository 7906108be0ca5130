"""The one-GEMM head's forward: statistics of the vocabulary, and the softmax entries that a sparse gradient keeps.

Letters: N tokens, D hidden, V vocabulary, K dense columns, E selected entries, R rows at a time.

The log-sum-exp of K dense columns comes first, for K/V of a product: a lower bound of the whole one, which decides what
is selected. Dense columns have no selected entries: their gradient is the exact one, of ordinary products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tvkd_fast.kernels import blocks
from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.configs import TileConfig
from tvkd_fast.kernels.dense_columns import choose_dense_columns
from tvkd_fast.kernels.hash_uniform import HashUniform
from tvkd_fast.kernels.head_stats import head_sums
from tvkd_fast.kernels.records import Head, HeadSums, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists, count_selected, list_selected
from tvkd_fast.kernels.selection_bits import selection_bits, selection_tiles, words_per_row


def select_entries(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    rule: SelectionRule,
    *,
    ignore_index: int = -100,
    config: TileConfig | None = None,
) -> tuple[HeadSums, SelectedLists]:
    """`head_sums` with labels, and what a sparse gradient needs of the same pass: one product, and K/V of one.

    Args:
        hidden: [N, D], as `head_sums` takes it; head and labels (N,) too.
        rule: what is kept. Rows over its cap, or all where what is left out passes its limits, are dense.
        config: tiles to take in place of the table's.

    Traffic: as `head_sums`, and N·V/8 bytes of bits, R rows at a time, that are read twice more; 4 bytes per selected
    entry. The host waits once per block of rows, for the number of its entries, and twice per call, to decide whether
    the softmax is too flat and for the dense rows.
    """
    n, vocab = hidden.shape[0], head.vocab_size
    dense_columns = choose_dense_columns(hidden, head, labels, rule, ignore_index=ignore_index)
    config = config or selection_tiles(hidden, head, unbiased=rule.unbiased)
    lse_bounds = _lse_bounds(hidden, dense_columns.head(head), labels, ignore_index)
    uniforms = HashUniform(rule.seed, torch.arange(n, device=hidden.device), vocab) if rule.unbiased else None
    names = ("maximum", "log_total", "lse_kappa", "target")
    numbers = {name: hidden.new_full((n,), math.nan, dtype=torch.float32) for name in names}
    width = words_per_row(head, config)
    sparse_words = dense_columns.sparse_words(width)
    step = max(1, blocks.workspace_bytes(hidden) // (4 * width) // config.block_m) * config.block_m
    words = hidden.new_empty((min(n, step), width), dtype=torch.int32)
    wanted, known = labels != ignore_index, labels.clamp(0, vocab - 1)
    # A label in a dense column, or out of range, needs no bit.
    own = dense_columns.is_sparse[known].bool() & wanted & (labels == known)
    alone, dense_rows, counts = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(labels)
    columns = []
    for rows in slices(n, step):
        selection_bits(
            hidden[rows],
            head,
            labels[rows],
            rule,
            words,
            {name: values[rows] for name, values in numbers.items()},
            config,
            lse_bounds=lse_bounds[rows],
            is_sparse=dense_columns.is_sparse,
            sparse_words=sparse_words,
            hashes=None if uniforms is None else (uniforms.row_hashes[rows], uniforms.column_hashes),
            ignore_index=ignore_index,
        )
        alone[rows] = _select_labels(words, known[rows], own[rows])
        counts[rows] = count_selected(words, labels[rows], ignore_index)
        dense_rows[rows] = counts[rows] - own[rows].long() > rule.row_cap
        columns.append(list_selected(words, counts[rows].masked_fill(dense_rows[rows], 0)))
    sums = HeadSums(numbers["maximum"], numbers["log_total"], target=numbers["target"])
    # The rest includes the labels that had no bit of their own.
    own_mass = sums.logps.exp()
    if head.softcap is not None:
        own_mass *= 1.0 - (numbers["target"] / head.softcap) ** 2
    tail = (numbers["lse_kappa"] - sums.maximum - sums.log_total).exp() - torch.where(alone, own_mass, 0.0)
    tail = tail.clamp_min(0.0).masked_fill(~wanted, 0.0)
    return sums, SelectedLists.of(columns, counts, own, dense_rows, tail, wanted, dense_columns.columns, rule)


def _lse_bounds(hidden: Tensor, dense_head: Head, labels: Tensor, ignore_index: int) -> Tensor:
    """(N,) log-sum-exp of the dense columns; −inf where there are none."""
    if not dense_head.vocab_size:
        return hidden.new_full((hidden.shape[0],), -math.inf, dtype=torch.float32)
    return head_sums(hidden, dense_head, labels=labels, ignore_index=ignore_index).lse


def _select_labels(words: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Set each row's own bit where `own`; (R,) bool, where it was not set before."""
    which = (labels // 32)[:, None]
    bit = (own.int() << (labels % 32).int())[:, None]
    found = words[: len(labels)].gather(1, which)
    words[: len(labels)].scatter_(1, which, found | bit)
    return ((found & bit) == 0)[:, 0] & own
