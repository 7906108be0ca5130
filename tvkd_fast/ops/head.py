"""The head by either implementation: one call for the statistics, one for the gradients.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.ops import tiles
from tvkd_fast.ops.checks import check_head, check_tensors
from tvkd_fast.ops.dispatch import autocast_input, takes_triton, without_autocast

_SCALED_FLOATS = 2**20


def head_input(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """States and head as the ops take them: in autocast's dtype, checked to fit each other."""
    check_tensors(hidden=hidden, weight=head.weight, bias=head.bias)
    hidden, weight = autocast_input(hidden), autocast_input(head.weight)
    bias = None if head.bias is None else autocast_input(head.bias)
    check_head(hidden, weight, bias, head.softcap, head.logit_scale)
    return hidden, replace(head, weight=weight, bias=bias)


def head_sums(
    hidden: Tensor,
    head: Head,
    impl: str,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kappa: float | None = None,
    entropy: bool = False,
    logits: Tensor | None = None,
) -> HeadSums:
    """Statistics of hidden [N, D], each (N,); of an ignored label's row they mean nothing. `logits`: torch's alone."""
    if takes_triton(impl, hidden):
        from tvkd_fast.kernels import head_stats

        labels = None if labels is None else labels.contiguous()
        return head_stats.head_sums(
            packed_rows(hidden), packed(head), labels=labels, ignore_index=ignore_index, kappa=kappa, entropy=entropy
        )
    with without_autocast(hidden):
        kept = None if labels is None else kept_rows(labels, ignore_index)
        if labels is not None and kept is not None:
            labels = labels[kept]
        sums = tiles.head_sums(hidden, head, kept=kept, labels=labels, kappa=kappa, entropy=entropy, logits=logits)
        return spread(sums, kept, hidden)


def head_forward(
    hidden: Tensor,
    head: Head,
    impl: str,
    labels: Tensor,
    *,
    ignore_index: int,
    workspace_mb: int,
    streamed: bool,
) -> tuple[HeadSums, Tensor]:
    """`head_sums` with labels, and what the same pass leaves for the backward, in the dtype of the sums.

    Where `streamed`, dlogp_t/dh_t [N, D], 0 where a label is ignored; else logits [S, V] of as many rows as the
    workspace holds.
    """
    if not streamed:
        kept = kept_rows(labels, ignore_index)
        logits = tiles.room_for_logits(hidden, head, kept, workspace_mb)
        return head_sums(hidden, head, impl, labels=labels, ignore_index=ignore_index, logits=logits), logits
    if takes_triton(impl, hidden):
        from tvkd_fast.kernels import head_dhidden as kernel

        return kernel.head_dlogp_dhidden(
            packed_rows(hidden), packed(head), labels.contiguous(), ignore_index=ignore_index
        )
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        sums, slopes = tiles.head_slopes(hidden, head, labels if kept is None else labels[kept], kept=kept)
        if kept is None:
            # Off the CPU every row is computed, those to ignore among them.
            slopes.masked_fill_((labels == ignore_index)[:, None], 0.0)
        return spread(sums, kept, hidden), slopes


def scaled_slopes(slopes: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_logps_t·slopes_t [N, D], rounded once to `dtype`, a block of rows at a time."""
    out = slopes.new_empty(slopes.shape, dtype=dtype)
    rows = max(1, _SCALED_FLOATS // max(slopes.shape[1], 1))
    for start in range(0, slopes.shape[0], rows):
        block = slice(start, start + rows)
        torch.mul(slopes[block], grad_logps[block, None], out=out[block])
    return out


def head_gradients(
    hidden: Tensor,
    head: Head,
    impl: str,
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
    """Exact gradients of Σ_t grad_logps_t·logp_t; `sums` and `logits` as `head_forward` gave them."""
    wants: dict[str, Any] = {"want_hidden": want_hidden, "want_weight": want_weight, "want_bias": want_bias}
    if takes_triton(impl, hidden):
        from tvkd_fast.kernels import head_backward

        return head_backward.head_gradients(
            packed_rows(hidden), packed(head), labels.contiguous(), sums, grad_logps, ignore_index=ignore_index, **wants
        )
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        upstream, maximum, log_total = grad_logps.masked_fill(labels == ignore_index, 0), sums.maximum, sums.log_total
        if kept is not None:
            labels, upstream, maximum, log_total = (x[kept] for x in (labels, upstream, maximum, log_total))
        sums = HeadSums(maximum, log_total)
        return tiles.head_gradients(hidden, head, labels, sums, upstream, kept=kept, logits=logits, **wants)


def kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """(K,) rows to compute, or None for all. A GPU would have to wait for the count, so it computes them all."""
    if labels.device.type != "cpu":
        return None
    kept = labels != ignore_index
    return None if kept.all() else kept.nonzero()[:, 0]


def spread(sums: HeadSums, kept: Tensor | None, hidden: Tensor) -> HeadSums:
    """The kept rows' numbers at their places among all of hidden's, 0 elsewhere."""
    if kept is None:
        return sums
    zeros = hidden.new_zeros(hidden.shape[0], dtype=sums.maximum.dtype)
    return sums.map(lambda x: zeros.index_copy(0, kept, x))


def packed_rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which is how the kernels read it."""
    if x.stride(-1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    # A size of 1 counts as contiguous whatever its stride is, and a descriptor wants the stride all the same.
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def packed(head: Head) -> Head:
    return Head(
        packed_rows(head.weight), None if head.bias is None else head.bias.contiguous(), head.softcap, head.logit_scale
    )
