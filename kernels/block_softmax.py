"""A block of products h·w, made by the vendor's library, to log-probabilities and to the gradient by the logits.

Where a loss's derivative is known as soon as a block's log-probabilities are, the block goes through the head once: one
pass reads the products for their sums, another reads them again and writes the gradient. Both are bound by memory.

Letters: R rows of a block, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.launch import INTERPRETED, launch
from tvkd_fast.kernels.logits import exp, transformed
from tvkd_fast.kernels.records import Head

BLOCK = 128 if INTERPRETED else 2048
"""Columns that a program takes at a time; few in the interpreter, so that small vocabularies have several parts."""
WARPS = 8
"""Eight columns a thread. Of sixteen, in four warps, ptxas spills a few registers for sm_100 and sm_120."""


class BlockSums(NamedTuple):
    """Of each row, (R,) float32: the sums over all entries but the label's, which stays apart."""

    maximum: Tensor
    """m, the largest of the other logits."""
    total: Tensor
    """T = Σ_{j≠y} exp(z_j − m)."""
    target: Tensor
    """z at the label; NaN where it lies in no column."""


@triton.jit
def block_sums_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    maximum_ptr,
    total_ptr,
    target_ptr,
    V,
    products_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK)[None, :]
    products_ptr += row.to(tl.int64) * products_stride
    # 1. Each lane's running maximum and sum; the label is left out of both.
    top = tl.full((1, BLOCK), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        product = tl.load(products_ptr + columns, mask=columns < V, other=0.0)
        z = transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where((columns == label) | (columns >= V), float("-inf"), z)
        new = tl.maximum(top, z)
        # A lane without a finite logit so far has nothing to subtract.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * exp(top - shift) + exp(z - shift)
        top = new
    # 2. The lanes together.
    maximum = tl.max(top)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, tl.sum(total * exp(top - shift)))
    # 3. The label's own logit.
    there = (label >= 0) & (label < V)
    column = tl.arange(0, 1)[None, :] + tl.where(there, label, 0)
    z = transformed(tl.load(products_ptr + column), bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_ptr + row, tl.where(there, tl.sum(z), float("nan")))


@triton.jit
def block_dlogits_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    maximum_ptr,
    by_entry_ptr,
    by_label_ptr,
    dlogits_ptr,
    V,
    products_stride,
    dlogits_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(V, BLOCK)
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    columns = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < V
    product = tl.load(products_ptr + row.to(tl.int64) * products_stride + columns, mask=inside, other=0.0)
    z = transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    top = tl.load(maximum_ptr + row)
    # Of a vocabulary of one entry there is no other logit, and nothing to subtract.
    e = exp(z - tl.where(top == float("-inf"), 0.0, top))
    g = tl.where(columns == tl.load(labels_ptr + row), tl.load(by_label_ptr + row), tl.load(by_entry_ptr + row) * e)
    if HAS_SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    tl.store(dlogits_ptr + row.to(tl.int64) * dlogits_stride + columns, g, mask=inside)


def block_sums(products: Tensor, head: Head, labels: Tensor) -> BlockSums:
    """Of products h·w [R, V] float32 and labels (R,) each row's sums. Traffic: the products, once."""
    rows, vocab_size = products.shape
    found = BlockSums(*(products.new_empty(rows) for _ in range(3)))
    launch(
        block_sums_kernel,
        rows,
        on=products,
        options={"num_warps": WARPS},
        **_common(products, head, labels),
        maximum_ptr=found.maximum,
        total_ptr=found.total,
        target_ptr=found.target,
        V=vocab_size,
    )
    return found


def block_dlogits(
    products: Tensor, head: Head, labels: Tensor, maximum: Tensor, by_entry: Tensor, by_label: Tensor, out: Tensor
) -> None:
    """out[t, j] = J_tj·(by_entry_t·exp(z_tj − m_t), at the label by_label_t), J = dz/da; the store rounds, once.

    products [R, V] float32, out [R, V] of hidden's dtype, which may be the products themselves; labels and m (R,), the
    factors (R,) float32. Traffic: the products and out, once.
    """
    rows, vocab_size = products.shape
    launch(
        block_dlogits_kernel,
        rows * triton.cdiv(vocab_size, BLOCK),
        on=products,
        options={"num_warps": WARPS},
        **_common(products, head, labels),
        maximum_ptr=maximum,
        by_entry_ptr=by_entry,
        by_label_ptr=by_label,
        dlogits_ptr=out,
        dlogits_stride=out.stride(0),
        V=vocab_size,
    )


def _common(products: Tensor, head: Head, labels: Tensor) -> dict[str, Any]:
    return {
        "products_ptr": products,
        "products_stride": products.stride(0),
        "bias_ptr": head.bias,
        "labels_ptr": labels,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or 1.0,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "BLOCK": BLOCK,
    }
