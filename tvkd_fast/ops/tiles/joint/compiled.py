"""The passes over two models' tiles [C, R] of float32 logits, compiled by numba where it is installed.

What they do not know, TVD's and α's terms, is left to torch's passes.

Letters: R rows and C vocabulary entries of a tile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles import native

_MOMENTS = ("forward", "reverse", "entropy", "p2", "p_over_m", "q_over_m", "overlap", "score")
_TERMS = ("p", "q", "w", "log_p", "p2", "log_p_over_m", "q_over_m", "log_q")
"""The moments and terms in the kernels' order."""


class PairPasses:
    """The compiled passes, on tensors."""

    def __init__(self, passes: native.Passes, kernels: Any) -> None:
        self._call, self._kernels = passes.call, kernels

    def add_exponentials(self, z: Tensor, shift: Tensor, total: Tensor) -> None:
        """`total`, float64, grows by Σ e^(z − shift) of a tile; (R,) both. The shift moves as `Exponentials`' does."""
        self._call(self._kernels.add_exponentials, z, shift, total)

    def knows(self, moments: Collection[str], terms: Collection[str]) -> bool:
        return all(name in _MOMENTS for name in moments) and all(term in (*_TERMS, "label") for term in terms)

    def visit(
        self,
        z: Tensor,
        u: Tensor | None,
        sums: RowSums,
        beta: float,
        moments: Sequence[str],
        factors: Numbers,
        *,
        write: bool,
        late: bool,
    ) -> list[Tensor]:
        """The tile's part of the moments, (R,) float64; where `write`, z becomes the gradient, where `late`, u p.

        Otherwise the tiles stay as they are.
        """
        given = z.new_zeros(len(_TERMS), z.shape[1])
        for i, term in enumerate(_TERMS):
            if term in factors:
                given[i] = factors[term]
        found = given.new_zeros(given.shape, dtype=torch.float64)
        self._call(
            self._kernels.visit,
            z,
            z if u is None else u,
            torch.stack(list(vars(sums).values())),
            given,
            beta,
            torch.tensor([name in moments for name in _MOMENTS]),
            torch.tensor([term in factors for term in _TERMS]),
            torch.tensor([u is not None, write, late]),
            found,
        )
        return [found[_MOMENTS.index(name)] for name in moments]


def passes(z: Tensor) -> PairPasses | None:
    """The compiled passes for tiles like z, or None where only torch's are available."""
    found = native.passes(z)
    kernels = None if found is None else native.compiled_module(_load, "joint walk")
    return None if found is None or kernels is None else PairPasses(found, kernels)


def _load() -> Any:
    # Imported when asked for: it needs numba.
    from tvkd_fast.ops.tiles.joint import numba_pairs

    return numba_pairs
