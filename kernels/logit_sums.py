"""The log-sum-exp of rows of products h·w that the vendor's library made, a block of rows at a time in the workspace.

The library's products are faster than those of `head_stats`, and what it leaves has to be written and read once more: 4
bytes per token and column each way, the same at every hidden size, and so the less of the whole the wider states are.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels import head_stats
from tvkd_fast.kernels.blocks import slices, workspace_bytes
from tvkd_fast.kernels.launch import INTERPRETED, launch
from tvkd_fast.kernels.logits import exp, transformed
from tvkd_fast.kernels.products import accumulate, library_sums
from tvkd_fast.kernels.records import Head, HeadSums

BLOCK = 128 if INTERPRETED else 2048
"""Columns that a program takes at a time; few in the interpreter, so that small vocabularies have several parts."""
WARPS = 8
LEAST_WIDTH = 2048
"""The hidden size from which this is the faster way: by the model of bench/roofline from 850 (A100) to 2,150 (H100)."""


@triton.jit
def logit_sums_kernel(
    products_ptr,
    bias_ptr,
    maximum_ptr,
    log_total_ptr,
    V,
    products_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    products_ptr += row.to(tl.int64) * products_stride
    lanes = tl.arange(0, BLOCK)[None, :]
    # 1. A maximum and a sum of each lane's own: lanes wait for one another at the end alone.
    top = tl.full((1, BLOCK), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        product = tl.load(products_ptr + columns, mask=columns < V, other=0.0)
        z = transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(columns < V, z, float("-inf"))
        new_top = tl.maximum(top, z)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * exp(top - shift) + exp(z - shift)
        top = new_top
    # 2. All lanes under the largest maximum.
    maximum = tl.max(top)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    whole = tl.sum(total * exp(top - shift))
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_total_ptr + row, tl.log(whole))


def is_faster(hidden: Tensor) -> bool:
    """Return whether `logit_sums` should serve states [N, D] in place of `head_stats.head_sums`."""
    return hidden.shape[1] >= LEAST_WIDTH and library_sums(hidden.device, hidden.dtype)


def logit_sums(hidden: Tensor, head: Head) -> HeadSums:
    """max z and log Σ exp(z − max z) of each row of hidden [N, D], by plain products and one pass over them.

    Traffic: 8·N·V bytes, written and read, and the weight once per block of rows. Where the device has no room for the
    workspace, `head_stats.head_sums` serves, which takes none.
    """
    try:
        return _logit_sums(hidden, head)
    except torch.OutOfMemoryError:
        return head_stats.head_sums(hidden, head)


def _logit_sums(hidden: Tensor, head: Head) -> HeadSums:
    n, vocab = len(hidden), head.vocab_size
    most = max(1, workspace_bytes(hidden) // (4 * vocab))
    # Of one size as nearly as can be: a remainder would leave most of a chip idle.
    at_once = triton.cdiv(n, triton.cdiv(n, most)) if n else 1
    products = hidden.new_empty((min(n, at_once), vocab), dtype=torch.float32)
    maximum, log_total = (hidden.new_empty(n, dtype=torch.float32) for _ in range(2))
    for rows in slices(n, at_once):
        states = hidden[rows]
        block = products[: len(states)]
        accumulate(block, states, head.weight.T, fresh=True)
        launch(
            logit_sums_kernel,
            len(states),
            on=hidden,
            options={"num_warps": WARPS},
            products_ptr=block,
            bias_ptr=head.bias,
            maximum_ptr=maximum[rows],
            log_total_ptr=log_total[rows],
            V=vocab,
            products_stride=block.stride(0),
            logit_scale=head.logit_scale,
            softcap=head.softcap or 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            BLOCK=BLOCK,
        )
    return HeadSums(maximum, log_total)
