"""dW and the bias's gradient of a sparse gradient, a program per column (a tile of it, where D is very wide): its
entries by row, summed in order.

Letters: N tokens, D hidden, V vocabulary, E selected entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.gathers import GatherConfig
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.kernels.selected_lists import SelectedLists
from tvkd_fast.kernels.sparse_rows import DROPPED, gathered


@triton.jit
def sparse_columns_kernel(
    hidden_ptr,
    rows_ptr,
    entries_ptr,
    order_ptr,
    edges_ptr,
    even_ptr,
    coefficients_ptr,
    is_sparse_ptr,
    hidden_sum_ptr,
    even_sum_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    D,
    hidden_stride,
    grad_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
):
    # 1. The column's entries, by row.
    column, tile = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES
    start, stop = tl.load(edges_ptr + column), tl.load(edges_ptr + column + 1)
    inner = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inner < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    bias_total = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(start, stop, BLOCK_E):
        place = first + tl.arange(0, BLOCK_E)
        there = place < stop
        # 2. Each one's gradient less the −u that all rows give the column.
        which = tl.load(order_ptr + place, mask=there, other=0)
        row = tl.load(rows_ptr + which, mask=there, other=0).to(tl.int64)
        entry = tl.load(entries_ptr + which, mask=there, other=DROPPED)
        u = tl.load(even_ptr + row, mask=there, other=0.0)
        c = tl.load(coefficients_ptr + row, mask=there, other=0.0)
        g = tl.where(entry < DROPPED, u - c * entry, 0.0)
        bias_total += g
        # 3. Times the states, gathered.
        if HAS_GRAD:
            h = gathered(hidden_ptr, row, hidden_stride, inner, there[:, None] & inside[None, :])
            total += tl.sum(g[:, None] * h.to(tl.float32), 0)
    # 4. −u of all rows, as one vector, for columns whose gradient is not made elsewhere.
    is_sparse = tl.load(is_sparse_ptr + column) != 0
    if HAS_GRAD:
        total -= tl.where(is_sparse, tl.load(hidden_sum_ptr + inner, mask=inside, other=0.0), 0.0)
        out = grad_weight_ptr + column * grad_stride + inner
        if HAS_START:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total, mask=inside)
    if HAS_BIAS and tile == 0:
        g = tl.sum(bias_total, 0) - tl.where(is_sparse, tl.load(even_sum_ptr), 0.0)
        if HAS_START:
            g += tl.load(grad_bias_ptr + column).to(tl.float32)
        tl.store(grad_bias_ptr + column, g)


def sparse_columns(
    hidden: Tensor,
    head: Head,
    selected: SelectedLists,
    entries: Tensor,
    even: Tensor,
    coefficients: Tensor,
    *,
    is_sparse: Tensor,
    hidden_sum: Tensor | None,
    start: HeadGradients,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and the bias's gradient, added to `start` in place.

    Args:
        entries, even: J·(p − δ) (E,) and u (N,), as `sparse_rows` gave them.
        coefficients: (N,) float32 c times logit_scale.
        is_sparse: (V,) int8, 1 of columns that take a share of the tail.
        hidden_sum: (D,) float32 Σ_t u_t·h_t, where dW is wanted.
    """
    config, vocab = GatherConfig.of(hidden.shape[1]), head.vocab_size
    by_column, order = selected.columns.sort(stable=True)
    edges = torch.searchsorted(by_column, torch.arange(vocab + 1, device=hidden.device, dtype=torch.int32))
    grad_weight, grad_bias = start.weight, start.bias
    if want_weight and grad_weight is None:
        grad_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    if want_bias and grad_bias is None and head.bias is not None:
        grad_bias = torch.empty_like(head.bias)
    # A program per column serves the bias, whatever D is.
    config = config if want_weight else replace(config, tiles=1)
    launch(
        sparse_columns_kernel,
        vocab * config.tiles,
        on=hidden,
        options=config.options,
        hidden_ptr=hidden,
        rows_ptr=selected.rows,
        entries_ptr=entries,
        order_ptr=order,
        edges_ptr=edges,
        even_ptr=even,
        coefficients_ptr=coefficients,
        is_sparse_ptr=is_sparse,
        hidden_sum_ptr=hidden_sum,
        even_sum_ptr=even.sum(),
        grad_weight_ptr=grad_weight,
        grad_bias_ptr=grad_bias,
        D=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        grad_stride=0 if grad_weight is None else grad_weight.stride(0),
        **config.switches,
        HAS_GRAD=want_weight,
        HAS_BIAS=grad_bias is not None,
        HAS_START=start.weight is not None or start.bias is not None,
    )
    return grad_weight, grad_bias
