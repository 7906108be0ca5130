"""The gradient of a mixture of divergences by one side's logits, recomputed a block of rows and columns at a time.

p = softmax(z) is that side's, whichever it is, and q = softmax(u) the other's; m = (1 − β')p + β'q.

Letters: R rows and C columns of a block, D hidden (OTHER_D the other side's).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import TileConfig
from tvkd_fast.kernels.joint_stats import two_heads
from tvkd_fast.kernels.joint_values import log_over_mixture, log_ratio, log_softmax, sign
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile
from tvkd_fast.kernels.records import Head, JointSums


class Flags(NamedTuple):
    """The parts of a mixture beside p − q and a label, each of which costs some arithmetic per entry."""

    logs: bool = False
    mixture: bool = False
    variation: bool = False
    power: bool = False


@triton.jit
def factor(factors_ptr, which: tl.constexpr, rows, R, factors_stride):
    """[R', 1] one of the rows' factors."""
    return tl.load(factors_ptr + which * factors_stride + rows, mask=rows < R, other=0.0)[:, None]


@triton.jit
def joint_dlogits_kernel(
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
    factors_ptr,
    dlogits_ptr,
    column_sums_ptr,
    R,
    C,
    D,
    OTHER_D,
    hidden_stride,
    weight_stride,
    other_hidden_stride,
    other_weight_stride,
    factors_stride,
    dlogits_stride,
    first_column,
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
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_LOGS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_VARIATION: tl.constexpr,
    HAS_POWER: tl.constexpr,
    HAS_COLUMN_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. Logits of the tile on both sides, recomputed, to log p and log q.
    m, n = grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP)
    row, column = m * BLOCK_M, n * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    y = logits_tile(
        other_hidden_ptr, other_weight_ptr, other_bias_ptr, row, column, R, C, OTHER_D, other_hidden_stride,
        other_weight_stride, other_logit_scale, other_softcap, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK,
        HAS_OTHER_BIAS, HAS_OTHER_SOFTCAP, PRECISION,
    )  # fmt: skip
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, row, column, R, C, D, hidden_stride, weight_stride, logit_scale, softcap,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    top = tl.load(maximum_ptr + rows, mask=rows < R, other=0.0)
    rest = tl.load(log_total_ptr + rows, mask=rows < R, other=0.0)
    other_top = tl.load(other_maximum_ptr + rows, mask=rows < R, other=0.0)
    other_rest = tl.load(other_log_total_ptr + rows, mask=rows < R, other=0.0)
    x, y = log_softmax(z, top, rest), log_softmax(y, other_top, other_rest)
    # 2. What multiplies p, and what stands by itself.
    inner = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + factor(factors_ptr, 0, rows, R, factors_stride)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_POWER:
        g += factor(factors_ptr, 8, rows, R, factors_stride) * exp(alpha * x + (1.0 - alpha) * y)
    if HAS_MIXTURE:
        ours, theirs = log_over_mixture(log_ratio(x, y), log_rest, log_beta)
        to_own = factor(factors_ptr, 5, rows, R, factors_stride)
        inner += to_own * (ours - (1.0 - beta) * exp(ours))
        inner -= factor(factors_ptr, 6, rows, R, factors_stride) * (1.0 - beta) * exp(theirs)
    if HAS_VARIATION:
        inner += factor(factors_ptr, 7, rows, R, factors_stride) * sign(x - y)
    if HAS_LOGS:
        inner += factor(factors_ptr, 3, rows, R, factors_stride) * y
        inner += factor(factors_ptr, 2, rows, R, factors_stride) * x
    g += factor(factors_ptr, 1, rows, R, factors_stride) * exp(y)
    p = exp(x)
    if HAS_LOGS:
        inner += factor(factors_ptr, 4, rows, R, factors_stride) * p
    # A broken state on either side shows, whatever its factors are.
    g += p * inner
    # 3. The label's share, in the tile that holds it.
    wanted = rows < R
    if HAS_LABELS:
        label = tl.load(labels_ptr + rows, mask=wanted, other=ignore_index)
        wanted = wanted & (label != ignore_index)
        local = tl.where((label >= first_column) & (label < first_column + C), label - first_column, -1).to(tl.int32)
        here = (local >= column) & (local < column + BLOCK_N)
        if tl.max(here.to(tl.int32), 0) > 0:
            of_label = factor(factors_ptr, 9, rows, R, factors_stride)
            g += tl.where(columns[None, :] == local[:, None], of_label, 0.0)
    # 4. Through the softcap; one rounding, by the store.
    if HAS_SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    # Whole tiles are written, zeros past the end, so that the products that read them need no masks.
    g = tl.where(wanted[:, None], g, 0.0)
    if column + BLOCK_N > C:
        g = tl.where((columns < C)[None, :], g, 0.0)
    place = dlogits_ptr + rows.to(tl.int64)[:, None] * dlogits_stride + columns[None, :]
    tl.store(place, g)
    # 5. The bias's gradient, summed over the tile's rows before they are rounded.
    if HAS_COLUMN_SUMS:
        tl.store(column_sums_ptr + m.to(tl.int64) * C + columns, tl.sum(g, 0), mask=columns < C)


class Factors(NamedTuple):
    """A gradient by logits, per row: g_j = p_j·(own + log_own·log p_j + log_other·log q_j + own_squared·p_j
    + own_to_mixture·(log p_j/m_j − (1−β')p_j/m_j) − other_to_mixture·(1−β')q_j/m_j + variation·sign(p_j − q_j))
    + other·q_j + power·p_j^α·q_j^{1−α} + label·δ_jy.

    (N,) float32 each, those of a flag that is off None.
    """

    own: Tensor
    other: Tensor
    log_own: Tensor | None = None
    log_other: Tensor | None = None
    own_squared: Tensor | None = None
    own_to_mixture: Tensor | None = None
    other_to_mixture: Tensor | None = None
    variation: Tensor | None = None
    power: Tensor | None = None
    label: Tensor | None = None

    @property
    def flags(self) -> Flags:
        logs = (self.log_own, self.log_other, self.own_squared)
        mixture = (self.own_to_mixture, self.other_to_mixture)
        return Flags(
            logs=any(x is not None for x in logs),
            mixture=any(x is not None for x in mixture),
            variation=self.variation is not None,
            power=self.power is not None,
        )

    def stacked(self) -> Tensor:
        """[10, N], as the kernel reads them; zeros where there are none."""
        return torch.stack([torch.zeros_like(self.own) if x is None else x for x in self]).contiguous()


def joint_dlogits(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    labels: Tensor | None,
    sums: JointSums,
    factors: Tensor,
    flags: Flags,
    out: Tensor,
    config: TileConfig,
    *,
    beta: float | None,
    alpha: float | None,
    first_column: int,
    ignore_index: int,
    want_bias: bool,
) -> Tensor | None:
    """out[t, j] = J_tj·g_tj with g as `Factors` has it and J = dz/da: times logit_scale the gradient by h·w_j.

    g is float32 and is rounded once. Rows labelled `ignore_index` are 0.

    Args:
        hidden: [R, D] and other_hidden [R, D'] of one dtype; labels (R,) or None; sums (R,) of the *whole* vocabulary.
        head: C columns of the head, the first of them token `first_column`; other_head the same columns of the other.
        factors: [10, R] float32, the last dimension contiguous.
        out: [R', C'] of hidden's dtype, R and C rounded up to whole tiles; the rest of the tiles is set to 0, so that
            the products that read them need no masks.
        want_bias: also return the sums of out's columns.

    Returns:
        (C,) float32 where want_bias, else None.

    Traffic: as `joint_sums`, and R·C entries written. One product of each side.
    """
    r, c = hidden.shape[0], head.vocab_size
    row_tiles = triton.cdiv(r, config.block_m)
    column_sums = hidden.new_empty((row_tiles, c), dtype=torch.float32) if want_bias else None
    launch(
        joint_dlogits_kernel,
        row_tiles * triton.cdiv(c, config.block_n),
        on=hidden,
        options=config.options,
        **two_heads(hidden, head, other_hidden, other_head, config),
        labels_ptr=labels,
        maximum_ptr=sums.own.maximum,
        log_total_ptr=sums.own.log_total,
        other_maximum_ptr=sums.other.maximum,
        other_log_total_ptr=sums.other.log_total,
        factors_ptr=factors,
        dlogits_ptr=out,
        column_sums_ptr=column_sums,
        R=r,
        C=c,
        factors_stride=factors.stride(0),
        dlogits_stride=out.stride(0),
        first_column=first_column,
        ignore_index=ignore_index,
        beta=beta or 0.5,
        log_rest=math.log1p(-(beta or 0.5)),
        log_beta=math.log(beta or 0.5),
        alpha=alpha or 0.5,
        **config.switches,
        HAS_LABELS=labels is not None,
        HAS_LOGS=flags.logs,
        HAS_MIXTURE=flags.mixture,
        HAS_VARIATION=flags.variation,
        HAS_POWER=flags.power,
        HAS_COLUMN_SUMS=want_bias,
    )
    return None if column_sums is None else column_sums.sum(0)
