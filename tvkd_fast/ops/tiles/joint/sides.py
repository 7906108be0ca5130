"""A model as the joint walk takes it: states, head, temperature, and which of the head's rows the entries are.

Letters: N tokens, R rows and C vocabulary entries of a tile, D hidden of this model, V vocabulary of the pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.tiles.exact import accumulation_dtype


@dataclass(frozen=True)
class Side:
    """Logits z/τ of entry j: those of the head's row `index[j]`, of row j where there is no index."""

    hidden: Tensor
    """[N, D]"""
    head: Head
    temperature: float = 1.0
    index: Tensor | None = None
    """(V,) int64"""

    @property
    def entries(self) -> int:
        return self.head.vocab_size if self.index is None else self.index.shape[0]

    @property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.hidden.dtype)

    @property
    def factor(self) -> float:
        """d(z/τ)/d(h·w) where there is no softcap."""
        return self.head.logit_scale / self.temperature

    def rows(self, entries: slice) -> Tensor:
        """The head's rows [C, D] of these entries, in the accumulator's dtype."""
        weight = self.head.weight
        return (weight[entries] if self.index is None else weight[self.index[entries]]).to(self.acc)

    def scaled(self, h: Tensor) -> Tensor:
        """States [R, D] such that their products are logits, where no softcap comes between."""
        return h if self.head.softcap is not None or self.factor == 1.0 else h * self.factor

    def logits(self, w: Tensor, scaled: Tensor, entries: slice, out: Tensor) -> Tensor:
        """z/τ [C, R] in `out`, of rows w [C, D] and of `scaled` states [R, D]."""
        head = self.head
        torch.mm(w, scaled.T, out=out)
        bias = None
        if head.bias is not None:
            bias = head.bias[entries] if self.index is None else head.bias[self.index[entries]]
            bias = bias.to(self.acc)[:, None]
        if head.softcap is None:
            return out if bias is None else out.add_(bias if self.factor == 1.0 else bias * self.factor)
        if bias is not None:
            out.add_(bias)
        return out.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / self.temperature)

    def chain(self, z: Tensor) -> Tensor | None:
        """J = 1 − (z/softcap)² of a tile of z/τ; None where it is 1."""
        if self.head.softcap is None:
            return None
        return (z * (self.temperature / self.head.softcap)).square_().neg_().add_(1.0).clamp_min_(0.0)
