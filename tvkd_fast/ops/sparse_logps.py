"""`linear_logps` with a sparse gradient, as registered ops: one of the torch tiles, one of the Triton kernels.

Letters: N tokens, D hidden, V vocabulary, E selected entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadSums, SelectedEntries, SelectionRule
from tvkd_fast.ops import torch_backend
from tvkd_fast.ops.break_even import break_even
from tvkd_fast.ops.checks import check_finite, check_label_range
from tvkd_fast.ops.gradient import HeadGradient
from tvkd_fast.ops.registered import Gradients, Kept, as_tensors, differentiate, fake_gradients
from tvkd_fast.ops.tiles.exact import accumulation_dtype


def sparse_logps(
    hidden: Tensor, head: Head, labels: Tensor, settings: HeadGradient, *, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,), differentiable, and the five sums of `HeadStats`. `impl` is resolved."""
    op = selected_op if impl == "triton" else sparse_op
    logps, *_, numbers = op(
        hidden,
        head.weight,
        head.bias,
        labels,
        head.softcap,
        head.logit_scale,
        ignore_index,
        settings.eps_for(hidden.dtype),
        settings.cap_for(head.vocab_size),
        settings.tail == "unbiased",
        settings.seed_for(),
        settings.max_tail,
        settings.grad_mode == "auto",
    )
    return logps, numbers


def _rule(
    hidden: Tensor, weight: Tensor, eps: float, row_cap: int, unbiased: bool, seed: int, max_tail: float, measure: bool
) -> SelectionRule:
    """`measure` takes every row as dense where that is quicker on this machine."""
    limit = break_even(hidden.device, hidden.dtype, *weight.shape) if measure else float("inf")
    return SelectionRule(eps, row_cap, unbiased, seed, max_tail, limit)


def _sparse_logps(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (N,); for the backward max z, log Σ exp(z − max z) and z at the label, (N,) each, and
    `SelectedEntries`; then `HeadStats`' five sums.
    """
    labels = labels.long()
    check_label_range(labels, weight.shape[0], ignore_index)
    rule = _rule(hidden, weight, eps, row_cap, unbiased, seed, max_tail, measure)
    head = Head(weight, bias, softcap, logit_scale)
    sums, selected = torch_backend.select_entries(hidden, head, labels, rule, ignore_index=ignore_index)
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    assert sums.target is not None
    assert selected.below is not None
    counted = labels != ignore_index
    dense = selected.dense & counted
    counts = torch.tensor([selected.count, selected.candidates], dtype=torch.float64, device=hidden.device)
    numbers = torch.stack(
        [
            counted.sum().double(),
            *counts,
            selected.below.masked_fill(selected.dense | ~counted, 0.0).sum().double(),
            dense.sum().double(),
        ]
    )
    chain = logps.new_empty(0) if selected.chain is None else selected.chain
    found = (selected.rows, selected.columns, selected.p, chain, selected.bounds, selected.tail, dense)
    return logps, sums.maximum, sums.log_total, sums.target, *found, numbers


def _sparse_gradients(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    target: Tensor,
    rows: Tensor,
    columns: Tensor,
    p: Tensor,
    chain: Tensor,
    bounds: Tensor,
    tail: Tensor,
    dense: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    grads = torch_backend.sparse_gradients(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        labels.long(),
        HeadSums(maximum, log_total, target=target),
        SelectedEntries(rows, columns, p, chain if softcap is not None else None, bounds, tail, dense),
        grad_logps,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )
    return as_tensors(grads, hidden)


def _selected_logps(
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
    `HeadStats`' five sums, where every selected entry counts as kept: the backward prunes them.
    """
    from tvkd_fast.ops import triton_backend

    labels = labels.long()
    check_label_range(labels, weight.shape[0], ignore_index)
    rule = _rule(hidden, weight, eps, row_cap, unbiased, seed, max_tail, measure)
    head = Head(weight, bias, softcap, logit_scale)
    sums, selected = triton_backend.select_entries(hidden, head, labels, rule, ignore_index=ignore_index)
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    assert selected.numbers is not None
    entries, tail, dense = selected.numbers
    numbers = torch.stack([(labels != ignore_index).sum().double(), entries, entries, tail, dense])
    found = (selected.columns, selected.starts, selected.tail, selected.dense_rows, selected.dense_columns)
    return logps, sums.maximum, sums.log_total, *found, numbers


def _selected_gradients(
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
    dense_rows: Tensor,
    dense_columns: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    eps: float,
    unbiased: bool,
    seed: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    from tvkd_fast.kernels.selected_lists import SelectedLists
    from tvkd_fast.ops import triton_backend

    grads = triton_backend.sparse_gradients(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        labels.long(),
        HeadSums(maximum, log_total),
        SelectedLists(columns, starts, tail, dense_rows, dense_columns),
        SelectionRule(eps, weight.shape[0], unbiased, seed),
        grad_logps,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )
    return as_tensors(grads, hidden)


sparse_op = torch.library.custom_op("tvkd_fast::sparse_logps", _sparse_logps, mutates_args=())
sparse_gradients_op = torch.library.custom_op("tvkd_fast::sparse_logps_gradients", _sparse_gradients, mutates_args=())
selected_op = torch.library.custom_op("tvkd_fast::marked_logps", _selected_logps, mutates_args=())
selected_gradients_op = torch.library.custom_op(
    "tvkd_fast::marked_logps_gradients", _selected_gradients, mutates_args=()
)
sparse_gradients_op.register_fake(fake_gradients)
selected_gradients_op.register_fake(fake_gradients)


@sparse_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, *_: Any) -> Any:
    context = torch.library.get_ctx()
    entries, tiles = context.new_dynamic_size(), context.new_dynamic_size(min=1)
    dtype = accumulation_dtype(hidden.dtype)
    tokens = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)]
    places = [hidden.new_empty(entries, dtype=torch.int32) for _ in range(2)]
    chain = hidden.new_empty(0 if softcap is None else entries, dtype=dtype)
    bounds = torch.empty(tiles, dtype=torch.int64)
    tail, dense = torch.empty_like(tokens[0]), torch.empty_like(tokens[0], dtype=torch.bool)
    sums = hidden.new_empty(5, dtype=torch.float64)
    return *tokens, *places, hidden.new_empty(entries, dtype=dtype), chain, bounds, tail, dense, sums


@selected_op.register_fake
def _(hidden: Tensor, *_: Any) -> Any:
    context = torch.library.get_ctx()
    n = hidden.shape[0]
    entries, num_dense_rows, num_dense_columns = (context.new_dynamic_size() for _ in range(3))
    tokens = [hidden.new_empty(n, dtype=torch.float32) for _ in range(4)]
    columns = hidden.new_empty(entries, dtype=torch.int32)
    sizes = (n + 1, num_dense_rows, num_dense_columns)
    starts, dense_rows, dense_columns = (hidden.new_empty(size, dtype=torch.int64) for size in sizes)
    return *tokens[:3], columns, starts, tokens[3], dense_rows, dense_columns, hidden.new_empty(5, dtype=torch.float64)


def _kept_of_sparse(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
    hidden, weight, bias, labels, *settings = inputs
    return (hidden, weight, bias, labels, *output[1:-1]), settings[:3]


def _kept_of_selected(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
    hidden, weight, bias, labels, *settings = inputs
    softcap, logit_scale, ignore_index, eps, _, unbiased, seed, *_ = settings
    kept = (hidden, weight, bias, labels, *output[1:-1])
    return kept, (softcap, logit_scale, ignore_index, eps, unbiased, seed)


def _derivative_by(op: Any) -> Any:
    def derivative(
        grad_logps: Tensor, kept: Sequence[Any], settings: Sequence[Any], wants: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grads: Gradients = op(grad_logps, *kept, *settings, *wants)
        return grads

    return derivative


differentiate(sparse_op, _kept_of_sparse, _derivative_by(sparse_gradients_op))
differentiate(selected_op, _kept_of_selected, _derivative_by(selected_gradients_op))
