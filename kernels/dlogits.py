"""The gradient by the logits, recomputed a block of rows and vocabulary columns at a time.

Letters: R rows and C columns of a block, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import TileConfig, precision
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile
from tvkd_fast.kernels.records import Head, HeadSums


@triton.jit
def dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    maximum_ptr,
    log_total_ptr,
    coefficients_ptr,
    scale_ptr,
    dlogits_ptr,
    column_sums_ptr,
    R,
    C,
    D,
    hidden_stride,
    weight_stride,
    dlogits_stride,
    first_column,
    ignore_index,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_COLUMN_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. Logits of the tile, recomputed.
    m, n = grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP)
    row, column = m * BLOCK_M, n * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, row, column, R, C, D, hidden_stride, weight_stride, logit_scale, softcap,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    # 2. p − δ, from the statistics of the forward. Maximum and logarithm are subtracted one by one, as they are kept.
    label = tl.load(labels_ptr + rows, mask=rows < R, other=ignore_index)
    top = tl.load(maximum_ptr + rows, mask=rows < R, other=0.0)
    rest = tl.load(log_total_ptr + rows, mask=rows < R, other=0.0)
    c = tl.load(coefficients_ptr + rows, mask=rows < R, other=0.0) / tl.load(scale_ptr)
    g = exp(z - top[:, None] - rest[:, None])
    local = tl.where((label >= first_column) & (label < first_column + C), label - first_column, -1).to(tl.int32)
    here = (local >= column) & (local < column + BLOCK_N)
    if tl.max(here.to(tl.int32), 0) > 0:
        g -= (columns[None, :] == local[:, None]).to(tl.float32)
    # 3. Through the softcap, and times c/scale: one rounding, by the store.
    if HAS_SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    # Whole tiles are written, zeros past the end, so that the products that read them need no masks.
    g = tl.where((label != ignore_index)[:, None], g * c[:, None], 0.0)
    if column + BLOCK_N > C:
        g = tl.where((columns < C)[None, :], g, 0.0)
    place = dlogits_ptr + rows.to(tl.int64)[:, None] * dlogits_stride + columns[None, :]
    tl.store(place, g)
    # 4. The bias's gradient, summed over the tile's rows before they are rounded.
    if HAS_COLUMN_SUMS:
        tl.store(column_sums_ptr + m.to(tl.int64) * C + columns, tl.sum(g, 0), mask=columns < C)


def dlogits(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    coefficients: Tensor,
    scale: Tensor,
    out: Tensor,
    config: TileConfig,
    *,
    first_column: int,
    ignore_index: int,
    want_bias: bool,
) -> Tensor | None:
    """out[t, j] = (c_t/scale)·J_tj·(p_tj − δ_jy) with p = softmax(z), J = dz/da, y the label of t.

    Times −logit_scale·scale this is the gradient of Σ_t c_t·logp_t by h·w_j. c multiplies p − δ in float32 and the
    result is rounded once; `scale` keeps float16 in its range. Rows labelled `ignore_index` are 0.

    Args:
        hidden: [R, D]; labels, sums (of the *whole* vocabulary) and coefficients c: (R,), c float32.
        head: C columns of the head, the first of them token `first_column`.
        scale: (1,) float32 on the device.
        out: [R', C'] of hidden's dtype, R and C rounded up to whole tiles; the rest of the tiles is set to 0, so that
            the products that read them need no masks.
        want_bias: also return the sums of out's columns.

    Returns:
        (C,) float32 where want_bias, else None.

    Traffic: as `head_sums`, and R·C entries written. One product.
    """
    (r, d), c = hidden.shape, head.vocab_size
    row_tiles = triton.cdiv(r, config.block_m)
    column_sums = hidden.new_empty((row_tiles, c), dtype=torch.float32) if want_bias else None
    launch(
        dlogits_kernel,
        row_tiles * triton.cdiv(c, config.block_n),
        on=hidden,
        options=config.options,
        hidden_ptr=operand(hidden, (config.block_m, config.block_k), config),
        weight_ptr=operand(head.weight, (config.block_n, config.block_k), config),
        bias_ptr=head.bias,
        labels_ptr=labels,
        maximum_ptr=sums.maximum,
        log_total_ptr=sums.log_total,
        coefficients_ptr=coefficients,
        scale_ptr=scale,
        dlogits_ptr=out,
        column_sums_ptr=column_sums,
        R=r,
        C=c,
        D=d,
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        dlogits_stride=out.stride(0),
        first_column=first_column,
        ignore_index=ignore_index,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 1.0,
        **config.switches,
        EVEN_K=d % config.block_k == 0,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_COLUMN_SUMS=want_bias,
        PRECISION=precision(hidden.dtype, target_of(hidden)),
    )
    return None if column_sums is None else column_sums.sum(0)
