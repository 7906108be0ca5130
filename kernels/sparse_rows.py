"""dH of a sparse gradient, a program per row: its selected entries gathered, pruned, and summed in order.

Letters: N tokens, D hidden, V vocabulary, E selected entries.

A program has w_j in registers, so it takes z from it anew: nothing but places was kept. It drops what was selected but
lies below ε, and leaves each entry's J·(p − δ) for `sparse_columns.py`. Rows that registers do not hold are read in
tiles for z, and once more, by a program per tile, for dH.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.gathers import GatherConfig
from tvkd_fast.kernels.hash_uniform import HashUniform
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.records import Head, HeadSums, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists
from tvkd_fast.kernels.selection_bits import uniform

# No J·(p − δ) is as large.
DROPPED = tl.constexpr(2.0)


@triton.jit
def gathered(matrix_ptr, rows, stride, inner, mask):
    """[BLOCK_E, BLOCK_D] of a matrix: its columns `inner` in rows of a list."""
    return tl.load(matrix_ptr + rows.to(tl.int64)[:, None] * stride + inner[None, :], mask=mask, other=0.0)


@triton.jit
def sparse_rows_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    columns_ptr,
    starts_ptr,
    maximum_ptr,
    log_total_ptr,
    coefficients_ptr,
    tail_ptr,
    weight_sum_ptr,
    row_hashes_ptr,
    column_hashes_ptr,
    entries_ptr,
    even_ptr,
    grad_hidden_ptr,
    spread_over_ptr,
    D,
    hidden_stride,
    weight_stride,
    grad_stride,
    logit_scale,
    softcap,
    eps,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_START: tl.constexpr,
):
    # 1. The row's numbers, and sums over its entries.
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    inner = tl.arange(0, BLOCK_D)
    inside = inner < D
    label = tl.load(labels_ptr + row)
    top = tl.load(maximum_ptr + row)
    rest = tl.load(log_total_ptr + row)
    c = tl.load(coefficients_ptr + row)
    entry_sum = tl.zeros((BLOCK_D,), tl.float32)
    kept_sum = tl.zeros((BLOCK_D,), tl.float32)
    lost = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    if start < stop:
        h_ptr = hidden_ptr + row * hidden_stride
        if TILES == 1:
            h = tl.load(h_ptr + inner, mask=inside, other=0.0).to(tl.float32)
        # A program that has one row of the head at a time asks for the next one, and for the place after, before it
        # computes: several rows at once wait together.
        if BLOCK_E == 1:
            place = start + tl.arange(0, BLOCK_E)
            next_column = tl.load(columns_ptr + place)
            if TILES == 1:
                next_w = gathered(weight_ptr, next_column, weight_stride, inner, inside[None, :])
        for first in range(start, stop, BLOCK_E):
            # 2. Rows of the head, gathered, and z of their entries from them: only places were kept.
            place = first + tl.arange(0, BLOCK_E)
            there = place < stop
            if BLOCK_E == 1:
                column, later = next_column, place + 1 < stop
                next_column = tl.load(columns_ptr + place + 1, mask=later, other=0)
            else:
                column = tl.load(columns_ptr + place, mask=there, other=0)
            if TILES == 1:
                if BLOCK_E == 1:
                    w = next_w.to(tl.float32)
                    next_w = gathered(weight_ptr, next_column, weight_stride, inner, later[:, None] & inside[None, :])
                else:
                    w = gathered(weight_ptr, column, weight_stride, inner, there[:, None] & inside[None, :])
                    w = w.to(tl.float32)
                z = tl.sum(w * h[None, :], 1)
            else:
                products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
                for tile in range(TILES):
                    at = tile * BLOCK_D + inner
                    h = tl.load(h_ptr + at, mask=at < D, other=0.0).to(tl.float32)
                    w = gathered(weight_ptr, column, weight_stride, at, there[:, None] & (at < D)[None, :])
                    products += w.to(tl.float32) * h[None, :]
                z = tl.sum(products, 1)
            if HAS_BIAS:
                z += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
            z *= logit_scale
            chain = tl.full((BLOCK_E,), 1.0, tl.float32)
            if HAS_SOFTCAP:
                z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / softcap))))
                chain = 1.0 - (z / softcap) * (z / softcap)
            p = tl.exp(z - top - rest)
            # 3. Which entries stay, now that p is known; the others' mass joins the tail.
            own = column == label
            value = p
            limit = p * 0.0 + eps
            if UNBIASED:
                u = uniform(tl.load(row_hashes_ptr + row), tl.load(column_hashes_ptr + column, mask=there, other=0))
                limit *= u
                value = tl.where(own, p, tl.maximum(p, eps))
            kept = there & (own | (p >= limit))
            lost += tl.where(there & ~own, tl.where(kept, p - value, p) * chain, 0.0)
            count += kept.to(tl.int32)
            # 4. J·(p − δ), written for dW and summed into dH here, where w_j is at hand.
            entry = tl.where(own, value - 1.0, value) * chain
            tl.store(entries_ptr + place, tl.where(kept, entry, DROPPED), mask=there)
            if HAS_GRAD:
                entry_sum += tl.sum(tl.where(kept, entry, 0.0)[:, None] * w, 0)
                kept_sum += tl.sum(tl.where(kept[:, None], w, 0.0), 0)
    # 5. The tail's share u of each column that is not kept.
    others = tl.load(spread_over_ptr) - tl.sum(count, 0)
    u = c * (tl.load(tail_ptr + row) + tl.sum(lost, 0)) / tl.maximum(others, 1)
    u = tl.where(others > 0, u, c * 0.0)
    tl.store(even_ptr + row, u)
    # 6. dH: −u over all columns but the kept ones, and the kept entries' own.
    if HAS_GRAD:
        kept_sum -= tl.load(weight_sum_ptr + inner, mask=inside, other=0.0)
        grad = u * kept_sum - c * entry_sum
        out = grad_hidden_ptr + row * grad_stride + inner
        if HAS_START:
            grad += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, grad, mask=inside)


@triton.jit
def wide_rows_kernel(
    weight_ptr,
    columns_ptr,
    starts_ptr,
    coefficients_ptr,
    weight_sum_ptr,
    entries_ptr,
    even_ptr,
    grad_hidden_ptr,
    D,
    weight_stride,
    grad_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    HAS_START: tl.constexpr,
):
    # 1. A tile of a row of dH, whose entries and u are known: −u over all columns.
    row, tile = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES
    start, stop = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    inner = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = inner < D
    c, u = tl.load(coefficients_ptr + row), tl.load(even_ptr + row)
    grad = -u * tl.load(weight_sum_ptr + inner, mask=inside, other=0.0)
    # 2. The kept entries' own, less the −u that they were given.
    place = start + tl.arange(0, BLOCK_E)
    next_column = tl.load(columns_ptr + place, mask=place < stop, other=0)
    for first in range(start, stop, BLOCK_E):
        place = first + tl.arange(0, BLOCK_E)
        there = place < stop
        column = next_column
        next_column = tl.load(columns_ptr + place + BLOCK_E, mask=place + BLOCK_E < stop, other=0)
        w = gathered(weight_ptr, column, weight_stride, inner, there[:, None] & inside[None, :]).to(tl.float32)
        entry = tl.load(entries_ptr + place, mask=there, other=DROPPED)
        grad += tl.sum(tl.where(entry < DROPPED, u - c * entry, 0.0)[:, None] * w, 0)
    out = grad_hidden_ptr + row * grad_stride + inner
    if HAS_START:
        grad += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, grad, mask=inside)


def sparse_rows(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedLists,
    rule: SelectionRule,
    coefficients: Tensor,
    *,
    spread_over: Tensor,
    weight_sum: Tensor | None,
    start: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J·(p − δ) of each entry (E,), u (N,), and dH where wanted.

    Args:
        coefficients: (N,) float32 c times logit_scale.
        spread_over: () int32, how many columns the tail is spread over, but for a row's own entries.
        weight_sum: (D,) float32, the sum of these columns' rows of the head, where dH is wanted.
        start: dH [N, D] so far, which is added to in place, or None.
    """
    (n, d), config = hidden.shape, GatherConfig.of(hidden.shape[1])
    entries, even = (hidden.new_empty(size, dtype=torch.float32) for size in (len(selected.columns), n))
    grad_hidden = start
    if want_hidden and start is None:
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    uniforms = HashUniform(rule.seed, torch.arange(n, device=hidden.device), head.vocab_size) if rule.unbiased else None
    launch(
        sparse_rows_kernel,
        n,
        on=hidden,
        options=config.options,
        hidden_ptr=hidden,
        weight_ptr=head.weight,
        bias_ptr=head.bias,
        labels_ptr=labels,
        columns_ptr=selected.columns,
        starts_ptr=selected.starts,
        maximum_ptr=sums.maximum,
        log_total_ptr=sums.log_total,
        coefficients_ptr=coefficients,
        tail_ptr=selected.tail,
        weight_sum_ptr=weight_sum,
        row_hashes_ptr=None if uniforms is None else uniforms.row_hashes,
        column_hashes_ptr=None if uniforms is None else uniforms.column_hashes,
        entries_ptr=entries,
        even_ptr=even,
        grad_hidden_ptr=grad_hidden,
        spread_over_ptr=spread_over,
        D=d,
        hidden_stride=hidden.stride(0),
        weight_stride=head.weight.stride(0),
        grad_stride=0 if grad_hidden is None else grad_hidden.stride(0),
        logit_scale=head.logit_scale,
        softcap=head.softcap or 1.0,
        eps=rule.eps,
        **config.switches,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        UNBIASED=uniforms is not None,
        HAS_GRAD=want_hidden and config.tiles == 1,
        HAS_START=start is not None,
    )
    if grad_hidden is not None and config.tiles > 1:
        launch(
            wide_rows_kernel,
            n * config.tiles,
            on=hidden,
            options=config.options,
            weight_ptr=head.weight,
            columns_ptr=selected.columns,
            starts_ptr=selected.starts,
            coefficients_ptr=coefficients,
            weight_sum_ptr=weight_sum,
            entries_ptr=entries,
            even_ptr=even,
            grad_hidden_ptr=grad_hidden,
            D=d,
            weight_stride=head.weight.stride(0),
            grad_stride=grad_hidden.stride(0),
            **config.switches,
            HAS_START=start is not None,
        )
    return entries, even, grad_hidden
