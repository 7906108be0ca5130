"""A vocabulary head and what passes over it leave: plain records, shared by every implementation.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """z = softcap·tanh(a/softcap), a = logit_scale·(h·w + bias): a vocabulary projection [V, D] and its transforms."""

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
    """What one pass over the vocabulary leaves of N rows, each (N,) float32 (float64 from float64 states).

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
        """Every number that is there, changed."""
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
class HeadGradients:
    """Gradients in their inputs' dtypes; None where none was asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
