"""The one-GEMM head's backward: dH and dW gathered from the selected entries, in a fixed order.

Letters: N tokens, D hidden, V vocabulary, E selected entries, K dense columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.dense_columns import DenseColumns
from tvkd_fast.kernels.head_backward import head_gradients
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists
from tvkd_fast.kernels.sparse_columns import sparse_columns
from tvkd_fast.kernels.sparse_rows import sparse_rows

SUM_ROWS = 4096


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedLists,
    rule: SelectionRule,
    coefficients: Tensor,
    *,
    ignore_index: int = -100,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t c_t·logp_t from the selected entries, c = `coefficients` (N,), 0 where a label is ignored.

    With M = {p ≥ ε}, the dense columns and the label, T the tail and u = c·s·T/(V − |M|), the gradient by h·w_j is
    c·s·J_j·(δ_jy − p_j) on M and −u elsewhere. Gathered is the difference from −u; −u itself goes to all columns that
    are neither dense nor taken out by a bias of −inf, as one vector. Dense columns and dense rows take the exact walk.
    Bitwise repeatable. States of rows to ignore must be finite, as in the exact backward.

    Traffic: 2·E·D numbers gathered, out of L2 for the most part (E·D where weight wants none), weight and
    hidden once, and the products of K columns, three.
    """
    c = coefficients.float().masked_fill((labels < 0) | (labels >= head.vocab_size), torch.nan)
    c = c.masked_fill(labels == ignore_index, 0.0)
    wants = {"want_hidden": want_hidden, "want_weight": want_weight, "want_bias": want_bias}
    start = _of_dense_rows(hidden, head, labels, sums, selected, c, ignore_index, wants)
    c = c.index_fill(0, selected.dense_rows, 0.0)
    dense = DenseColumns.of(selected.dense_columns, head)
    dense_head = dense.head(head)
    dense_block = HeadGradients(None, None, None)
    if dense_head.vocab_size:
        local = dense.local(labels, ignore_index)
        dense_block = head_gradients(hidden, dense_head, local, sums, c, ignore_index=-100, elsewhere=True, **wants)
    c = c.mul(head.logit_scale).contiguous()
    entries, even, grad_hidden = sparse_rows(
        hidden,
        head,
        labels,
        sums,
        selected,
        rule,
        c,
        spread_over=dense.is_sparse.sum(dtype=torch.int32),
        weight_sum=_sum_of_weight(head, dense, dense_head) if want_hidden else None,
        start=dense_block.hidden,
        want_hidden=want_hidden,
    )
    if grad_hidden is not None and start.hidden is not None:
        grad_hidden.index_copy_(0, selected.dense_rows, start.hidden)
    grad_weight, grad_bias = start.weight, start.bias
    if want_weight or want_bias:
        grad_weight, grad_bias = sparse_columns(
            hidden,
            head,
            selected,
            entries,
            even,
            c,
            is_sparse=dense.is_sparse,
            hidden_sum=_weighted_sum(hidden, even) if want_weight else None,
            start=start,
            want_weight=want_weight,
            want_bias=want_bias,
        )
        for whole, part in ((grad_weight, dense_block.weight), (grad_bias, dense_block.bias)):
            if whole is not None and part is not None:
                whole.index_add_(0, dense.columns, part)
    return HeadGradients(grad_hidden, grad_weight, grad_bias)


def _of_dense_rows(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedLists,
    c: Tensor,
    ignore_index: int,
    wants: dict[str, bool],
) -> HeadGradients:
    """Exact gradients of the dense rows alone, dH's only those; nothing where there are none."""
    rows = selected.dense_rows
    if not len(rows):
        return HeadGradients(None, None, None)
    sums = HeadSums(sums.maximum[rows], sums.log_total[rows])
    return head_gradients(hidden[rows], head, labels[rows], sums, c[rows], ignore_index=ignore_index, **wants)


def _sum_of_weight(head: Head, dense: DenseColumns, dense_head: Head) -> Tensor:
    """Σ_j w_j (D,) float32 over columns that are neither dense nor taken out."""
    if head.bias is None:
        return head.weight.sum(0, dtype=torch.float32) - dense_head.weight.sum(0, dtype=torch.float32)
    return _weighted_sum(head.weight, dense.is_sparse.float())


def _weighted_sum(matrix: Tensor, factors: Tensor) -> Tensor:
    """Σ_i factors_i·matrix_i (D,) float32."""
    total = matrix.new_zeros(matrix.shape[1], dtype=torch.float32)
    for rows in slices(matrix.shape[0], SUM_ROWS):
        total += factors[rows] @ matrix[rows].float()
    return total
