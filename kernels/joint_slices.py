"""The joint statistics over slices of the vocabulary: each is walked by itself, and the chain rule adds them up.

With S_k of the slices' shares of p and T_k of q's: KL(q‖p) = Σ_k T_k·(KL_k + log T_k/S_k), H = Σ_k S_k·(H_k − log S_k),
Σp² = Σ_k S_k²·(Σp²)_k. Sums over p and q that are normalized already add up as they are.

Letters: N tokens, S slices, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tvkd_fast.kernels.blocks import in_workspace, slices
from tvkd_fast.kernels.joint_stats import joint_sums
from tvkd_fast.kernels.joint_values import joint_values
from tvkd_fast.kernels.records import Head, HeadSums, JointSums, JointValues
from tvkd_fast.kernels.sliced_head import SlicedHead, bytes_per_column

WHOLE_TILES = 256
"""Columns by which slices are cut, a multiple of every tile's."""


def sums_by_slices(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    *,
    labels: Tensor | None,
    ignore_index: int,
    entropy: bool,
    squares: bool,
) -> JointSums:
    """`joint_sums`, of heads that may be made a slice at a time; those of plain heads are one slice."""
    walk = partial(joint_sums, labels=labels, ignore_index=ignore_index, entropy=entropy, squares=squares)
    if not _is_sliced(head, other_head):
        return walk(hidden, head, other_hidden, other_head)

    def run(budget: int) -> JointSums:
        parts: list[JointSums] = []
        target = None
        for columns, own, other in _slices(head, other_head, budget):
            found = walk(hidden, own, other_hidden, other, vocab_start=columns.start)
            parts.append(found)
            if labels is not None and found.own.target is not None:
                here = (labels >= columns.start) & (labels < columns.stop)
                target = found.own.target if target is None else torch.where(here, found.own.target, target)
        merged = merge(parts, target)
        return merged if labels is None else _without(merged, labels == ignore_index)

    return in_workspace(hidden, run)


def values_by_slices(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    sums: JointSums,
    *,
    labels: Tensor | None,
    ignore_index: int,
    beta: float | None,
    variation: bool,
    alpha: float | None,
) -> JointValues:
    """`joint_values`, of heads that may be made a slice at a time."""
    walk = partial(
        joint_values, labels=labels, ignore_index=ignore_index, beta=beta, variation=variation, alpha=alpha
    )  # fmt: skip
    if not _is_sliced(head, other_head):
        return walk(hidden, head, other_hidden, other_head, sums)

    def run(budget: int) -> JointValues:
        total: dict[str, Tensor] = {}
        for _, own, other in _slices(head, other_head, budget):
            for name, x in vars(walk(hidden, own, other_hidden, other, sums)).items():
                if isinstance(x, Tensor):
                    total[name] = total[name].add_(x) if name in total else x
        return JointValues(beta, alpha, **total)

    return in_workspace(hidden, run)


def merge(parts: Sequence[JointSums], target: Tensor | None = None) -> JointSums:
    """The statistics (N,) over S slices together; a slice without a share of a softmax counts as nothing."""
    own, log_p = _merged([x.own for x in parts])
    other, log_q = _merged([x.other for x in parts])
    entropies = [x.own.entropy.double() for x in parts if x.own.entropy is not None]
    squares = [x.log_squares.double() for x in parts if x.log_squares is not None]
    entropy = log_squares = None
    if entropies:
        entropy = _mean(log_p, torch.stack(entropies) - log_p).float()
    if squares:
        of_slices = (2.0 * log_p + torch.stack(squares)).where(log_p != -torch.inf, log_p)
        log_squares = torch.logsumexp(of_slices, 0).float()
    forward = _divergence([x.forward_kl for x in parts], log_q, log_p)
    reverse = _divergence([x.reverse_kl for x in parts], log_p, log_q)
    return JointSums(HeadSums(*own, target=target, entropy=entropy), HeadSums(*other), forward, reverse, log_squares)


def _is_sliced(*heads: Head) -> bool:
    return any(isinstance(head, SlicedHead) for head in heads)


def _slices(head: Head, other_head: Head, budget: int) -> Iterator[tuple[slice, Head, Head]]:
    """Columns of both heads that together fit a budget of bytes."""
    fits = budget // (bytes_per_column(head) + bytes_per_column(other_head))
    for columns in slices(head.vocab_size, max(WHOLE_TILES, fits // WHOLE_TILES * WHOLE_TILES)):
        start, stop = columns.start, columns.stop
        yield columns, head.columns(start, stop), other_head.columns(start, stop)


def _merged(parts: Sequence[HeadSums]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A side's maximum and log_total (N,) float32, and the logarithms of the slices' shares [S, N] float64."""
    maxima = torch.stack([x.maximum.double() for x in parts])
    maximum = maxima.amax(0)
    logs = maxima - maximum + torch.stack([x.log_total.double() for x in parts])
    log_total = torch.logsumexp(logs, 0)
    return (maximum.float(), log_total.float()), logs - log_total


def _mean(log_share: Tensor, x: Tensor) -> Tensor:
    """Σ_k share_k·x_k, in which a share of 0 is nothing, whatever x is."""
    return torch.where(log_share == -torch.inf, 0.0, log_share.exp() * x).sum(0)


def _divergence(parts: Sequence[Tensor], log_share: Tensor, log_other: Tensor) -> Tensor:
    """KL (N,) of the softmax with `log_share` from the other, not negative."""
    # A slice in which the other softmax gives nothing at all has no KL of its own, and an infinite part.
    of_slices = torch.stack([x.double() for x in parts]).masked_fill(log_other == -torch.inf, torch.inf)
    apart = (log_share - log_other).masked_fill(log_other == -torch.inf, 0.0)
    return _mean(log_share, of_slices + apart).clamp_min(0.0).float()


def _without(sums: JointSums, ignored: Tensor) -> JointSums:
    """0 in the rows that are ignored, as the kernels leave them."""

    def zeros(x: Tensor) -> Tensor:
        return x.masked_fill(ignored, 0.0)

    squares = None if sums.log_squares is None else zeros(sums.log_squares)
    return JointSums(
        sums.own.map(zeros), sums.other.map(zeros), zeros(sums.forward_kl), zeros(sums.reverse_kl), squares
    )  # fmt: skip
