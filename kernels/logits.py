"""Shared by all kernels over the vocabulary: the order in which tiles are taken, and one tile of logits.

Letters: N tokens, D hidden, V vocabulary.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x, 0 below 2⁻¹²⁶: one product and the chip's own 2^x. `tl.exp` spends three more instructions on subnormals."""
    return tl.exp2(x * LOG2E)


@triton.jit
def without_end(z, column, V, BLOCK_N: tl.constexpr):
    """z of a tile at a column, −inf past the vocabulary's end, which one tile in a row of tiles alone has."""
    if column + BLOCK_N > V:
        columns = column + tl.arange(0, BLOCK_N)
        z = tl.where(columns[None, :] < V, z, float("-inf"))
    return z


@triton.jit
def grouped_tile(program, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """Program number to (row of tiles, column of tiles): GROUP rows go down one column before the next is taken.

    Programs that run at the same time then share their columns of the right operand and a few rows of the left one, and
    both stay in L2: the right operand comes from memory once per group of rows and not once per row.
    """
    group_size = GROUP * columns_of_tiles
    first_row = program // group_size * GROUP
    height = tl.minimum(rows_of_tiles - first_row, GROUP)
    inside = program % group_size
    return first_row + inside % height, inside // height


@triton.jit
def logits_tile(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    row,
    column,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_N] float32 at (row, column): a = logit_scale·(h·w + bias), z = softcap·tanh(a/softcap).

    hidden_ptr [N, D] and weight_ptr [V, D] are tensor descriptors if BULK, else pointers. Rows and columns past the end
    hold meaningless numbers: the caller masks them, after the transforms (before, softcap would make −inf finite).
    """
    # 1. The product, accumulated in float32 over steps of D.
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BULK:
        for d in range(0, D, BLOCK_K):
            h = hidden_ptr.load([row, d])
            w = weight_ptr.load([column, d])
            product = tl.dot(h, w.T, product, input_precision=PRECISION)
    else:
        # Clamped, not masked: a load without a mask is a plain 16-byte copy. N·D and V·D can pass 2³¹.
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        inner = tl.arange(0, BLOCK_K)
        h_pointers = hidden_ptr + rows[:, None] * hidden_stride + inner[None, :]
        w_pointers = weight_ptr + columns[None, :] * weight_stride + inner[:, None]
        for d in range(0, D, BLOCK_K):
            if EVEN_K:
                h = tl.load(h_pointers)
                w = tl.load(w_pointers)
            else:
                h = tl.load(h_pointers, mask=inner[None, :] < D - d, other=0.0)
                w = tl.load(w_pointers, mask=inner[:, None] < D - d, other=0.0)
            product = tl.dot(h, w, product, input_precision=PRECISION)
            h_pointers += BLOCK_K
            w_pointers += BLOCK_K
    # 2. The transforms, in float32.
    columns = (column + tl.arange(0, BLOCK_N))[None, :]
    return transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of products h·w [·, C] float32 at columns [1, C]."""
    a = product
    if HAS_BIAS:
        a += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    a *= logit_scale
    if HAS_SOFTCAP:
        # tanh makes an infinite product finite: 0·inf = NaN lets a broken state show all the same.
        a = softcap * (1.0 - 2.0 / (1.0 + exp(a * (2.0 / softcap)))) + 0.0 * product
    return a
