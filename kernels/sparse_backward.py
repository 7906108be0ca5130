"""The one-GEMM head's backward: dH and dW gathered from the marked entries, in a fixed order.

Letters: N tokens, D hidden, V vocabulary, E marked entries, K hot columns.

A program makes one row of dH, another kernel's one row of dW. The first has w_j in registers, so it takes z from it
anew: nothing but places was kept. It drops what was marked but lies below ε, and leaves each entry's J·(p − δ) for the
second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.dice import Dice
from tvkd_fast.kernels.head import Head, HeadGradients, HeadSums, MarkRule
from tvkd_fast.kernels.head_backward import head_gradients
from tvkd_fast.kernels.head_marks import Hot, uniform
from tvkd_fast.kernels.launch import launch
from tvkd_fast.kernels.mark_lists import MarkLists

THREAD_FLOATS = 16
"""Of a program's tile of gathered rows, in registers."""
SUM_ROWS = 4096

# No J·(p − δ) is as large.
DROPPED = tl.constexpr(2.0)


@dataclass(frozen=True)
class GatherConfig:
    """Rows of D floats, padded to a power of 2, that a program gathers at a time."""

    block_e: int
    block_d: int
    warps: int

    @staticmethod
    def of(size: int) -> GatherConfig:
        width = triton.next_power_of_2(size)
        warps = 4 if width <= 1024 else 8
        return GatherConfig(max(1, 32 * warps * THREAD_FLOATS // width), width, warps)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}

    @property
    def switches(self) -> dict[str, int]:
        return {"BLOCK_E": self.block_e, "BLOCK_D": self.block_d}


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
    row_dice_ptr,
    column_dice_ptr,
    entries_ptr,
    even_ptr,
    grad_hidden_ptr,
    free_ptr,
    D,
    hidden_stride,
    weight_stride,
    grad_stride,
    logit_scale,
    softcap,
    eps,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_START: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    inner = tl.arange(0, BLOCK_D)
    inside = inner < D
    label = tl.load(labels_ptr + row)
    top = tl.load(maximum_ptr + row)
    rest = tl.load(log_total_ptr + row)
    c = tl.load(coefficients_ptr + row)
    slope = tl.zeros((BLOCK_D,), tl.float32)
    everyone = tl.zeros((BLOCK_D,), tl.float32)
    lost = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    if start < stop:
        h = tl.load(hidden_ptr + row * hidden_stride + inner, mask=inside, other=0.0).to(tl.float32)
        for first in range(start, stop, BLOCK_E):
            place = first + tl.arange(0, BLOCK_E)
            there = place < stop
            column = tl.load(columns_ptr + place, mask=there, other=0)
            gathered = weight_ptr + column.to(tl.int64)[:, None] * weight_stride + inner[None, :]
            w = tl.load(gathered, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            z = tl.sum(w * h[None, :], 1)
            if HAS_BIAS:
                z += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
            z *= logit_scale
            chain = tl.full((BLOCK_E,), 1.0, tl.float32)
            if HAS_SOFTCAP:
                z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / softcap))))
                chain = 1.0 - (z / softcap) * (z / softcap)
            p = tl.exp(z - top - rest)
            own = column == label
            value = p
            limit = p * 0.0 + eps
            if UNBIASED:
                u = uniform(tl.load(row_dice_ptr + row), tl.load(column_dice_ptr + column, mask=there, other=0))
                limit *= u
                value = tl.where(own, p, tl.maximum(p, eps))
            kept = there & (own | (p >= limit))
            lost += tl.where(there & ~own, tl.where(kept, p - value, p) * chain, 0.0)
            count += kept.to(tl.int32)
            entry = tl.where(own, value - 1.0, value) * chain
            tl.store(entries_ptr + place, tl.where(kept, entry, DROPPED), mask=there)
            if HAS_GRAD:
                slope += tl.sum(tl.where(kept, entry, 0.0)[:, None] * w, 0)
                everyone += tl.sum(tl.where(kept[:, None], w, 0.0), 0)
    others = tl.load(free_ptr) - tl.sum(count, 0)
    u = c * (tl.load(tail_ptr + row) + tl.sum(lost, 0)) / tl.maximum(others, 1)
    u = tl.where(others > 0, u, c * 0.0)
    tl.store(even_ptr + row, u)
    if HAS_GRAD:
        everyone -= tl.load(weight_sum_ptr + inner, mask=inside, other=0.0)
        grad = u * everyone - c * slope
        out = grad_hidden_ptr + row * grad_stride + inner
        if HAS_START:
            grad += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, grad, mask=inside)


@triton.jit
def sparse_columns_kernel(
    hidden_ptr,
    rows_ptr,
    entries_ptr,
    order_ptr,
    edges_ptr,
    even_ptr,
    coefficients_ptr,
    cold_ptr,
    hidden_sum_ptr,
    even_sum_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    D,
    hidden_stride,
    grad_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(edges_ptr + column), tl.load(edges_ptr + column + 1)
    inner = tl.arange(0, BLOCK_D)
    inside = inner < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    bias_total = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(start, stop, BLOCK_E):
        place = first + tl.arange(0, BLOCK_E)
        there = place < stop
        which = tl.load(order_ptr + place, mask=there, other=0)
        row = tl.load(rows_ptr + which, mask=there, other=0).to(tl.int64)
        entry = tl.load(entries_ptr + which, mask=there, other=DROPPED)
        u = tl.load(even_ptr + row, mask=there, other=0.0)
        c = tl.load(coefficients_ptr + row, mask=there, other=0.0)
        g = tl.where(entry < DROPPED, u - c * entry, 0.0)
        bias_total += g
        if HAS_GRAD:
            gathered = hidden_ptr + row[:, None] * hidden_stride + inner[None, :]
            h = tl.load(gathered, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(g[:, None] * h, 0)
    everyone = tl.load(cold_ptr + column) != 0
    if HAS_GRAD:
        total -= tl.where(everyone, tl.load(hidden_sum_ptr + inner, mask=inside, other=0.0), 0.0)
        out = grad_weight_ptr + column * grad_stride + inner
        if HAS_START:
            total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, total, mask=inside)
    if HAS_BIAS:
        g = tl.sum(bias_total, 0) - tl.where(everyone, tl.load(even_sum_ptr), 0.0)
        if HAS_START:
            g += tl.load(grad_bias_ptr + column).to(tl.float32)
        tl.store(grad_bias_ptr + column, g)


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    marks: MarkLists,
    rule: MarkRule,
    coefficients: Tensor,
    *,
    ignore_index: int = -100,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t c_t·logp_t from the marks, with c = `coefficients` (N,), zero where a label is `ignore_index`.

    With M = {p ≥ ε}, the hot columns and the label, T the tail and u = c·s·T/(V − |M|), the gradient by h·w_j is
    c·s·J_j·(δ_jy − p_j) on M and −u elsewhere. Gathered is the difference from −u; −u itself goes to all columns that
    are neither hot nor taken out by a bias of −inf, as one vector. Hot columns, and dense rows, take the exact walk.
    Bitwise repeatable. States of rows to ignore must be finite, as in the exact backward.

    Traffic: 2·E·D numbers gathered, out of L2 for the most part (E·D where weight wants none), weight and
    hidden once, and the products of K columns, three.
    """
    c = coefficients.float().masked_fill((labels < 0) | (labels >= head.vocab_size), torch.nan)
    c = c.masked_fill(labels == ignore_index, 0.0)
    wants = {"want_hidden": want_hidden, "want_weight": want_weight, "want_bias": want_bias}
    start = _of_dense_rows(hidden, head, labels, sums, marks, c, ignore_index, wants)
    c = c.index_fill(0, marks.dense, 0.0)
    hot = Hot.of(marks.hot, head)
    hot_head = hot.head(head)
    dense_block = HeadGradients(None, None, None)
    if hot_head.vocab_size:
        local = hot.local(labels, ignore_index)
        dense_block = head_gradients(hidden, hot_head, local, sums, c, ignore_index=-100, elsewhere=True, **wants)
    c = c.mul(head.logit_scale).contiguous()
    entries, even, grad_hidden = _by_rows(
        hidden, head, labels, sums, marks, rule, c, hot, hot_head, dense_block.hidden, want_hidden
    )
    if grad_hidden is not None and start.hidden is not None:
        grad_hidden.index_copy_(0, marks.dense, start.hidden)
    grad_weight, grad_bias = start.weight, start.bias
    if want_weight or want_bias:
        grad_weight, grad_bias = _by_columns(hidden, head, marks, entries, even, c, hot, start, want_weight, want_bias)
        for whole, part in ((grad_weight, dense_block.weight), (grad_bias, dense_block.bias)):
            if whole is not None and part is not None:
                whole.index_add_(0, hot.columns, part)
    return HeadGradients(grad_hidden, grad_weight, grad_bias)


def _of_dense_rows(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    marks: MarkLists,
    c: Tensor,
    ignore_index: int,
    wants: dict[str, bool],
) -> HeadGradients:
    """Exact gradients of the dense rows alone, dH's only those; nothing where there are none."""
    rows = marks.dense
    if not len(rows):
        return HeadGradients(None, None, None)
    sums = HeadSums(sums.maximum[rows], sums.log_total[rows])
    return head_gradients(hidden[rows], head, labels[rows], sums, c[rows], ignore_index=ignore_index, **wants)


def _by_rows(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    marks: MarkLists,
    rule: MarkRule,
    c: Tensor,
    hot: Hot,
    hot_head: Head,
    start: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """J·(p − δ) of each entry (E,), u (N,), and dH where wanted, added to `start`."""
    (n, d), config = hidden.shape, GatherConfig.of(hidden.shape[1])
    entries, even = (hidden.new_empty(size, dtype=torch.float32) for size in (len(marks.columns), n))
    grad_hidden = start
    if want_hidden and start is None:
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dice = Dice(rule.seed, torch.arange(n, device=hidden.device), head.vocab_size) if rule.unbiased else None
    launch(
        sparse_rows_kernel,
        n,
        on=hidden,
        options=config.options,
        hidden_ptr=hidden,
        weight_ptr=head.weight,
        bias_ptr=head.bias,
        labels_ptr=labels,
        columns_ptr=marks.columns,
        starts_ptr=marks.starts,
        maximum_ptr=sums.maximum,
        log_total_ptr=sums.log_total,
        coefficients_ptr=c,
        tail_ptr=marks.tail,
        weight_sum_ptr=_sum_of_weight(head, hot, hot_head) if want_hidden else None,
        row_dice_ptr=None if dice is None else dice.a,
        column_dice_ptr=None if dice is None else dice.b,
        entries_ptr=entries,
        even_ptr=even,
        grad_hidden_ptr=grad_hidden,
        free_ptr=hot.cold.sum(dtype=torch.int32),
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
        UNBIASED=dice is not None,
        HAS_GRAD=want_hidden,
        HAS_START=start is not None,
    )
    return entries, even, grad_hidden


def _by_columns(
    hidden: Tensor,
    head: Head,
    marks: MarkLists,
    entries: Tensor,
    even: Tensor,
    c: Tensor,
    hot: Hot,
    start: HeadGradients,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and the bias's gradient of all columns that are not hot, added to `start`."""
    config, vocab = GatherConfig.of(hidden.shape[1]), head.vocab_size
    by_column, order = marks.columns.sort(stable=True)
    edges = torch.searchsorted(by_column, torch.arange(vocab + 1, device=hidden.device, dtype=torch.int32))
    grad_weight, grad_bias = start.weight, start.bias
    if want_weight and grad_weight is None:
        grad_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    if want_bias and grad_bias is None and head.bias is not None:
        grad_bias = torch.empty_like(head.bias)
    launch(
        sparse_columns_kernel,
        vocab,
        on=hidden,
        options=config.options,
        hidden_ptr=hidden,
        rows_ptr=marks.rows,
        entries_ptr=entries,
        order_ptr=order,
        edges_ptr=edges,
        even_ptr=even,
        coefficients_ptr=c,
        cold_ptr=hot.cold,
        hidden_sum_ptr=_weighted_sum(hidden, even) if want_weight else None,
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


def _sum_of_weight(head: Head, hot: Hot, hot_head: Head) -> Tensor:
    """Σ_j w_j (D,) float32 over columns that are neither hot nor taken out."""
    if head.bias is None:
        return head.weight.sum(0, dtype=torch.float32) - hot_head.weight.sum(0, dtype=torch.float32)
    return _weighted_sum(head.weight, hot.cold.float())


def _weighted_sum(matrix: Tensor, factors: Tensor) -> Tensor:
    """Σ_i factors_i·matrix_i (D,) float32."""
    total = matrix.new_zeros(matrix.shape[1], dtype=torch.float32)
    for rows in slices(matrix.shape[0], SUM_ROWS):
        total += factors[rows] @ matrix[rows].float()
    return total
