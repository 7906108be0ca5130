"""A vocabulary head, and what a pass over it leaves: plain records, shared by every implementation.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """z = softcap·tanh(a/softcap), a = logit_scale·(h·w + bias): a vocabulary projection [V, D] and its transforms.

    Every op takes one in place of a weight, and then neither bias, softcap nor logit_scale beside it.

    Examples:
        >>> import torch
        >>> from tvkd_fast import linear_soft_values
        >>> head = Head(torch.zeros(8, 4), softcap=30.0)
        >>> linear_soft_values(torch.zeros(2, 4), head, value_scale=0.1)  # 0.1·log 8
        tensor([0.2079, 0.2079])
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def columns(self, start: int, stop: int) -> Head:
        """The head of a slice of the vocabulary."""
        return replace(self, weight=self.weight[start:stop], bias=None if self.bias is None else self.bias[start:stop])


@dataclass(frozen=True)
class HeadSums:
    """Statistics of N rows from one pass over the vocabulary, each (N,) float32 (float64 from float64 states).

    LSE(z) stays in two parts, max z and log Σ exp(z − max z): rounded to one float it would cost the probabilities of
    large logits their last digits.
    """

    maximum: Tensor
    log_total: Tensor
    lse_kappa: Tensor | None = None
    """LSE(κz)."""
    target: Tensor | None = None
    """z at the label."""
    entropy: Tensor | None = None
    """−Σ p log p, nats."""

    def map(self, change: Callable[[Tensor], Tensor]) -> HeadSums:
        """The same with `change` applied to every number that is not None."""
        numbers = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(self, **{name: change(x) for name, x in numbers.items() if x is not None})

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_total

    @property
    def logps(self) -> Tensor:
        """log softmax(z) at the label."""
        assert self.target is not None
        return (self.target - self.maximum).sub_(self.log_total)


@dataclass(frozen=True)
class SelectionRule:
    """Which entries of a softmax a sparse gradient keeps: the label, and those with p ≥ ε·u.

    u is 1, or where `unbiased` uniform in (0, 1) by a hash of (seed, row, column): an entry below ε is then kept with
    probability p/ε, as ε.
    """

    eps: float
    row_cap: int
    """A row with more entries is dense: its gradient is the exact one."""
    unbiased: bool = False
    seed: int = 0
    max_tail: float = 1.0
    max_entries: float = math.inf
    """A call whose mean tail, or mean entries per row, exceeds its limit has dense rows only."""


@dataclass(frozen=True)
class SelectedEntries:
    """The entries of N softmaxes that a sparse gradient keeps beside the labels': E of them.

    Ordered by block of rows, then by tile of columns, and by row inside a tile.
    """

    rows: Tensor
    """(E,) int32"""
    columns: Tensor
    """(E,) int32"""
    p: Tensor
    """(E,) their probabilities, at least ε."""
    chain: Tensor | None
    """(E,) J = dz/da, where there is a softcap."""
    bounds: Tensor
    """(tiles + 1,) int64, on the host: where each tile's entries begin and end."""
    tail: Tensor
    """(N,) Σ p·J over all entries that are not kept (minus the share that unbiased entries carry)."""
    dense: Tensor
    """(N,) bool: rows without entries, whose gradient is to be the exact one."""
    below: Tensor | None = None
    """(N,) Σ p·J over the entries under ε, kept or not: the tail, where it is even. Not needed by a backward."""
    candidates: int = 0
    """Entries that were selected before the finished softmax pruned them, dense rows' among them."""

    @property
    def count(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class HeadGradients:
    """Gradients in their inputs' dtypes; None where not requested."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
