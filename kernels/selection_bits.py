"""Statistics of the vocabulary, and a bit for each softmax entry that is worth a gradient: one product.

Letters: N tokens, D hidden, V vocabulary, S splits of it, W words of 32 bits per row.

A split of the vocabulary cannot know the whole sum that ε is a share of. Beside its own sum so far it has a lower bound
of the whole one; the larger of the two sets its limit, so more entries are selected than M = {p ≥ ε}. The backward
drops these, where p is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.configs import TileConfig, precision
from tvkd_fast.kernels.head_stats import merge_splits
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile, without_end
from tvkd_fast.kernels.records import Head, SelectionRule

# e^80 is finite, and above any sum of a split that leaves something to select beside such a bound.
HIGHEST = tl.constexpr(80.0)
# A bound and a split's sum are rounded: entries at ε must be selected all the same.
SLACK = 1.0 - 2.0**-10


@triton.jit
def uniform(row_hash, column_hash):
    """u in (0, 1] of two hashes, as `HashUniform` defines it."""
    return (row_hash + column_hash).to(tl.float32) * (2.0**-32) + (0.5 + 2.0**-24)


@triton.jit
def selection_bits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    lse_bounds_ptr,
    is_sparse_ptr,
    sparse_words_ptr,
    row_hashes_ptr,
    column_hashes_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_rest_ptr,
    target_ptr,
    words_ptr,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    words_stride,
    ignore_index,
    logit_scale,
    softcap,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile of rows and the split of the vocabulary; a tile of ignored rows costs nothing.
    tiles = tl.cdiv(V, BLOCK_N)
    m, split = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(tiles, SPLIT_TILES), GROUP)
    row = m * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=ignore_index)
    if tl.max((label != ignore_index).to(tl.int32), 0) == 0:
        return
    # Compared as it came: an id that 32 bits cannot hold must not wrap round into the vocabulary.
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    bound = tl.load(lse_bounds_ptr + rows, mask=rows < N, other=0.0)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT_TILES
    for tile in range(first, tl.minimum(first + SPLIT_TILES, tiles)):
        # 2. Logits of a tile, and z at the label.
        column = tile * BLOCK_N
        z = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, N, V, D, hidden_stride, weight_stride, logit_scale, softcap,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK_N)
        here = (label >= column) & (label < column + BLOCK_N)
        if tl.max(here.to(tl.int32), 0) > 0:
            own = tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
            tl.store(target_ptr + rows, own, mask=here & (rows < N))
        # 3. The softmax's sum, online, as head_stats_kernel takes it.
        z = without_end(z, column, V, BLOCK_N)
        new_max = tl.maximum(running_max, tl.max(z, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = exp(running_max - shift)
        e = exp(z - shift[:, None])
        total = total * decay + tl.sum(e, 1)
        running_max = new_max
        # 4. The limit ε·Σ: Σ is not known yet, so the larger of two lower bounds stands for it.
        limit = eps * tl.maximum(total, exp(tl.minimum(bound - shift, HIGHEST)))
        limits = limit[:, None]
        if UNBIASED:
            a = tl.load(row_hashes_ptr + rows, mask=rows < N, other=0)
            b = tl.load(column_hashes_ptr + columns, mask=columns < V, other=0)
            limits *= uniform(a[:, None], b[None, :])
        # 5. A bit for each entry over the limit, 32 in a word.
        # Reshaped as bits and then shifted: shifted first, every word's 32 numbers would be held at once.
        bits = tl.reshape(e >= limits, (BLOCK_M, BLOCK_N // 32, 32)).to(tl.int32)
        word = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        # 6. The mass of the rest: entries under the limit, outside columns whose gradient is exact.
        # Compared once more: masks that were kept from above would fill a scalar register file.
        sparse = tl.load(is_sparse_ptr + columns, mask=columns < V, other=0).to(tl.float32)
        e *= sparse[None, :]
        e = tl.where(e < limits, e, 0.0)
        if HAS_SOFTCAP:
            capped = tl.maximum(z, -softcap) / softcap
            e *= 1.0 - capped * capped
        rest = rest * decay + tl.sum(e, 1)
        # 7. The words, without the bits of dense columns.
        # A label that is not among them is selected after the pass, once per row and not once per entry.
        place = column // 32 + tl.arange(0, BLOCK_N // 32)
        word &= tl.load(sparse_words_ptr + place)[None, :]
        tl.store(words_ptr + rows.to(tl.int64)[:, None] * words_stride + place[None, :], word, mask=(rows < N)[:, None])
    # 8. Partial sums, for merge_splits.
    place = split.to(tl.int64) * N + rows
    tl.store(partial_max_ptr + place, running_max, mask=rows < N)
    tl.store(partial_sum_ptr + place, total, mask=rows < N)
    tl.store(partial_rest_ptr + place, rest, mask=rows < N)


def selection_bits(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    rule: SelectionRule,
    words: Tensor,
    sums: dict[str, Tensor],
    config: TileConfig,
    *,
    lse_bounds: Tensor,
    is_sparse: Tensor,
    sparse_words: Tensor,
    hashes: tuple[Tensor, Tensor] | None,
    ignore_index: int,
) -> None:
    """Write the bits of a block of rows into `words` [≥ N, W], and its statistics into `sums`.

    Args:
        sums: (N,) each: `maximum`, `log_total` and `target` as in `HeadSums`, and as `lse_kappa` the logarithm of
            Σ e^z·J over entries of sparse columns that have no bit.
        lse_bounds: (N,) lower bounds of LSE(z).
        is_sparse: (V,) int8, 0 of columns that get no bits; sparse_words: (W,) the same as bits.
        hashes: the rows' and the columns' of `HashUniform` for an unbiased tail, or None.
    """
    n, d = hidden.shape
    splits = triton.cdiv(triton.cdiv(head.vocab_size, config.block_n), config.split_tiles)
    partial_max, partial_sum, partial_rest = hidden.new_empty((3, splits * n), dtype=torch.float32)
    row_hashes, column_hashes = (None, None) if hashes is None else hashes
    launch(
        selection_bits_kernel,
        triton.cdiv(n, config.block_m) * splits,
        on=hidden,
        options=config.options,
        hidden_ptr=operand(hidden, (config.block_m, config.block_k), config),
        weight_ptr=operand(head.weight, (config.block_n, config.block_k), config),
        bias_ptr=head.bias,
        labels_ptr=labels,
        lse_bounds_ptr=lse_bounds,
        is_sparse_ptr=is_sparse,
        sparse_words_ptr=sparse_words,
        row_hashes_ptr=row_hashes,
        column_hashes_ptr=column_hashes,
        partial_max_ptr=partial_max,
        partial_sum_ptr=partial_sum,
        partial_rest_ptr=partial_rest,
        target_ptr=sums["target"],
        words_ptr=words,
        N=n,
        V=head.vocab_size,
        D=d,
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        words_stride=words.stride(0),
        ignore_index=ignore_index,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 1.0,
        eps=rule.eps * SLACK,
        **config.switches,
        SPLIT_TILES=config.split_tiles,
        EVEN_K=d % config.block_k == 0,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        UNBIASED=hashes is not None,
        PRECISION=precision(hidden.dtype, target_of(hidden)),
    )
    # The logarithm of the rest is what the merge calls LSE(κz) at κ = 1: a second sum, taken from the same maximum.
    partials = {"maximum": partial_max, "log_total": partial_sum, "lse_kappa": partial_rest}
    merge_splits(partials, sums, splits, labels=labels, ignore_index=ignore_index, kappa=1.0)


def selection_tiles(hidden: Tensor, head: Head, *, unbiased: bool) -> TileConfig:
    heavy = head.softcap is not None or unbiased
    return tiles("selection_bits", hidden, head.weight, hidden.shape[0], heavy=heavy, bias=head.bias is not None)


def words_per_row(head: Head, config: TileConfig) -> int:
    """W: words of whole tiles."""
    return triton.cdiv(head.vocab_size, config.block_n) * config.block_n // 32
