"""The head in torch tiles: one call for the statistics, one for the gradients, on any device.

Letters: N tokens, K of them kept, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, SelectedEntries, SelectionRule
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.tiles import exact, sparse


def head_sums(
    hidden: Tensor,
    head: Head,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kappa: float | None = None,
    entropy: bool = False,
) -> HeadSums:
    with without_autocast(hidden):
        kept = None if labels is None else kept_rows(labels, ignore_index)
        labels = labels if labels is None or kept is None else labels[kept]
        sums = exact.head_sums(hidden, head, kept=kept, labels=labels, kappa=kappa, entropy=entropy)
        return _spread(sums, kept, hidden)


def logps_forward(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int, workspace_mb: int, streamed: bool
) -> tuple[HeadSums, Tensor]:
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        wanted = labels if kept is None else labels[kept]
        if not streamed:
            logits = exact.logits_workspace(hidden, head, kept, workspace_mb)
            sums = exact.head_sums(hidden, head, kept=kept, labels=wanted, logits=logits)
            return _spread(sums, kept, hidden), logits
        sums, dlogp_dhidden = exact.head_dlogp_dhidden(hidden, head, wanted, kept=kept)
        if kept is None:
            # Off the CPU every row is computed, those to ignore among them.
            dlogp_dhidden.masked_fill_((labels == ignore_index)[:, None], 0.0)
        return _spread(sums, kept, hidden), dlogp_dhidden


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
    with without_autocast(hidden):
        kept, labels, sums, upstream = _of_kept_rows(labels, sums, grad_logps, ignore_index)
        return exact.head_gradients(
            hidden,
            head,
            labels,
            sums,
            upstream,
            kept=kept,
            logits=logits,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )


def select_entries(
    hidden: Tensor, head: Head, labels: Tensor, rule: SelectionRule, *, ignore_index: int
) -> tuple[HeadSums, SelectedEntries]:
    """The statistics (N,), `target` among them, and the entries that a sparse gradient is made of."""
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        sums, selected = sparse.select_entries(hidden, head, labels if kept is None else labels[kept], rule, kept=kept)
        return _spread(sums, kept, hidden), selected


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedEntries,
    grad_logps: Tensor,
    *,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t grad_logps_t·logp_t; `sums` and `selected` as `select_entries` returned them."""
    with without_autocast(hidden):
        kept, labels, sums, upstream = _of_kept_rows(labels, sums, grad_logps, ignore_index)
        return sparse.sparse_gradients(
            hidden,
            head,
            labels,
            sums,
            selected,
            upstream,
            kept=kept,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )


def kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """(K,) rows to compute, or None for all. A GPU would have to wait for the count, so it computes them all."""
    if labels.device.type != "cpu":
        return None
    kept = labels != ignore_index
    return None if kept.all() else kept.nonzero()[:, 0]


def _of_kept_rows(
    labels: Tensor, sums: HeadSums, grad_logps: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor, HeadSums, Tensor]:
    """Return the kept rows (None for all), and of those the labels, sums and upstream gradients, 0 where ignored."""
    kept = kept_rows(labels, ignore_index)
    upstream = grad_logps.masked_fill(labels == ignore_index, 0)
    if kept is None:
        return None, labels, sums, upstream
    return kept, labels[kept], sums.map(lambda x: x[kept]), upstream[kept]


def _spread(sums: HeadSums, kept: Tensor | None, hidden: Tensor) -> HeadSums:
    """The kept rows' numbers at their places among all of hidden's, 0 elsewhere."""
    if kept is None:
        return sums
    zeros = hidden.new_zeros(hidden.shape[0], dtype=sums.maximum.dtype)
    return sums.map(lambda x: zeros.index_copy(0, kept, x))
