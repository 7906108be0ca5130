"""The passes over a tile [C, R]: torch's, and in their place the compiled ones where these know all that is asked.

Letters: R rows and C vocabulary entries of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles.joint import compiled
from tvkd_fast.ops.tiles.joint.entries import Entries, moments_of


def add_exponentials(z: Tensor, maximum: Tensor, total: Tensor) -> None:
    """Bring `maximum` (R,) and `total` = Σ e^(z − maximum), (R,) float64, up to a tile, in place.

    The compiled pass lets a logit be a little above what it calls the maximum.
    """
    found = compiled.passes(z)
    if found is not None:
        found.add_exponentials(z, maximum, total)
        return
    new = torch.maximum(maximum, z.amax(0))
    total *= torch.where(maximum == new, 0.0, maximum.double() - new.double()).exp()
    # A row without a finite logit has nothing to subtract.
    total += (z - new.masked_fill(new == -torch.inf, 0.0)).exp_().sum(0, dtype=torch.float64)
    maximum.copy_(new)


class Pair:
    """What the passes over two models' tiles share: the rows' sums, β, α, and the limits of a score's terms."""

    def __init__(self, sums: RowSums, beta: float, alpha: float, clip: tuple[float, float] | None = None) -> None:
        self.sums, self.beta, self.alpha, self.clip = sums, beta, alpha, clip

    def mirrored(self) -> Pair:
        return Pair(self.sums.mirrored(), 1.0 - self.beta, 1.0 - self.alpha)

    def moments(self, z: Tensor, u: Tensor | None, names: Sequence[str]) -> list[Tensor]:
        """The tile's part of each moment, (R,) float64."""
        found = self._compiled(z)
        if found is not None and found.knows(names, ()):
            return found.visit(z, u, self.sums, self.beta, names, {}, write=False, late=False)
        return moments_of(self._entries(z, u), names)

    def gradient(self, z: Tensor, u: Tensor | None, factors: Numbers, out: Tensor) -> None:
        """dz in `out`, either tile or apart from both; the label's term is not in it."""
        found = self._compiled(z)
        if found is not None and out is z and found.knows((), factors):
            found.visit(z, u, self.sums, self.beta, (), factors, write=True, late=False)
        else:
            self._entries(z, u).gradient(factors, out)

    def visit(self, z: Tensor, u: Tensor | None, names: Sequence[str], factors: Numbers, *, late: bool) -> list[Tensor]:
        """`moments`, while z becomes `gradient`; where `late`, u becomes p."""
        found = self._compiled(z)
        if found is not None and found.knows(names, factors):
            return found.visit(z, u, self.sums, self.beta, names, factors, write=True, late=late)
        entries = self._entries(z, u)
        moments = moments_of(entries, names)
        p = entries.p
        entries.gradient(factors, z)
        if late:
            assert u is not None
            u.copy_(p)
        return moments

    def _entries(self, z: Tensor, u: Tensor | None) -> Entries:
        return Entries(z, u, self.sums, self.beta, self.alpha, self.clip)

    def _compiled(self, z: Tensor) -> compiled.PairPasses | None:
        """The compiled passes, which know no limits."""
        return compiled.passes(z) if self.clip is None else None
