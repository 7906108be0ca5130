"""`linear_logps` with a sparse gradient in Triton kernels: the registered ops.

Letters: N tokens, D hidden, V vocabulary, E marked entries, K hot columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadSums, SelectionRule
from tvkd_fast.ops.break_even import break_even
from tvkd_fast.ops.checks import check_finite, check_label_range
from tvkd_fast.ops.dispatch import without_autocast
from tvkd_fast.ops.head import packed, packed_rows
from tvkd_fast.ops.registered import (
    Gradients,
    as_tensors,
    asked_for,
    check_differentiated_once,
    differentiates_first,
    fake_gradients,
)


def _marked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    eps: float,
    row_cap: int,
    unbiased: bool,
    seed: int,
    max_tail: float,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (N,); for the backward max z and log Σ exp(z − max z), (N,) each, and `SelectedLists`; then
    `HeadStats`' five sums, where what is marked counts as kept: it is pruned in the backward.
    """
    from tvkd_fast.kernels.head_selection import select_entries

    labels = labels.long().contiguous()
    check_label_range(labels, weight.shape[0], ignore_index)
    limit = break_even(hidden.device, hidden.dtype, *weight.shape) if measure else float("inf")
    rule = SelectionRule(eps, row_cap, unbiased, seed, max_tail, limit)
    head = packed(Head(weight, bias, softcap, logit_scale))
    with without_autocast(hidden):
        sums, marks = select_entries(packed_rows(hidden), head, labels, rule, ignore_index=ignore_index)
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    assert marks.numbers is not None
    entries, tail, dense = marks.numbers
    numbers = torch.stack([(labels != ignore_index).sum().double(), entries, entries, tail, dense])
    found = (marks.columns, marks.starts, marks.tail, marks.dense_rows, marks.dense_columns)
    return logps, sums.maximum, sums.log_total, *found, numbers


def _marked_gradients(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    columns: Tensor,
    starts: Tensor,
    tail: Tensor,
    dense: Tensor,
    hot: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    eps: float,
    unbiased: bool,
    seed: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from tvkd_fast.kernels.selected_lists import SelectedLists
    from tvkd_fast.kernels.sparse_backward import sparse_gradients

    with without_autocast(hidden):
        grads = sparse_gradients(
            packed_rows(hidden),
            packed(Head(weight, bias, softcap, logit_scale)),
            labels.long().contiguous(),
            HeadSums(maximum, log_total),
            SelectedLists(columns, starts, tail, dense, hot),
            SelectionRule(eps, weight.shape[0], unbiased, seed),
            grad_logps,
            ignore_index=ignore_index,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )
    return as_tensors(grads, hidden)


marked_op = torch.library.custom_op("tvkd_fast::marked_logps", _marked_logps, mutates_args=())
marked_gradients_op = torch.library.custom_op("tvkd_fast::marked_logps_gradients", _marked_gradients, mutates_args=())


@marked_op.register_fake
def _(hidden: Tensor, *_: Any) -> Any:
    context = torch.library.get_ctx()
    n, (entries, dense, hot) = hidden.shape[0], (context.new_dynamic_size() for _ in range(3))
    tokens = [hidden.new_empty(n, dtype=torch.float32) for _ in range(4)]
    columns = hidden.new_empty(entries, dtype=torch.int32)
    starts, dense_rows, hot_columns = (hidden.new_empty(size, dtype=torch.int64) for size in (n + 1, dense, hot))
    return *tokens[:3], columns, starts, tokens[3], dense_rows, hot_columns, hidden.new_empty(5, dtype=torch.float64)


@marked_gradients_op.register_fake
def _(grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Gradients:
    return fake_gradients((hidden, weight, bias), args[-3:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *settings = inputs
    softcap, logit_scale, ignore_index, eps, _, unbiased, seed, *_ = settings
    ctx.settings = (softcap, logit_scale, ignore_index, eps, unbiased, seed)
    differentiates_first(ctx, output)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:-1])


def _backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("linear_logps")
    if grad_logps is None:
        return (None,) * len(ctx.needs_input_grad)
    wants = ctx.needs_input_grad[:3]
    grads = marked_gradients_op(grad_logps, *ctx.saved_tensors, *ctx.settings, *wants)
    return (*asked_for(grads, wants), *[None] * 10)


marked_op.register_autograd(_backward, setup_context=_keep)
