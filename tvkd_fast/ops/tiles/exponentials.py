"""A block's logits as exponentials, for all rows at once and tile by tile, while a tile is still in the cache.

The block is [V, R], one column a row of hidden: of a few hundred rows and a large vocabulary the vendor's library makes
each of the head's three products faster so than from [R, V]. What is subtracted from a row's logits is the largest of
its first tile, and stays until a logit is `SLACK` above it: the exponential of so much is far from float32's end, and a
row whose logits rise further, which few do, has its earlier tiles multiplied once the last is there.

Letters: R rows of a block, C columns of a tile, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvkd_fast.ops.tiles import native

SLACK = 40.0
"""Nats by which a logit may lie above what is subtracted from it."""


class Exponentials:
    """Sums of e^(z − shift) over tiles that come in rising order, each of which becomes its exponentials in place.

    With a softcap tiles become J·e^(z − shift), J = dz/da = 1 − (z/softcap)², and the sums are without J.
    """

    def __init__(self, like: Tensor, rows: int, softcap: float | None) -> None:
        self.shift = like.new_full((rows,), -torch.inf)
        """(R,) what is subtracted; −inf of rows that had no finite logit yet."""
        self.total = like.new_zeros(rows, dtype=torch.float64)
        """(R,) Σ e^(z − shift) of the tiles so far."""
        self._softcap = softcap
        self._tiles: list[tuple[Tensor, Tensor]] = []

    def take(self, z: Tensor) -> None:
        """Logits z [C, R] become exponentials, and are held until `finish`."""
        passes = native.passes(z)
        if passes is not None and self._softcap is None:
            self.shift = self.shift.clone()
            passes.exponentiate(z, self.shift, self.total, SLACK)
        else:
            self._take(z)
        self._tiles.append((z, self.shift))

    def _take(self, z: Tensor) -> None:
        top, before = z.amax(0), self.shift
        self.shift = torch.where((top > before + SLACK) | (before == -torch.inf), top, before)
        self.total *= _factor(before, self.shift)
        # −inf is the label's logit too, whose exponential of 0 makes nothing of its factor.
        chain = None
        if self._softcap is not None:
            chain = (z / self._softcap).square_().neg_().add_(1.0).clamp_min_(0.0)
        # A row without a finite logit has nothing to subtract.
        z.sub_(self.shift.masked_fill(self.shift == -torch.inf, 0.0)).exp_()
        self.total += z.sum(0, dtype=torch.float64)
        if chain is not None:
            z.mul_(chain)

    def finish(self) -> None:
        """All tiles are under the last tile's shift."""
        for z, shift in self._tiles:
            if not torch.equal(shift, self.shift):
                z.mul_(_factor(shift, self.shift).to(z.dtype))
        self._tiles.clear()


def _factor(before: Tensor, after: Tensor) -> Tensor:
    """(R,) float64: what takes exponentials under one shift to another; what was under −inf are zeros, and stay."""
    return torch.where(before == after, 0.0, before.double() - after.double()).exp()
