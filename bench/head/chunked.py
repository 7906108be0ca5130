"""What a careful user writes in plain torch: a head a few rows at a time, all products of which are the library's.

Four products, as of any head that recomputes its logits; [rows, V] float32 logits are all that is held.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.products import accumulate

CHUNK = 1024
"""Rows whose logits are held at once."""


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden [N, D], weight [V, D] and labels (N,) to log-probabilities (N,)."""
    return _Chunked.apply(hidden, weight, labels)


def _slices(n: int) -> Iterator[slice]:
    return (slice(first, first + CHUNK) for first in range(0, n, CHUNK))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        lse, own = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        for rows in _slices(len(hidden)):
            z = (hidden[rows] @ weight.T).float()
            lse[rows], own[rows] = z.logsumexp(1), z.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, lse)
        return own - lse

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _slices(len(hidden)):
            g = (hidden[rows] @ weight.T).float().sub_(lse[rows, None]).exp_().neg_()
            g[torch.arange(len(g), device=g.device), labels[rows]] += 1.0
            g = g.mul_(upstream[0][rows, None]).to(hidden.dtype)
            torch.mm(g, weight, out=dhidden[rows])
            if dweight is not None:
                accumulate(dweight, g.T, hidden[rows])
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None
