"""The head in Triton kernels: the same functions as `torch_backend`, for CUDA and ROCm tensors.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvkd_fast.kernels import head_backward, head_dhidden, head_selection, head_stats, logit_sums, sparse_backward
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists
from tvkd_fast.ops import triton_walk
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.inputs import packed, packed_rows


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
    hidden, head = packed_rows(hidden), packed(head)
    # The kernel skips tiles of rows to ignore; the library would multiply them too.
    if labels is None and kappa is None and not entropy and logit_sums.is_faster(hidden):
        return logit_sums.logit_sums(hidden, head)
    return head_stats.head_sums(hidden, head, labels=labels, ignore_index=ignore_index, kappa=kappa, entropy=entropy)


def logps_forward(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int, workspace_mb: int, streamed: bool
) -> tuple[HeadSums, Tensor]:
    hidden, head, labels = packed_rows(hidden), packed(head), labels.contiguous()
    if streamed:
        return head_dhidden.head_dlogp_dhidden(hidden, head, labels, ignore_index=ignore_index)
    if workspace_mb and len(hidden):
        return triton_walk.kept_forward(hidden, head, labels, ignore_index=ignore_index, workspace_mb=workspace_mb)
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
    hidden, head, labels = packed_rows(hidden), packed(head), labels.contiguous()
    if len(logits):
        wants = (want_hidden, want_weight, want_bias)
        return triton_walk.kept_gradients(
            hidden, head, labels, sums, grad_logps, logits, ignore_index=ignore_index, wants=wants
        )
    return head_backward.head_gradients(
        hidden,
        head,
        labels,
        sums,
        grad_logps,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )


def select_entries(
    hidden: Tensor, head: Head, labels: Tensor, rule: SelectionRule, *, ignore_index: int
) -> tuple[HeadSums, SelectedLists]:
    """The statistics (N,), and the entries that a sparse gradient is made of."""
    with without_autocast(hidden):
        return head_selection.select_entries(
            packed_rows(hidden), packed(head), labels.contiguous(), rule, ignore_index=ignore_index
        )


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedLists,
    rule: SelectionRule,
    grad_logps: Tensor,
    *,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t grad_logps_t·logp_t; `sums` and `selected` as `select_entries` returned them by this rule."""
    with without_autocast(hidden):
        return sparse_backward.sparse_gradients(
            packed_rows(hidden),
            packed(head),
            labels.contiguous(),
            sums,
            selected,
            rule,
            grad_logps,
            ignore_index=ignore_index,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )
