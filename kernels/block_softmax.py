"""A block of products h·w, made by the vendor's library, to log-probabilities and to the exponentials of its gradient.

Where a loss's derivative is known as soon as a block's log-probabilities are, the block goes through the head once: one
pass reads the products and leaves exponentials, in their place, and their sums. A row's factor is not known yet, and
need not be: it multiplies the row's [D] state, and the [D] sum over its exponentials.

Letters: R rows of a block, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.launch import INTERPRETED, launch
from tvkd_fast.kernels.logits import exp, transformed
from tvkd_fast.kernels.records import Head

BLOCK = 128 if INTERPRETED else 1024
"""Columns that a program takes at a time; few in the interpreter, so that small vocabularies have several parts."""
WARPS = 8
"""Four columns a thread. Of eight, ptxas spills a few registers here and there, and keeps as many programs."""
SLACK = {torch.float32: 40.0, torch.bfloat16: 40.0, torch.float16: 8.0}
"""Nats by which a logit may lie above what is subtracted from its row, and the logarithm of T above 0."""
SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 16.0}
"""What exponentials are multiplied by as they are stored: float16 then holds 16·e⁸, and keeps ten bits down to e⁻¹²."""


class BlockSums(NamedTuple):
    """Of each row, (R,) float64, of numbers that were summed in float32: the label's entry stays apart."""

    shift: Tensor
    """m, what was subtracted from the logits; −inf where the label has no other beside it."""
    total: Tensor
    """T = Σ_{j≠y} exp(z_j − m)."""
    target: Tensor
    """z at the label; NaN where it lies in no column."""


@triton.jit
def block_exponentials_kernel(
    products_ptr,
    bias_ptr,
    labels_ptr,
    exponentials_ptr,
    shifts_ptr,
    shift_ptr,
    total_ptr,
    target_ptr,
    V,
    products_stride,
    exponentials_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    SLACK: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK)[None, :]
    products_ptr += row.to(tl.int64) * products_stride
    exponentials_ptr += row.to(tl.int64) * exponentials_stride
    shifts_ptr += row.to(tl.int64) * tl.cdiv(V, BLOCK)
    # 1. The label's own logit, before anything is written over the products.
    there = (label >= 0) & (label < V)
    column = tl.arange(0, 1)[None, :] + tl.where(there, label, 0)
    own = transformed(tl.load(products_ptr + column), bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    target = tl.sum(own)
    # 2. Exponentials under a shift that moves only where a logit is far above it. What lies before a part in memory has
    # been read when its largest logit is known, so that 16 bits may be written over 32.
    shift = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    moves = 0
    for first in range(0, V, BLOCK):
        columns = first + lanes
        product = tl.load(products_ptr + columns, mask=columns < V, other=0.0)
        z = transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where((columns == label) | (columns >= V), float("-inf"), z)
        top = tl.max(z)
        if not (top <= shift + SLACK):
            total *= exp(shift - top)
            shift = top
            moves += 1
        e = exp(z - tl.where(shift == float("-inf"), 0.0, shift))
        total += e
        if HAS_SOFTCAP:
            capped = tl.maximum(z, -softcap) / softcap
            e *= 1.0 - capped * capped
        tl.store(exponentials_ptr + columns, e * SCALE, mask=columns < V)
        tl.store(shifts_ptr + first // BLOCK, shift)
    # 3. All parts under the last shift, and under one that leaves the label's entry, −T, within range.
    whole = tl.sum(total)
    excess = tl.maximum(tl.log(tl.where(whole > 0.0, whole, 1.0)) - SLACK, 0.0)
    last = shift + excess
    whole *= exp(-excess)
    if (moves > 1) | (last != shift):
        tl.debug_barrier()
        for first in range(0, V, BLOCK):
            columns = first + lanes
            before = tl.load(shifts_ptr + first // BLOCK)
            if before != last:
                e = tl.load(exponentials_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
                tl.store(exponentials_ptr + columns, e * exp(before - last), mask=columns < V)
    # 4. The label's entry: with it the row is the gradient by the logits, but for its factor.
    tl.debug_barrier()
    entry = -whole * SCALE
    if HAS_SOFTCAP:
        entry *= 1.0 - (target / softcap) * (target / softcap)
    if there:
        tl.store(exponentials_ptr + label, entry)
    tl.store(shift_ptr + row, last)
    tl.store(total_ptr + row, whole)
    tl.store(target_ptr + row, tl.where(there, target, float("nan")))


def block_exponentials(products: Tensor, head: Head, labels: Tensor, out: Tensor) -> BlockSums:
    """out[t, j] = SCALE·J_tj·exp(z_tj − m_t), at the label −SCALE·J_ty·T_t, J = dz/da; and each row's sums.

    products [R, V] float32, labels (R,), out [R, V] of hidden's dtype, which may begin where the products do, row by
    row: then they are gone. Traffic: the products and out, once; parts again whose shift was another than the last.
    """
    rows, vocab_size = products.shape
    found = BlockSums(*(products.new_empty(rows, dtype=torch.float64) for _ in range(3)))
    launch(
        block_exponentials_kernel,
        rows,
        on=products,
        options={"num_warps": WARPS},
        products_ptr=products,
        bias_ptr=head.bias,
        labels_ptr=labels,
        exponentials_ptr=out,
        shifts_ptr=products.new_empty((rows, triton.cdiv(vocab_size, BLOCK))),
        shift_ptr=found.shift,
        total_ptr=found.total,
        target_ptr=found.target,
        V=vocab_size,
        products_stride=products.stride(0),
        exponentials_stride=out.stride(0),
        logit_scale=head.logit_scale,
        softcap=head.softcap or 1.0,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        BLOCK=BLOCK,
        SLACK=SLACK[out.dtype],
        SCALE=SCALE[out.dtype],
    )
    return found
