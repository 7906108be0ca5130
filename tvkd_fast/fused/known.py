"""The head's gradient made in the forward, where the loss knows its coefficients: three products and no recompute.

A pair's own log-probabilities give its margin, and the margin gives dL/dlogp of all its tokens (`torch_epilogue`). So a
block of whole pairs goes through the head once: its logits, their softmax, the pairs' coefficients, and from the same
logits its part of both gradients.

Letters: P pairs, 2P responses (chosen first), N response tokens, R rows of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tvkd_fast.fused.epilogue import Preference, by_response, torch_epilogue
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.tiles import exact
from tvkd_fast.ops.tiles.huge_pages import large_empty

WORKSPACE_BYTES = 128 * 2**20
"""Logits of a block, at most. A pair that needs more has its logits computed twice."""


def serves(hidden: Tensor, head: Head) -> bool:
    """Whether the gradient is made so: on a CPU, of a head that learns in the dtype that sums accumulate in."""
    acc = exact.accumulation_dtype(hidden.dtype)
    return hidden.device.type == "cpu" and hidden.dtype == acc and head.weight.requires_grad


def known_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    given: Preference,
    *,
    ignore_index: int,
    want_hidden: bool,
    want_bias: bool,
) -> tuple[HeadSums, Tensor, HeadGradients]:
    """One visit of every pair: the head's sums (N,), log-probabilities (N,), and the gradients of the mean loss.

    hidden [N, D], labels (N,). Of an ignored label's row all numbers are 0.
    """
    with without_autocast(hidden):
        return _visit(hidden, head, labels, _summed(given), ignore_index, want_hidden, want_bias)


def _visit(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    given: Preference,
    ignore_index: int,
    want_hidden: bool,
    want_bias: bool,
) -> tuple[HeadSums, Tensor, HeadGradients]:
    maximum, log_total, logps = (hidden.new_zeros(hidden.shape[0]) for _ in range(3))
    grads = HeadGradients(
        torch.zeros_like(hidden) if want_hidden else None,
        large_empty(head.weight, head.weight.shape).zero_(),
        torch.zeros_like(head.bias) if want_bias and head.bias is not None else None,
    )
    bounds = given.cu_seqlens.tolist()
    pairs = (len(bounds) - 1) // 2
    kept = labels != ignore_index
    most = max(1, WORKSPACE_BYTES // (head.vocab_size * hidden.element_size()))
    workspace = large_empty(hidden, (min(most, hidden.shape[0]), head.vocab_size))
    for block in _blocks(bounds, most):
        responses = [*block, *(pair + pairs for pair in block)]
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in responses])
        seen = rows[kept[rows]]
        logits = workspace[: len(seen)] if len(seen) <= most else workspace[:0]
        sums = exact.head_sums(hidden, head, kept=seen, labels=labels[seen], logits=logits)
        maximum[seen], log_total[seen], logps[seen] = sums.maximum, sums.log_total, sums.logps
        _, coefficients = torch_epilogue(logps[rows], _of_block(given, responses))
        exact.head_gradients(
            hidden,
            head,
            labels[seen],
            HeadSums(sums.maximum, sums.log_total),
            coefficients[kept[rows]] / pairs,
            kept=seen,
            logits=logits,
            want_hidden=want_hidden,
            want_weight=True,
            want_bias=want_bias,
            into=grads,
        )
    return HeadSums(maximum, log_total), logps, grads


def _blocks(bounds: list[int], most: int) -> Iterator[range]:
    """Runs of pairs whose tokens are at most `most`, or one pair that has more."""
    pairs = (len(bounds) - 1) // 2
    start = held = 0
    for pair in range(pairs):
        tokens = bounds[pair + 1] - bounds[pair] + bounds[pair + pairs + 1] - bounds[pair + pairs]
        if pair > start and held + tokens > most:
            yield range(start, pair)
            start, held = pair, 0
        held += tokens
    if pairs > start:
        yield range(start, pairs)


def _summed(given: Preference) -> Preference:
    """The same with the reference and the shaping summed over each response, once for all blocks."""
    ref_logps, psi = by_response(given)
    return replace(given, ref_token_logps=None, ref_logps=ref_logps, values=None, cu_states=None, ended=None, psi=psi)


def _of_block(given: Preference, responses: list[int]) -> Preference:
    assert given.ref_logps is not None
    lengths = given.cu_seqlens.diff()[responses]
    return replace(
        given,
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        ref_logps=given.ref_logps[responses],
        psi=None if given.psi is None else given.psi[responses],
    )
