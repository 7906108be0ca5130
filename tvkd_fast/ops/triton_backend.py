"""The head in Triton kernels: the same functions as `torch_backend`, for CUDA and ROCm tensors.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tvkd_fast.kernels import head_backward, head_marks, head_slopes, head_stats, sparse_backward
from tvkd_fast.kernels.head import Head, HeadGradients, HeadSums, MarkRule
from tvkd_fast.kernels.mark_lists import MarkLists
from tvkd_fast.ops.autocast import without_autocast


def head_sums(
    hidden: Tensor,
    head: Head,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kappa: float | None = None,
    entropy: bool = False,
) -> HeadSums:
    labels = None if labels is None else labels.contiguous()
    return head_stats.head_sums(
        packed_rows(hidden), packed(head), labels=labels, ignore_index=ignore_index, kappa=kappa, entropy=entropy
    )


def logps_forward(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int, workspace_mb: int, streamed: bool
) -> tuple[HeadSums, Tensor]:
    hidden, head, labels = packed_rows(hidden), packed(head), labels.contiguous()
    if streamed:
        return head_slopes.head_slopes(hidden, head, labels, ignore_index=ignore_index)
    assert workspace_mb == 0
    nothing = hidden.new_empty((0, head.vocab_size), dtype=torch.float32)
    return head_stats.head_sums(hidden, head, labels=labels, ignore_index=ignore_index), nothing


def logps_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    grad_logps: Tensor,
    *,
    logits: Tensor,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    return head_backward.head_gradients(
        packed_rows(hidden),
        packed(head),
        labels.contiguous(),
        sums,
        grad_logps,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )


def mark(
    hidden: Tensor, head: Head, labels: Tensor, rule: MarkRule, *, ignore_index: int
) -> tuple[HeadSums, MarkLists]:
    """The statistics (N,), and the entries that a sparse gradient is made of."""
    with without_autocast(hidden):
        return head_marks.mark(packed_rows(hidden), packed(head), labels.contiguous(), rule, ignore_index=ignore_index)


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    marks: MarkLists,
    rule: MarkRule,
    grad_logps: Tensor,
    *,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t grad_logps_t·logp_t; `sums` and `marks` as `mark` returned them, under the same rule."""
    with without_autocast(hidden):
        return sparse_backward.sparse_gradients(
            packed_rows(hidden),
            packed(head),
            labels.contiguous(),
            sums,
            marks,
            rule,
            grad_logps,
            ignore_index=ignore_index,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )


def packed_rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which is how the kernels read it."""
    if x.stride(-1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    # A size of 1 counts as contiguous whatever its stride is, and a descriptor wants the stride all the same.
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def packed(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.contiguous()
    return replace(head, weight=packed_rows(head.weight), bias=bias)
