"""Statistics of two vocabulary heads in one walk: divergences between their softmaxes, without logits of either.

A program computes a tile of the student's logits z and the same columns of the teacher's logits u, and keeps running
sums of both and of their differences. p = softmax(z) is the student's, `other` names what is the teacher's.

Letters: N tokens, D hidden (OTHER_D the teacher's), V vocabulary, S splits of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.autotune import joint_tiles
from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.configs import UNTILED, TileConfig, precision
from tvkd_fast.kernels.head_stats import MERGE_AT_ONCE, MERGE_ROWS, PARTIAL_FLOATS, moved_moment
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile, without_end
from tvkd_fast.kernels.records import Head, HeadSums, JointSums


@triton.jit
def finite(maximum):
    """What logits are taken from: their maximum, and 0 where all are −inf, since −inf − (−inf) would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def moved_gap(gap, total, further, keep):
    """Σ e^{u − m}·((u − m) − (z − l)) with m and l at new places: total = Σ e^{u − m} before, keep = e^{m − new m},
    further = (m − new m) − (l − new l).

    Where nothing of the sum is kept, neither is an infinite difference: 0·∞ counts as 0.
    """
    return tl.where(keep > 0.0, (gap + total * further) * keep, 0.0)


@triton.jit
def joint_stats_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    other_hidden_ptr,
    other_weight_ptr,
    other_bias_ptr,
    labels_ptr,
    partials_ptr,
    target_ptr,
    N,
    V,
    D,
    OTHER_D,
    hidden_stride,
    weight_stride,
    other_hidden_stride,
    other_weight_stride,
    partials_stride,
    vocab_start,
    ignore_index,
    logit_scale,
    softcap,
    other_logit_scale,
    other_softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
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
    # 2. Sums of the split so far, each side's taken from its own running maximum.
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    other_top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    other_total = tl.zeros((BLOCK_M,), tl.float32)
    forward = tl.zeros((BLOCK_M,), tl.float32)
    reverse = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT_TILES
    for tile in range(first, tl.minimum(first + SPLIT_TILES, tiles)):
        # 3. Logits of both heads at the same columns: they stay in registers.
        column = tile * BLOCK_N
        u = logits_tile(
            other_hidden_ptr, other_weight_ptr, other_bias_ptr, row, column, N, V, OTHER_D, other_hidden_stride,
            other_weight_stride, other_logit_scale, other_softcap, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK,
            HAS_OTHER_BIAS, HAS_OTHER_SOFTCAP, PRECISION,
        )  # fmt: skip
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
        # 5. New maxima, and how far each side's sums move.
        z = without_end(z, column, V, BLOCK_N)
        u = without_end(u, column, V, BLOCK_N)
        new_top = tl.maximum(top, tl.max(z, 1))
        new_other_top = tl.maximum(other_top, tl.max(u, 1))
        shift, other_shift = finite(new_top), finite(new_other_top)
        further = (finite(other_top) - other_shift) - (finite(top) - shift)
        decay = top - shift
        keep, other_keep = exp(decay), exp(other_top - other_shift)
        # 6. The tile's sums. An entry of no weight counts as nothing, however far the other side's logit is.
        z -= shift[:, None]
        u -= other_shift[:, None]
        e, f = exp(z), exp(u)
        gap = u - z
        forward = moved_gap(forward, other_total, further, other_keep) + tl.sum(tl.where(f > 0.0, f * gap, 0.0), 1)
        reverse = moved_gap(reverse, total, -further, keep) - tl.sum(tl.where(e > 0.0, e * gap, 0.0), 1)
        if HAS_ENTROPY:
            moment = moved_moment(moment, total, decay) + tl.sum(tl.where(e > 0.0, e * z, 0.0), 1)
        if HAS_SQUARES:
            squares = squares * keep * keep + tl.sum(e * e, 1)
        total = total * keep + tl.sum(e, 1)
        other_total = other_total * other_keep + tl.sum(f, 1)
        top, other_top = new_top, new_other_top
    # 7. Partial sums, which joint_merge_kernel adds up in order: no atomics, so the same bits each time.
    inside = rows < N
    place = partials_ptr + split.to(tl.int64) * N + rows
    tl.store(place, top, mask=inside)
    tl.store(place + partials_stride, total, mask=inside)
    tl.store(place + 2 * partials_stride, other_top, mask=inside)
    tl.store(place + 3 * partials_stride, other_total, mask=inside)
    tl.store(place + 4 * partials_stride, forward, mask=inside)
    tl.store(place + 5 * partials_stride, reverse, mask=inside)
    if HAS_ENTROPY:
        tl.store(place + 6 * partials_stride, moment, mask=inside)
    if HAS_SQUARES:
        tl.store(place + 7 * partials_stride, squares, mask=inside)


PARTIALS = 8
"""Sums that a program writes for each row, in the order above; room for all of them, whichever are asked for."""


@triton.jit
def joint_merge_kernel(
    partials_ptr,
    labels_ptr,
    maximum_ptr,
    log_total_ptr,
    other_maximum_ptr,
    other_log_total_ptr,
    forward_kl_ptr,
    reverse_kl_ptr,
    entropy_ptr,
    log_squares_ptr,
    N,
    splits,
    partials_stride,
    ignore_index,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
):
    # 1. Rows that count; of the others zeros are written.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    wanted = inside
    if HAS_LABELS:
        wanted = inside & (tl.load(labels_ptr + rows, mask=inside, other=ignore_index) != ignore_index)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    other_top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    other_total = tl.zeros((ROWS,), tl.float32)
    forward = tl.zeros((ROWS,), tl.float32)
    reverse = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    # 2. Some splits at a time: all sides move to the larger maxima before they are added.
    for first in range(0, splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        there = (split < splits)[:, None] & wanted[None, :]
        place = partials_ptr + split.to(tl.int64)[:, None] * N + rows[None, :]
        split_top = tl.load(place, mask=there, other=float("-inf"))
        split_total = tl.load(place + partials_stride, mask=there, other=0.0)
        split_other_top = tl.load(place + 2 * partials_stride, mask=there, other=float("-inf"))
        split_other_total = tl.load(place + 3 * partials_stride, mask=there, other=0.0)
        split_forward = tl.load(place + 4 * partials_stride, mask=there, other=0.0)
        split_reverse = tl.load(place + 5 * partials_stride, mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(split_top, 0))
        new_other_top = tl.maximum(other_top, tl.max(split_other_top, 0))
        shift, other_shift = finite(new_top), finite(new_other_top)
        further = (finite(other_top) - other_shift) - (finite(top) - shift)
        split_further = (finite(split_other_top) - other_shift[None, :]) - (finite(split_top) - shift[None, :])
        decay, split_decay = top - shift, split_top - shift[None, :]
        keep, split_keep = exp(decay), exp(split_decay)
        other_keep, split_other_keep = exp(other_top - other_shift), exp(split_other_top - other_shift[None, :])
        more = tl.sum(moved_gap(split_forward, split_other_total, split_further, split_other_keep), 0)
        forward = moved_gap(forward, other_total, further, other_keep) + more
        more = tl.sum(moved_gap(split_reverse, split_total, -split_further, split_keep), 0)
        reverse = moved_gap(reverse, total, -further, keep) + more
        if HAS_ENTROPY:
            split_moment = tl.load(place + 6 * partials_stride, mask=there, other=0.0)
            more = tl.sum(moved_moment(split_moment, split_total, split_decay), 0)
            moment = moved_moment(moment, total, decay) + more
        if HAS_SQUARES:
            split_squares = tl.load(place + 7 * partials_stride, mask=there, other=0.0)
            squares = squares * keep * keep + tl.sum(split_squares * split_keep * split_keep, 0)
        total = total * keep + tl.sum(split_total * split_keep, 0)
        other_total = other_total * other_keep + tl.sum(split_other_total * split_other_keep, 0)
        top, other_top = new_top, new_other_top
    # 3. Logarithms of the sums, and what follows from quotients. A divergence that rounding made negative is 0.
    log_sum, other_log_sum = tl.log(total), tl.log(other_total)
    forward_kl = forward / other_total + (log_sum - other_log_sum)
    reverse_kl = reverse / total - (log_sum - other_log_sum)
    tl.store(maximum_ptr + rows, tl.where(wanted, top, 0.0), mask=inside)
    tl.store(log_total_ptr + rows, tl.where(wanted, log_sum, 0.0), mask=inside)
    tl.store(other_maximum_ptr + rows, tl.where(wanted, other_top, 0.0), mask=inside)
    tl.store(other_log_total_ptr + rows, tl.where(wanted, other_log_sum, 0.0), mask=inside)
    tl.store(forward_kl_ptr + rows, tl.where(wanted & ~(forward_kl < 0.0), forward_kl, 0.0), mask=inside)
    tl.store(reverse_kl_ptr + rows, tl.where(wanted & ~(reverse_kl < 0.0), reverse_kl, 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + rows, tl.where(wanted, log_sum - moment / total, 0.0), mask=inside)
    if HAS_SQUARES:
        tl.store(log_squares_ptr + rows, tl.where(wanted, tl.log(squares) - 2.0 * log_sum, 0.0), mask=inside)


def joint_sums(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    squares: bool = False,
    vocab_start: int = 0,
    absent: float = math.nan,
    config: TileConfig | None = None,
) -> JointSums:
    """Both log-sum-exps and both KLs per row, p = softmax of `head`'s logits z, q of `other_head`'s u.

    With every sum taken from the maxima m of z and l of u: D = Σ e^{u−l}·((u−l) − (z−m)), S = Σ e^{z−m}, T = Σ e^{u−l}
    give KL(q‖p) = D/T + log S − log T, and KL(p‖q) alike. Differences are summed, not two means apart: those would
    differ by a few 1e-5 nats in float32. Rounding may not make a KL negative: it is 0 then.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, columns contiguous; other_hidden [N, D'] of the same dtype.
        head: weight [V, D] and bias (V,) of hidden's dtype, columns contiguous; other_head [V, D'] alike.
        labels: (N,) int32 or int64 token ids, contiguous. A row labelled `ignore_index` gets sums of 0 and a
            meaningless `target`; a row tile of only such rows is not computed.
        entropy: also return −Σ p log p, as `own.entropy`.
        squares: also return log Σ p².
        vocab_start: the token id of weight's first row, where the vocabulary is sharded.
        absent: `own.target`, z at the label, where the label is no row of weight.
        config: tiles to take in place of the table's.

    A row of −inf only, of either side, has no softmax: its divergences are NaN. Where q_j > 0 = p_j, KL(q‖p) is
    infinite. Temperatures are the heads': `Head.at_temperature`.

    Traffic: hidden states and weights of both as `head_sums` reads them; up to 32 bytes per row and split. One product
    of each side.
    """
    n = hidden.shape[0]
    assert other_hidden.shape[0] == n
    assert other_head.vocab_size == head.vocab_size
    assert other_hidden.dtype == hidden.dtype == head.weight.dtype == other_head.weight.dtype
    more = labels is not None or entropy or squares or biased(head, other_head)
    demand = {"heavy": heavy(head, other_head) or more, "bias": biased(head, other_head)}
    config = config or joint_tiles("joint_stats", (hidden, other_hidden), (head.weight, other_head.weight), **demand)
    splits = triton.cdiv(triton.cdiv(head.vocab_size, config.block_n), config.split_tiles)
    names = ["maximum", "log_total", "other_maximum", "other_log_total", "forward_kl", "reverse_kl"]
    names += ["entropy"] * entropy + ["log_squares"] * squares
    sums = {name: hidden.new_empty(n, dtype=torch.float32) for name in names}
    if labels is not None:
        sums["target"] = hidden.new_full((n,), absent, dtype=torch.float32)
    step = max(1, min(n, PARTIAL_FLOATS // (PARTIALS * splits) // config.block_m * config.block_m))
    partials = hidden.new_empty((PARTIALS, splits * step), dtype=torch.float32)
    for rows in slices(n, step):
        block, other_block = hidden[rows], other_hidden[rows]
        block_labels = None if labels is None else labels[rows]
        block_sums = {name: values[rows] for name, values in sums.items()}
        launch(
            joint_stats_kernel,
            triton.cdiv(block.shape[0], config.block_m) * splits,
            on=hidden,
            options=config.options,
            **two_heads(block, head, other_block, other_head, config),
            labels_ptr=block_labels,
            partials_ptr=partials,
            target_ptr=block_sums.get("target"),
            N=block.shape[0],
            V=head.vocab_size,
            partials_stride=partials.stride(0),
            vocab_start=vocab_start,
            ignore_index=ignore_index,
            **config.switches,
            SPLIT_TILES=config.split_tiles,
            HAS_LABELS=labels is not None,
            HAS_ENTROPY=entropy,
            HAS_SQUARES=squares,
        )
        launch(
            joint_merge_kernel,
            triton.cdiv(block.shape[0], MERGE_ROWS),
            on=hidden,
            options=UNTILED,
            partials_ptr=partials,
            labels_ptr=block_labels,
            maximum_ptr=block_sums["maximum"],
            log_total_ptr=block_sums["log_total"],
            other_maximum_ptr=block_sums["other_maximum"],
            other_log_total_ptr=block_sums["other_log_total"],
            forward_kl_ptr=block_sums["forward_kl"],
            reverse_kl_ptr=block_sums["reverse_kl"],
            entropy_ptr=block_sums.get("entropy"),
            log_squares_ptr=block_sums.get("log_squares"),
            N=block.shape[0],
            splits=splits,
            partials_stride=partials.stride(0),
            ignore_index=ignore_index,
            ROWS=MERGE_ROWS,
            AT_ONCE=MERGE_AT_ONCE,
            HAS_LABELS=labels is not None,
            HAS_ENTROPY=entropy,
            HAS_SQUARES=squares,
        )
    own = HeadSums(sums["maximum"], sums["log_total"], target=sums.get("target"), entropy=sums.get("entropy"))
    other = HeadSums(sums["other_maximum"], sums["other_log_total"])
    return JointSums(own, other, sums["forward_kl"], sums["reverse_kl"], sums.get("log_squares"))


def two_heads(
    hidden: Tensor, head: Head, other_hidden: Tensor, other_head: Head, config: TileConfig
) -> dict[str, object]:
    """The arguments by which every joint kernel takes two heads and their states."""
    d, other_d = hidden.shape[1], other_hidden.shape[1]
    return {
        "hidden_ptr": operand(hidden, (config.block_m, config.block_k), config),
        "weight_ptr": operand(head.weight, (config.block_n, config.block_k), config),
        "bias_ptr": head.bias,
        "other_hidden_ptr": operand(other_hidden, (config.block_m, config.block_k), config),
        "other_weight_ptr": operand(other_head.weight, (config.block_n, config.block_k), config),
        "other_bias_ptr": other_head.bias,
        "D": d,
        "OTHER_D": other_d,
        "hidden_stride": hidden.stride(0),
        "weight_stride": head.weight.stride(0),
        "other_hidden_stride": other_hidden.stride(0),
        "other_weight_stride": other_head.weight.stride(0),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or 1.0,
        "other_logit_scale": other_head.logit_scale,
        "other_softcap": other_head.softcap or 1.0,
        "EVEN_K": d % config.block_k == 0 and other_d % config.block_k == 0,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "HAS_OTHER_BIAS": other_head.bias is not None,
        "HAS_OTHER_SOFTCAP": other_head.softcap is not None,
        "PRECISION": precision(hidden.dtype, target_of(hidden)),
    }


def heavy(*heads: Head) -> bool:
    """Return whether a softcap's derivative is held beside any head's logits."""
    return any(head.softcap is not None for head in heads)


def biased(*heads: Head) -> bool:
    return any(head.bias is not None for head in heads)
