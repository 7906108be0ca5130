"""A tile of two models' logits in torch: what its entries add to a row's sums, and their gradient.

Everything is written so that an entry of probability 0 counts as 0, whatever the other model's is, and so that no
divergence comes out negative: KL(q‖p) is summed as q·(w + e^(−w) − 1), w = log q/p, whose terms are not.

Letters: R rows and C vocabulary entries of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums

_TERMS = 14
"""The order of the series of w + e^(−w) − 1, enough for float64 at |w| ≤ 1 to within 1e-12."""


class Entries:
    """p, q and what is made of them, of tiles z and u [C, R]; u is None where there is no teacher."""

    def __init__(
        self,
        z: Tensor,
        u: Tensor | None,
        sums: RowSums,
        beta: float,
        alpha: float,
        clip: tuple[float, float] | None = None,
    ) -> None:
        self.log_p = (z - sums.maximum).sub_(sums.log_total)
        self._u, self._sums = u, sums
        self.beta, self.alpha, self._clip = beta, alpha, clip

    @cached_property
    def log_q(self) -> Tensor:
        assert self._u is not None
        found = (self._u - self._sums.teacher_maximum).sub_(self._sums.teacher_log_total)
        return found if self._clip is None else found.clamp_(*self._clip)

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @cached_property
    def w(self) -> Tensor:
        """log q/p; 0 where both are 0."""
        return torch.where((self.p == 0) & (self.q == 0), 0.0, self.log_q - self.log_p)

    @cached_property
    def _smaller(self) -> Tensor:
        """1 − e^(−|w|), what the smaller of p and q lacks of the larger one, as its share."""
        return -torch.expm1(-self.w.abs())

    @cached_property
    def log_p_over_m(self) -> Tensor:
        return torch.where(self.w > 0, self._over_m(1.0 - self.beta) - self.w, self._over_m(self.beta))

    @cached_property
    def log_q_over_m(self) -> Tensor:
        return torch.where(self.w > 0, self._over_m(1.0 - self.beta), self._over_m(self.beta) + self.w)

    def _over_m(self, share: float) -> Tensor:
        """log of the larger of p and q over m, of which the smaller one has this share."""
        return torch.minimum(-torch.log1p(-share * self._smaller), self.w.abs())

    @cached_property
    def m(self) -> Tensor:
        return (1.0 - self.beta) * self.p + self.beta * self.q

    @cached_property
    def q_over_m(self) -> Tensor:
        return torch.where(self.q > 0, self.q / self.m, 0.0)

    @cached_property
    def power(self) -> Tensor:
        """p^α·q^(1−α)."""
        return torch.where(
            (self.p > 0) & (self.q > 0), torch.exp(self.alpha * self.log_p + (1.0 - self.alpha) * self.log_q), 0.0
        )

    def moment(self, name: str) -> Tensor:
        """A moment's terms [C, R]; `MOMENTS` says what they are."""
        if name == "forward":
            return excess(self.q, self.p, self.w)
        if name == "reverse":
            return excess(self.p, self.q, -self.w)
        if name == "entropy":
            return -_times(self.p, self.log_p)
        if name == "p2":
            return self.p.square()
        if name == "score":
            return _times(self.p, self.log_q)
        if name == "p_over_m":
            return excess(self.p, self.m, self.log_p_over_m)
        if name == "q_over_m":
            return excess(self.q, self.m, self.log_q_over_m)
        if name == "overlap":
            return self.p * self.q_over_m
        if name == "distance":
            return (self.p - self.q).abs_().mul_(0.5)
        if name == "sign":
            return torch.sign(self.p - self.q).mul_(self.p).mul_(0.5)
        assert name == "power"
        return self.power

    def term(self, name: str) -> Tensor:
        """What a factor of dz multiplies, [C, R]; the label's term apart."""
        if name in ("p", "q", "power"):
            found: Tensor = getattr(self, name)
            return found
        if name == "p2":
            return self.p.square()
        if name == "sign":
            return torch.sign(self.p - self.q).mul_(self.p)
        return _times(self.p, getattr(self, name))

    def gradient(self, factors: Numbers, out: Tensor) -> Tensor:
        """dz in `out`, which may be either tile, of factors (R,) by term; the label's term is not in it."""
        total = torch.zeros_like(self.log_p)
        for name, factor in factors.items():
            if name != "label":
                total.addcmul_(self.term(name), factor)
        return out.copy_(total)


def moments_of(entries: Entries, names: Iterable[str]) -> list[Tensor]:
    """The tile's part of each row's moments, (R,) float64."""
    return [entries.moment(name).sum(0, dtype=torch.float64) for name in names]


def excess(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """a·(w + e^(−w) − 1) of w = log a/b: a·log a/b − a + b, which is not negative."""
    small = w.clamp(-1.0, 1.0)
    series = torch.full_like(small, 1.0 / math.factorial(_TERMS))
    for order in range(_TERMS - 1, 1, -1):
        series.mul_(-small).add_(1.0 / math.factorial(order))
    return torch.where(w.abs() <= 1.0, series.mul_(small.square()).mul_(a), _times(a, w) - a + b)


def _times(a: Tensor, x: Tensor) -> Tensor:
    """a·x, 0 where a is 0."""
    return torch.where(a > 0, a * x, 0.0)
