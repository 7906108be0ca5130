"""Statistics of the vocabulary head, without logits: one product forward, a few floats per token.

Letters: N tokens, D hidden, V vocabulary, S splits of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.configs import UNTILED, TileConfig, precision
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile, without_end
from tvkd_fast.kernels.records import Head, HeadSums

PARTIAL_FLOATS = 4 * 2**20
"""Limit of the partial sums of one launch; more rows take more launches."""

MERGE_ROWS, MERGE_AT_ONCE = 32, 32
"""Rows of a program that merges splits, and the splits that it reads at once."""


@triton.jit
def moved_moment(moment, total, decay):
    """Σ e^z·z of sums that were taken from a maximum, taken `decay` lower: (moment + total·decay)·e^decay."""
    return (moment + tl.where(total > 0, total * decay, 0.0)) * exp(decay)


@triton.jit
def head_stats_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_sum_kappa_ptr,
    partial_moment_ptr,
    target_ptr,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    vocab_start,
    ignore_index,
    logit_scale,
    softcap,
    kappa,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_KAPPA: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile of rows and the split of the vocabulary; a tile of ignored rows costs nothing.
    tiles = tl.cdiv(V, BLOCK_N)
    m, split = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(tiles, SPLIT_TILES), GROUP)
    row = m * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    if HAS_LABELS:
        label = tl.load(labels_ptr + rows, mask=rows < N, other=ignore_index)
        if tl.max((label != ignore_index).to(tl.int32), 0) == 0:
            return
        # Compared as it came: an id that 32 bits cannot hold must not wrap round into the vocabulary.
        label = tl.where((label >= vocab_start) & (label < vocab_start + V), label - vocab_start, -1).to(tl.int32)
    # 2. Sums of the split so far, all taken from one running maximum.
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    total_kappa = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT_TILES
    for tile in range(first, tl.minimum(first + SPLIT_TILES, tiles)):
        # 3. Logits of a tile: they stay in registers.
        column = tile * BLOCK_N
        z = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, N, V, D, hidden_stride, weight_stride, logit_scale, softcap,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        # 4. z at the label, from the one program whose tile holds it.
        if HAS_LABELS:
            here = (label >= column) & (label < column + BLOCK_N)
            if tl.max(here.to(tl.int32), 0) > 0:
                columns = column + tl.arange(0, BLOCK_N)
                picked = tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
                tl.store(target_ptr + rows, picked, mask=here & (rows < N))
        # 5. A new maximum. Where all is −inf so far, 0 stands for it: −inf − (−inf) would be NaN.
        z = without_end(z, column, V, BLOCK_N)
        new_max = tl.maximum(running_max, tl.max(z, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = running_max - shift
        # 6. The tile's sums, added to the earlier ones, which decay by e^(old − new maximum).
        z -= shift[:, None]
        e = exp(z)
        if HAS_ENTROPY:
            moment = moved_moment(moment, total, decay) + tl.sum(tl.where(z > float("-inf"), e * z, 0.0), 1)
        total = total * exp(decay) + tl.sum(e, 1)
        if HAS_KAPPA:
            total_kappa = total_kappa * exp(kappa * decay) + tl.sum(exp(kappa * z), 1)
        running_max = new_max
    # 7. Partial sums, which merge_splits_kernel adds up in order: no atomics, so the same bits each time.
    place = split.to(tl.int64) * N + rows
    tl.store(partial_max_ptr + place, running_max, mask=rows < N)
    tl.store(partial_sum_ptr + place, total, mask=rows < N)
    if HAS_KAPPA:
        tl.store(partial_sum_kappa_ptr + place, total_kappa, mask=rows < N)
    if HAS_ENTROPY:
        tl.store(partial_moment_ptr + place, moment, mask=rows < N)


@triton.jit
def merge_splits_kernel(
    partial_max_ptr,
    partial_sum_ptr,
    partial_sum_kappa_ptr,
    partial_moment_ptr,
    labels_ptr,
    maximum_ptr,
    log_total_ptr,
    lse_kappa_ptr,
    entropy_ptr,
    N,
    splits,
    ignore_index,
    kappa,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_KAPPA: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    # 1. Rows that count; of the others zeros are written.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    wanted = inside
    if HAS_LABELS:
        wanted = inside & (tl.load(labels_ptr + rows, mask=inside, other=ignore_index) != ignore_index)
    running_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_kappa = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    # 2. Some splits at a time: both sides decay to the larger maximum before they are added.
    for first in range(0, splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        there = (split < splits)[:, None] & wanted[None, :]
        place = split.to(tl.int64)[:, None] * N + rows[None, :]
        split_max = tl.load(partial_max_ptr + place, mask=there, other=float("-inf"))
        split_sum = tl.load(partial_sum_ptr + place, mask=there, other=0.0)
        new_max = tl.maximum(running_max, tl.max(split_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay, split_decay = running_max - shift, split_max - shift[None, :]
        if HAS_KAPPA:
            split_kappa = tl.load(partial_sum_kappa_ptr + place, mask=there, other=0.0)
            total_kappa = total_kappa * exp(kappa * decay) + tl.sum(split_kappa * exp(kappa * split_decay), 0)
        if HAS_ENTROPY:
            split_moment = tl.load(partial_moment_ptr + place, mask=there, other=0.0)
            more = tl.sum(moved_moment(split_moment, split_sum, split_decay), 0)
            moment = moved_moment(moment, total, decay) + more
        total = total * exp(decay) + tl.sum(split_sum * exp(split_decay), 0)
        running_max = new_max
    # 3. Logarithms of the sums, and the entropy from their quotient.
    tl.store(maximum_ptr + rows, tl.where(wanted, running_max, 0.0), mask=inside)
    log_sum = tl.where(wanted, tl.log(total), 0.0)
    tl.store(log_total_ptr + rows, log_sum, mask=inside)
    if HAS_KAPPA:
        tl.store(lse_kappa_ptr + rows, tl.where(wanted, tl.log(total_kappa) + kappa * running_max, 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + rows, tl.where(wanted, log_sum - moment / total, 0.0), mask=inside)


def head_sums(
    hidden: Tensor,
    head: Head,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kappa: float | None = None,
    entropy: bool = False,
    vocab_start: int = 0,
    absent: float = math.nan,
    config: TileConfig | None = None,
) -> HeadSums:
    """Statistics per row of hidden: max z and log Σ exp(z − max z); on request z at the label, LSE(κz), the entropy.

    Each program reduces `config.split_tiles` column tiles of one row tile online and writes its partial sums; a second,
    small kernel merges the S splits in order. No atomics and no locks: bitwise repeatable.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, columns contiguous.
        head: weight [V, D] and bias (V,) of hidden's dtype, columns contiguous.
        labels: (N,) int32 or int64 token ids, contiguous. A row labelled `ignore_index` gets sums of 0 and a
            meaningless `target`; a row tile of only such rows is not computed.
        kappa: also return LSE(κz), from the same tiles and maximum: κ·max z = max κz.
        entropy: also return −Σ p log p.
        vocab_start: the token id of weight's first row, where the vocabulary is sharded.
        absent: `target` where the label is no row of weight; NaN shows a label that is out of range, 0 lets shards be
            added.
        config: tiles to take in place of the table's.

    Traffic: hidden is read once per column of tiles and weight once per group of row tiles, both mostly from L2; 8
    bytes per row and split are written and read again (4 more each for LSE(κz) and the entropy). Nothing of size N·V.
    """
    n, d = hidden.shape
    demand = {"heavy": head.softcap is not None or entropy, "bias": head.bias is not None}
    config = config or tiles("head_stats", hidden, head.weight, n, **demand)
    splits = triton.cdiv(triton.cdiv(head.vocab_size, config.block_n), config.split_tiles)
    names = ["maximum", "log_total"] + ["lse_kappa"] * (kappa is not None) + ["entropy"] * entropy
    sums = {name: hidden.new_empty(n, dtype=torch.float32) for name in names}
    if labels is not None:
        sums["target"] = hidden.new_full((n,), absent, dtype=torch.float32)
    step = max(1, min(n, PARTIAL_FLOATS // (len(names) * splits) // config.block_m * config.block_m))
    partials = dict(zip(names, hidden.new_empty((len(names), splits * step), dtype=torch.float32), strict=True))
    for rows in slices(n, step):
        block, block_labels = hidden[rows], None if labels is None else labels[rows]
        block_sums = {name: values[rows] for name, values in sums.items()}
        launch(
            head_stats_kernel,
            triton.cdiv(block.shape[0], config.block_m) * splits,
            on=hidden,
            options=config.options,
            hidden_ptr=operand(block, (config.block_m, config.block_k), config),
            weight_ptr=operand(head.weight, (config.block_n, config.block_k), config),
            bias_ptr=head.bias,
            labels_ptr=block_labels,
            partial_max_ptr=partials["maximum"],
            partial_sum_ptr=partials["log_total"],
            partial_sum_kappa_ptr=partials.get("lse_kappa"),
            partial_moment_ptr=partials.get("entropy"),
            target_ptr=block_sums.get("target"),
            N=block.shape[0],
            V=head.vocab_size,
            D=d,
            hidden_stride=hidden.stride(0),
            weight_stride=head.weight.stride(0),
            vocab_start=vocab_start,
            ignore_index=ignore_index,
            logit_scale=head.logit_scale,
            softcap=head.softcap or 1.0,
            kappa=kappa or 1.0,
            **config.switches,
            SPLIT_TILES=config.split_tiles,
            EVEN_K=d % config.block_k == 0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            HAS_LABELS=labels is not None,
            HAS_KAPPA=kappa is not None,
            HAS_ENTROPY=entropy,
            PRECISION=precision(hidden.dtype, target_of(hidden)),
        )
        merge_splits(partials, block_sums, splits, labels=block_labels, ignore_index=ignore_index, kappa=kappa or 1.0)
    return HeadSums(**sums)


def merge_splits(
    partials: dict[str, Tensor],
    sums: dict[str, Tensor],
    splits: int,
    *,
    labels: Tensor | None,
    ignore_index: int,
    kappa: float,
) -> None:
    """Merge each row's partial sums over the splits, in their order.

    Args:
        partials: [S·N] each, split by split: the `maximum`, Σ exp(z − max z) as `log_total`, and where asked for
            Σ exp(κ(z − max z)) as `lse_kappa` and Σ exp(z − max z)·(z − max z) as `entropy`. Another sum that was taken
            from the same maximum may stand for `lse_kappa`: its logarithm plus κ·max z is written.
        sums: (N,) of the same names, written: fields of `HeadSums`. Others are left alone.
        labels: (N,) or None; rows labelled `ignore_index` get 0.
    """
    n = len(sums["maximum"])
    launch(
        merge_splits_kernel,
        triton.cdiv(n, MERGE_ROWS),
        on=sums["maximum"],
        options=UNTILED,
        partial_max_ptr=partials["maximum"],
        partial_sum_ptr=partials["log_total"],
        partial_sum_kappa_ptr=partials.get("lse_kappa"),
        partial_moment_ptr=partials.get("entropy"),
        labels_ptr=labels,
        maximum_ptr=sums["maximum"],
        log_total_ptr=sums["log_total"],
        lse_kappa_ptr=sums.get("lse_kappa"),
        entropy_ptr=sums.get("entropy"),
        N=n,
        splits=splits,
        ignore_index=ignore_index,
        kappa=kappa,
        ROWS=MERGE_ROWS,
        AT_ONCE=MERGE_AT_ONCE,
        HAS_LABELS=labels is not None,
        HAS_KAPPA="lse_kappa" in sums,
        HAS_ENTROPY="entropy" in sums,
    )
