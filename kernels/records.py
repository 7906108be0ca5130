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

    def at_temperature(self, temperature: float) -> Head:
        """The head of z/temperature: a scale and a softcap hold it, so that kernels need no temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, logit_scale=self.logit_scale / temperature, softcap=softcap)


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
class JointSums:
    """Statistics of two softmaxes p and q over one vocabulary, from one walk over both; (N,) float32 each, nats."""

    own: HeadSums
    """Of p, the student's."""
    other: HeadSums
    """Of q, the teacher's: maximum and log_total."""
    forward_kl: Tensor
    """KL(q‖p)"""
    reverse_kl: Tensor
    """KL(p‖q)"""
    log_squares: Tensor | None = None
    """log Σ p²"""

    def swapped(self) -> JointSums:
        """The same with p and q in each other's place, without what is known of p alone."""
        own = HeadSums(self.own.maximum, self.own.log_total)
        return JointSums(self.other, own, forward_kl=self.reverse_kl, reverse_kl=self.forward_kl)


@dataclass(frozen=True)
class JointValues:
    """What a second walk over p and q sums once both are normalized; (N,) float32 each, None where not asked for.

    m = (1 − β')p + β'q.
    """

    beta: float | None = None
    """β' in (0, 1)."""
    alpha: float | None = None
    """In (0, 1)."""
    other_to_mixture: Tensor | None = None
    """KL(q‖m), never negative."""
    own_to_mixture: Tensor | None = None
    """KL(p‖m), never negative."""
    overlap: Tensor | None = None
    """Σ pq/m"""
    total_variation: Tensor | None = None
    """½ Σ |p − q|"""
    excess: Tensor | None = None
    """Σ p·sign(p − q)"""
    power: Tensor | None = None
    """Σ p^α·q^{1−α}"""

    @property
    def jsd(self) -> Tensor:
        """β'·KL(q‖m) + (1 − β')·KL(p‖m)."""
        assert self.beta is not None
        assert self.other_to_mixture is not None
        assert self.own_to_mixture is not None
        return self.beta * self.other_to_mixture + (1.0 - self.beta) * self.own_to_mixture

    def swapped(self) -> JointValues:
        """The same with p and q in each other's place."""
        excess = None
        if self.total_variation is not None and self.excess is not None:
            excess = 2.0 * self.total_variation - self.excess
        return JointValues(
            None if self.beta is None else 1.0 - self.beta,
            None if self.alpha is None else 1.0 - self.alpha,
            other_to_mixture=self.own_to_mixture,
            own_to_mixture=self.other_to_mixture,
            overlap=self.overlap,
            total_variation=self.total_variation,
            excess=excess,
            power=self.power,
        )


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
