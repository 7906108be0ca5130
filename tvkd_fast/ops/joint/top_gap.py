"""`linear_top_gap`: how two models rank each other's most probable tokens.

Letters: N tokens, R of them at a time, D hidden of each model, V vocabulary, C vocabulary entries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.checks import check_transforms
from tvkd_fast.ops.inputs import as_head
from tvkd_fast.ops.joint.pair_input import check_numbers_per_row, pair_input
from tvkd_fast.ops.tiles.exact import accumulation_dtype, blocks

NAME = "linear_top_gap"
_ENTRIES = 2**24
"""Logits of a block [N, C], and the head's rows [C, D]: 64 MiB each in float32."""


def linear_top_gap(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    rows: Tensor | None = None,
) -> Tensor:
    """[z_t − z_s] − [u_t − u_s] of each token: z and u are the student's and the teacher's logits, s and t the tokens
    that they find most probable.

    Log-probabilities give the same, since a model's log-sum-exp cancels. It is DPKD's margin (arXiv 2406.19774).

    Args:
        hidden, weight, teacher_hidden, teacher_weight, rows: as in `linear_divergence`.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats, never positive, and 0 where both find one token most probable.
        Differentiable once by the student's hidden, weight and bias through its two logits, s and t being constants; no
        gradient goes to the teacher. Forward one product per model, backward none: rows of the weight are gathered.
        Memory beyond inputs, result and gradients is 64 MiB; of 16 bits another 64 MiB, the states of one model in
        float32, and in the backward the float32 sum [V, D] of the weight's gradient.

    Raises:
        ValueError: as `linear_divergence`.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> linear_top_gap(hidden, weight, hidden.flip(0), weight)
        tensor([-2., -2.])
    """
    hidden, head, other_hidden, teacher = pair_input(
        hidden,
        as_head(weight),
        teacher_hidden.detach(),
        as_head(teacher_weight),
        bias=None,
        softcap=None,
        logit_scale=1.0,
        teacher_bias=None,
        teacher_softcap=None,
        teacher_logit_scale=1.0,
        teacher_index=None,
    )
    assert other_hidden is not None
    assert teacher is not None
    check_transforms(NAME, hidden, head.weight, head.bias, other_hidden, teacher.weight, teacher.bias)
    check_numbers_per_row(hidden, rows=rows)
    with without_autocast(hidden):
        with torch.no_grad():
            tops = torch.stack([_top(other_hidden, teacher), _top(hidden, head)], 1)
            of_teacher = _logits_at(other_hidden, teacher, tops)
        of_student = _logits_at(hidden, head, tops)
    gap = (of_student - of_teacher.to(of_student.dtype)).diff(dim=1)[:, 0].neg()
    # Rounding finds another token most probable than the exact logits would; the derivative stays what it is.
    gap = gap - gap.detach().clamp_min(0.0)
    return gap if rows is None else gap.masked_fill(~rows, 0.0)


def _top(hidden: Tensor, head: Head) -> Tensor:
    """(N,) int64 the most probable token of each row; of several the first."""
    states = hidden.to(accumulation_dtype(hidden.dtype))
    largest = states.new_full((len(states),), -torch.inf)
    found = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    for columns in blocks(head.vocab_size, max(1, _ENTRIES // max(states.shape))):
        logits = states @ head.weight[columns].to(states.dtype).T
        if head.bias is not None:
            logits += head.bias[columns]
        # Softcap and scale keep the order, but for a scale below 0.
        values, places = logits.max(1) if head.logit_scale > 0 else logits.neg_().max(1)
        better = values > largest
        largest, found = torch.where(better, values, largest), torch.where(better, places + columns.start, found)
    return found


def _logits_at(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """[N, 2] logits of two tokens of each row."""
    logits: Tensor = _Products.apply(hidden, head.weight, ids)
    if head.bias is not None:
        # Cast before it is gathered: a gradient by it is summed in the accumulator's dtype.
        logits = logits + head.bias.to(logits.dtype)[ids]
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class _Products(torch.autograd.Function):
    """h·w_j of the tokens j that `ids` [N, 2] names, [N, 2] in the accumulator's dtype; gradients are rounded once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        acc = accumulation_dtype(hidden.dtype)
        out = hidden.new_empty(ids.shape, dtype=acc)
        for rows in _row_blocks(hidden):
            out[rows] = (hidden[rows].to(acc)[:, None] * weight[ids[rows]].to(acc)).sum(-1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, ids = ctx.saved_tensors
        want_hidden, want_weight, _ = ctx.needs_input_grad
        by_hidden = torch.empty_like(hidden) if want_hidden else None
        by_weight = torch.zeros_like(weight, dtype=upstream.dtype) if want_weight else None
        for rows in _row_blocks(hidden):
            c = upstream[rows, :, None]
            if by_hidden is not None:
                by_hidden[rows] = (c * weight[ids[rows]].to(c.dtype)).sum(1).to(hidden.dtype)
            if by_weight is not None:
                by_weight.index_add_(0, ids[rows].flatten(), (c * hidden[rows].to(c.dtype)[:, None]).flatten(0, 1))
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None


def _row_blocks(hidden: Tensor) -> Iterator[slice]:
    """Rows whose [R, 2, D] and what is made of them stay within 64 MiB."""
    return blocks(len(hidden), max(1, _ENTRIES // (16 * hidden.shape[1])))
