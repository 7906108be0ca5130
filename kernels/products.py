"""The backward's two products, accumulated in float32 over blocks of the vocabulary or of the rows.

They are plain products, at which nothing beats the vendor's library. Triton's serve where that cannot sum 16 bits in
float32, and for float32 operands, of which the tensor cores take three products in TF32 and the library none.

Letters: M, N, K of the product out [M, N] = left [M, K] · right [K, N].
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import TileConfig, precision
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import grouped_tile


@triton.jit
def product_kernel(
    left_ptr,
    right_ptr,
    previous_ptr,
    out_ptr,
    scale_ptr,
    alpha,
    M,
    N,
    K,
    left_stride,
    right_stride,
    previous_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_N: tl.constexpr,
    BULK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile of the output, and what earlier blocks have summed of it.
    m, n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, column = m * BLOCK_M, n * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    out_rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = (out_rows[:, None] < M) & (columns[None, :] < N)
    if HAS_PREVIOUS:
        total = tl.load(previous_ptr + out_rows[:, None] * previous_stride + columns[None, :], mask=inside, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # 2. The product, added to that sum in float32.
    if BULK:
        for k in range(0, K, BLOCK_K):
            if TRANSPOSED:
                a = left_ptr.load([k, row]).T
            else:
                a = left_ptr.load([row, k])
            total = tl.dot(a, right_ptr.load([k, column]), total, input_precision=PRECISION)
    else:
        inner = tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            a_pointers = left_ptr + out_rows[:, None] + inner[None, :].to(tl.int64) * left_stride
        else:
            a_pointers = left_ptr + out_rows[:, None] * left_stride + inner[None, :]
        for k in range(0, K, BLOCK_K):
            a = tl.load(a_pointers)
            right_rows = tl.minimum(k + inner, K - 1).to(tl.int64)
            b_pointers = right_ptr + right_rows[:, None] * right_stride + columns[None, :]
            if EVEN_N:
                b = tl.load(b_pointers)
            else:
                b = tl.load(b_pointers, mask=columns[None, :] < N, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if TRANSPOSED:
                a_pointers += BLOCK_K * left_stride.to(tl.int64)
            else:
                a_pointers += BLOCK_K
    # 3. After the last block the scale of the dlogits is undone; the store rounds once, to the output's dtype.
    if LAST:
        total *= alpha * tl.load(scale_ptr)
    tl.store(out_ptr + out_rows[:, None] * out_stride + columns[None, :], total, mask=inside)


def product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    config: TileConfig,
    *,
    transposed: bool = False,
    previous: Tensor | None = None,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    last: bool = False,
) -> None:
    """out = previous + left·right in float32, times alpha·scale where this block is the `last` of the sum.

    By the vendor's library where `library_sums`, and then `previous` is overwritten.

    Args:
        left: [M', K'], or [K', M'] where `transposed`, of zeros past M and K up to whole tiles of `config`.
        right: [K, N] of left's dtype, columns contiguous.
        out: [M, N]; rounded once, from float32, where its dtype is shorter.
        previous: float32 [M, N], which may be `out`, or None.
        scale: (1,) float32 on the device, required if `last`.

    Traffic: left once per column of tiles, right once per group of row tiles, out (and previous) once. One product.
    """
    (k, n), m = right.shape, out.shape[0]
    if library_sums(right.device, right.dtype):
        left = left[:k, :m].T if transposed else left[:m, :k]
        total = out if out.dtype == torch.float32 else previous
        total = out.new_empty(out.shape, dtype=torch.float32) if total is None else total
        assert previous is None or previous.data_ptr() == total.data_ptr()
        accumulate(total, left, right, fresh=previous is None)
        if last:
            assert scale is not None
            torch.mul(total, scale * alpha, out=out)
        return
    block = (config.block_k, config.block_m) if transposed else (config.block_m, config.block_k)
    launch(
        product_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        on=right,
        options=config.options,
        left_ptr=operand(left, block, config),
        right_ptr=operand(right, (config.block_k, config.block_n), config),
        previous_ptr=previous,
        out_ptr=out,
        scale_ptr=scale,
        alpha=alpha,
        M=m,
        N=n,
        K=k,
        left_stride=left.stride(0),
        right_stride=right.stride(0),
        previous_stride=0 if previous is None else previous.stride(0),
        out_stride=out.stride(0),
        **config.switches,
        EVEN_N=n % config.block_n == 0,
        TRANSPOSED=transposed,
        HAS_PREVIOUS=previous is not None,
        LAST=last,
        PRECISION=precision(right.dtype, target_of(right)),
    )


@lru_cache
def library_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device's library multiplies operands of a dtype into float32 sums; tried once."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    ones, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        # torch before 2.11 has no such product, and ROCm's not every dtype of it.
        return False
    return bool((total == 17).all())


def accumulate(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False, alpha: float = 1.0) -> None:
    """total = alpha·left·right, and what it was before unless `fresh`: a float32 sum, whatever left's dtype is."""
    beta = 0 if fresh else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    elif left.is_cuda and library_sums(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    else:
        # As in Triton's interpreter, whose tensors are a CPU's.
        torch.addmm(total, left.float(), right.float(), beta=beta, alpha=alpha, out=total)
