"""What a sparse gradient of two softmaxes p and q is made of: plain records.

Letters: N tokens, R rows of a block, E entries, T terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tvkd_fast.ops.joint.row_numbers import RowSums


@dataclass(frozen=True)
class SelectedPairs:
    """The entries of N pairs of softmaxes that a sparse gradient keeps beside the labels': E of them.

    Ordered as `SelectedEntries` are: by block of rows, then by tile of columns, and by row inside a tile.
    """

    rows: Tensor
    """(E,) int32"""
    columns: Tensor
    """(E,) int32"""
    log_p: Tensor
    """(E,)"""
    log_q: Tensor
    """(E,); empty where there is no teacher."""
    bounds: Tensor
    """(tiles + 1,) int64, on the host: where each tile's entries begin and end."""
    label: Tensor
    """[2, N] both models' logits at the labels; NaN where there are none."""
    rest: Tensor
    """[T, N] of the terms of dz, Σ J·term over what is not kept, where there is a softcap; else [0, N]."""
    tail: Tensor
    """(N,) the probability that is not kept: of p's and q's the larger one."""
    dense: Tensor
    """(N,) bool: rows without entries, whose gradient is to be the exact one."""
    candidates: int = 0
    """Entries that were selected before the finished sums pruned them, dense rows' among them."""


@dataclass(frozen=True)
class Visited:
    """The same of a block of rows (R,) of hidden, and their numbers."""

    sums: RowSums
    moments: dict[str, Tensor]
    label: Tensor
    rest: Tensor
    dense: Tensor
    tail: Tensor
    entries: list[tuple[Tensor, ...]]
    """Of each tile of columns rows, columns, log p and log q (where there is a teacher), by row."""
    candidates: int
