"""A second walk over two vocabulary heads: divergences by way of a mixture, total variation, and Σ p^α·q^{1−α}.

They need p and q themselves, and so both normalizers, which a first walk leaves. p = softmax(z), q = softmax(u), and
m = (1 − β')p + β'q.

Letters: N tokens, D hidden (OTHER_D the other side's), V vocabulary, S splits of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.autotune import joint_tiles
from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.configs import TileConfig
from tvkd_fast.kernels.head_stats import PARTIAL_FLOATS
from tvkd_fast.kernels.joint_stats import biased, heavy, two_heads
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile, without_end
from tvkd_fast.kernels.records import Head, JointSums, JointValues

LEAST = tl.constexpr(-1e20)
"""Stands for log 0: times 0 it is 0, and it differs from itself by 0."""
FARTHEST = tl.constexpr(200.0)
"""Nats beyond which the larger of p and q makes up all of m, in float32, and the smaller is 0 beside it."""


@triton.jit
def log_softmax(z, top, rest):
    """log p of logits, LEAST where p = 0, and NaN where z or its normalizer is."""
    return tl.maximum(z - top[:, None] - rest[:, None], LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log_ratio(log_p, log_q):
    """log q/p, within ±FARTHEST."""
    return tl.minimum(tl.maximum(log_q - log_p, -FARTHEST), FARTHEST)


@triton.jit
def log_over_mixture(ratio, log_rest, log_beta):
    """log p/m and log q/m of ratio = log q/p, without a quotient: −log((1 − β') + β'·q/p), −log((1 − β')·p/q + β')."""
    lead = ratio + log_beta
    more = tl.log(1.0 + exp(-tl.abs(lead - log_rest)))
    return -(tl.maximum(log_rest, lead) + more), -(tl.maximum(log_rest - ratio, log_beta) + more)


@triton.jit
def excess_of(weight, of, w):
    """weight·(w + e^{−w} − 1) ≥ 0, where of = weight·e^{−w}: by a series where rounding would leave nothing."""
    near = weight * w * w * (0.5 - w * (1.0 / 6.0 - w * (1.0 / 24.0 - w * (1.0 / 120.0))))
    return tl.where(tl.abs(w) < 0.125, near, weight * w + (of - weight))


@triton.jit
def sign(x):
    """−1, 0 or 1; by two bounds, which hold no mask."""
    return tl.minimum(tl.maximum(x * 1e37, -1.0), 1.0)


@triton.jit
def joint_values_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    other_hidden_ptr,
    other_weight_ptr,
    other_bias_ptr,
    labels_ptr,
    maximum_ptr,
    log_total_ptr,
    other_maximum_ptr,
    other_log_total_ptr,
    partials_ptr,
    N,
    V,
    D,
    OTHER_D,
    hidden_stride,
    weight_stride,
    other_hidden_stride,
    other_weight_stride,
    partials_stride,
    ignore_index,
    logit_scale,
    softcap,
    other_logit_scale,
    other_softcap,
    beta,
    log_rest,
    log_beta,
    alpha,
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
    HAS_MIXTURE: tl.constexpr,
    HAS_VARIATION: tl.constexpr,
    HAS_POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile of rows and the split of the vocabulary; a tile of ignored rows costs nothing.
    tiles = tl.cdiv(V, BLOCK_N)
    m, split = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(tiles, SPLIT_TILES), GROUP)
    row = m * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < N
    wanted = inside
    if HAS_LABELS:
        wanted = inside & (tl.load(labels_ptr + rows, mask=inside, other=ignore_index) != ignore_index)
    to_mixture = tl.zeros((BLOCK_M,), tl.float32)
    other_to_mixture = tl.zeros((BLOCK_M,), tl.float32)
    overlap = tl.zeros((BLOCK_M,), tl.float32)
    variation = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    power = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT_TILES
    last = tl.minimum(first + SPLIT_TILES, tiles)
    if tl.max(wanted.to(tl.int32), 0) == 0:
        last = first
    top = tl.load(maximum_ptr + rows, mask=inside, other=0.0)
    rest = tl.load(log_total_ptr + rows, mask=inside, other=0.0)
    other_top = tl.load(other_maximum_ptr + rows, mask=inside, other=0.0)
    other_rest = tl.load(other_log_total_ptr + rows, mask=inside, other=0.0)
    for tile in range(first, last):
        # 2. log p and log q of a tile.
        column = tile * BLOCK_N
        y = logits_tile(
            other_hidden_ptr, other_weight_ptr, other_bias_ptr, row, column, N, V, OTHER_D, other_hidden_stride,
            other_weight_stride, other_logit_scale, other_softcap, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK,
            HAS_OTHER_BIAS, HAS_OTHER_SOFTCAP, PRECISION,
        )  # fmt: skip
        x = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, N, V, D, hidden_stride, weight_stride, logit_scale, softcap,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        x = log_softmax(without_end(x, column, V, BLOCK_N), top, rest)
        y = log_softmax(without_end(y, column, V, BLOCK_N), other_top, other_rest)
        if HAS_POWER:
            power += tl.sum(exp(alpha * x + (1.0 - alpha) * y), 1)
        p, q = exp(x), exp(y)
        # 3. Their sums: nothing decays, since p and q are what they are.
        if HAS_MIXTURE:
            ours, theirs = log_over_mixture(log_ratio(x, y), log_rest, log_beta)
            mixed = p + beta * (q - p)
            overlap += tl.sum(p * exp(theirs), 1)
            other_to_mixture += tl.sum(excess_of(q, mixed, theirs), 1)
            to_mixture += tl.sum(excess_of(p, mixed, ours), 1)
        if HAS_VARIATION:
            more = p - q
            variation += tl.sum(tl.abs(more), 1)
            excess += tl.sum(p * sign(more), 1)
    # 4. Partial sums of the split, which are added up in order; of ignored rows zeros.
    place = partials_ptr + split.to(tl.int64) * N + rows
    if HAS_MIXTURE:
        tl.store(place, tl.where(wanted, other_to_mixture, 0.0), mask=inside)
        tl.store(place + partials_stride, tl.where(wanted, to_mixture, 0.0), mask=inside)
        tl.store(place + 2 * partials_stride, tl.where(wanted, overlap, 0.0), mask=inside)
    if HAS_VARIATION:
        tl.store(place + 3 * partials_stride, tl.where(wanted, 0.5 * variation, 0.0), mask=inside)
        tl.store(place + 4 * partials_stride, tl.where(wanted, excess, 0.0), mask=inside)
    if HAS_POWER:
        tl.store(place + 5 * partials_stride, tl.where(wanted, power, 0.0), mask=inside)


PARTIALS = 6
"""Sums that a program writes for each row, in the order above and in that of `JointValues`."""


def joint_values(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    sums: JointSums,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    beta: float | None = None,
    variation: bool = False,
    alpha: float | None = None,
    config: TileConfig | None = None,
) -> JointValues:
    """Divergences per row that need p and q themselves, from a second walk; what is not asked for stays None.

    KL(q‖m) is summed as Σ q·(w + e^{−w} − 1) with w = log q/m, whose terms are not negative; KL(p‖m) alike.

    Args:
        hidden: [N, D] and head, other_hidden [N, D'] and other_head as `joint_sums` took them.
        sums: as `joint_sums` gave them.
        labels: (N,) or None; rows labelled `ignore_index` get 0.
        beta: β' in (0, 1) of the mixture m = (1 − β')p + β'q, for `other_to_mixture`, `own_to_mixture`, `overlap`. At 0
            and 1 these are the KLs of a first walk.
        variation: for `total_variation` and `excess`.
        alpha: in (0, 1), for `power`.

    Traffic: as `joint_sums`; 24 bytes per row and split. One product of each side.
    """
    assert beta is None or 0.0 < beta < 1.0, "β' of 0 and 1 name KLs of joint_sums"
    assert alpha is None or 0.0 < alpha < 1.0
    n = hidden.shape[0]
    more = variation or alpha is not None
    demand = {"heavy": heavy(head, other_head) or more, "bias": biased(head, other_head)}
    config = config or joint_tiles("joint_values", (hidden, other_hidden), (head.weight, other_head.weight), **demand)
    splits = triton.cdiv(triton.cdiv(head.vocab_size, config.block_n), config.split_tiles)
    step = max(1, min(n, PARTIAL_FLOATS // (PARTIALS * splits) // config.block_m * config.block_m))
    partials = hidden.new_empty((PARTIALS, splits, step), dtype=torch.float32)
    asked = [0, 1, 2] * (beta is not None) + [3, 4] * variation + [5] * (alpha is not None)
    values = {k: hidden.new_empty(n, dtype=torch.float32) for k in asked}
    for rows in slices(n, step):
        block, other_block = hidden[rows], other_hidden[rows]
        count = block.shape[0]
        launch(
            joint_values_kernel,
            triton.cdiv(count, config.block_m) * splits,
            on=hidden,
            options=config.options,
            **two_heads(block, head, other_block, other_head, config),
            labels_ptr=None if labels is None else labels[rows],
            maximum_ptr=sums.own.maximum[rows],
            log_total_ptr=sums.own.log_total[rows],
            other_maximum_ptr=sums.other.maximum[rows],
            other_log_total_ptr=sums.other.log_total[rows],
            partials_ptr=partials,
            N=count,
            V=head.vocab_size,
            partials_stride=partials.stride(0),
            ignore_index=ignore_index,
            beta=beta or 0.5,
            log_rest=math.log1p(-(beta or 0.5)),
            log_beta=math.log(beta or 0.5),
            alpha=alpha or 0.5,
            **config.switches,
            SPLIT_TILES=config.split_tiles,
            HAS_LABELS=labels is not None,
            HAS_MIXTURE=beta is not None,
            HAS_VARIATION=variation,
            HAS_POWER=alpha is not None,
        )
        written = partials.view(PARTIALS, -1)[:, : splits * count].view(PARTIALS, splits, count)
        for k, total in values.items():
            torch.sum(written[k], 0, out=total[rows])
    return JointValues(beta, alpha, *(values.get(k) for k in range(PARTIALS)))
