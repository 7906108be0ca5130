"""The products that a gradient by logits goes into, a tile of a block of rows at a time.

Letters: R rows of a block, C entries of a tile, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients
from tvkd_fast.ops.tiles.block_walk import is_intel
from tvkd_fast.ops.tiles.huge_pages import large_empty
from tvkd_fast.ops.tiles.joint.sides import Side


class Gradients:
    """A side's gradients so far, in the accumulator's dtype, as `wants` says of hidden, weight and bias.

    Σ over all rows of dz [C, R] by h·w; a row of the head that no entry names has none.
    """

    def __init__(self, side: Side, wants: Sequence[bool], *, unrounded: bool = False) -> None:
        want_hidden, want_weight, want_bias = wants
        self.side, head, acc = side, side.head, side.acc
        self.hidden = torch.zeros_like(side.hidden, dtype=acc if unrounded else None) if want_hidden else None
        self.bias = head.bias.new_zeros(head.bias.shape, dtype=acc) if want_bias and head.bias is not None else None
        self.weight = None
        if want_weight:
            self.weight = large_empty(head.weight, head.weight.shape, acc)
            if side.index is not None:
                self.weight.zero_()
        self._unwritten = True

    def written(self) -> None:
        """Weight's gradient has been filled with what others than the blocks that follow make of it."""
        self._unwritten = False

    def begin(self, rows: Tensor, states: Tensor) -> None:
        """A block of rows, whose states [R', D] are filled up beyond them."""
        self._rows, self._states = rows, states
        size = states.shape[1], states.shape[0]
        self._by_states = None
        if self.hidden is not None:
            self._by_states = states.new_zeros(size[::-1] if is_intel() else size)

    def add(self, entries: slice, dz: Tensor) -> None:
        """dz [C, R'], 0 where rows are filled up."""
        side = self.side
        if self._by_states is not None:
            w = side.rows(entries)
            if is_intel():
                self._by_states.addmm_(dz.T, w)
            else:
                self._by_states.addmm_(w.T, dz)
        if self.weight is not None:
            if side.index is not None:
                self.weight.index_add_(0, side.index[entries], dz @ self._states)
            else:
                self.weight[entries].addmm_(dz, self._states, beta=0 if self._unwritten else 1)
        if self.bias is not None:
            total = dz.sum(1)
            if side.index is not None:
                self.bias.index_add_(0, side.index[entries], total)
            else:
                self.bias[entries] += total

    def end(self) -> None:
        """The block has been walked through."""
        self._unwritten = False
        if self.hidden is not None and self._by_states is not None:
            found = self._by_states if is_intel() else self._by_states.T
            self.hidden[self._rows] = found[: len(self._rows)].to(self.hidden.dtype)
            self._by_states = None

    def rounded(self) -> HeadGradients:
        """The gradients in their inputs' dtypes, but for hidden's where it is `unrounded`."""
        dtype = self.side.head.weight.dtype
        if self.weight is not None and self._unwritten and self.side.index is None:
            self.weight.zero_()
        weight, bias = (None if x is None else x.to(dtype) for x in (self.weight, self.bias))
        return HeadGradients(self.hidden, weight, bias)
