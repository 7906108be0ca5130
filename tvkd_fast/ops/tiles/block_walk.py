"""The gradient made in the forward, in torch tiles on a CPU: the workspace and its three products.

A row's factor multiplies its [D] state, and never its [V] exponentials.

Letters: N tokens, R rows of a block, C columns of a tile, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.tiles import exact
from tvkd_fast.ops.tiles.exponentials import Exponentials
from tvkd_fast.ops.tiles.forward_gradients import STATES, WORKSPACE_MB, Part, rows_of_workspace
from tvkd_fast.ops.tiles.huge_pages import large_empty

TILE_BYTES = 8 * 2**20
PRODUCT_COLUMNS = 2048
"""Columns of a forward product: what it writes stays in the cache. The gradients' products take all at once."""
LINE = 16
"""Rows that a block is filled up to a multiple of: a product whose output rows begin within a cache line takes a third
longer."""


class BlockWalk:
    """Gradients so far, and the workspace [V, R] in which logits become exponentials."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, workspace_mb: int, wants: Sequence[bool]) -> None:
        want_hidden, want_weight, want_bias = wants
        self.hidden, self.head, self.labels = hidden, head, labels
        self.acc = acc = exact.accumulation_dtype(hidden.dtype)
        self.grads = HeadGradients(
            hidden.new_zeros(hidden.shape, dtype=acc) if want_hidden else None,
            large_empty(head.weight, head.weight.shape, acc) if want_weight else None,
            head.bias.new_zeros(head.bias.shape, dtype=acc) if want_bias and head.bias is not None else None,
        )
        self._unwritten = True
        most = rows_of_workspace("torch", workspace_mb or WORKSPACE_MB["torch"], head, acc.itemsize)
        self.most = most if most < LINE else most - most % LINE
        held = min(self.most, self._width(hidden.shape[0]))
        self._logits = large_empty(hidden, (head.vocab_size * held,), acc)
        # Made once: an allocator that is asked block after block keeps holes between what it hands out.
        self._states = hidden.new_empty((STATES, held, hidden.shape[1]), dtype=acc)

    def _width(self, rows: int) -> int:
        """The rows of a block that so many are filled up to, with states of zeros."""
        return rows if self.most < LINE else -(-rows // LINE) * LINE

    def _block(self, rows: int) -> Tensor:
        """The workspace of so many rows, [V, R]."""
        width = self._width(rows)
        return self._logits[: self.head.vocab_size * width].view(self.head.vocab_size, width)

    def _state(self, rows: Tensor) -> Tensor:
        """hidden[rows], (R, D), filled up, until it is asked for others."""
        held = self._states[0, : self._width(len(rows))]
        _rows_of(self.hidden, rows, held)
        held[len(rows) :].zero_()
        return held

    def sums(self, rows: Tensor) -> Part:
        """Logits of these rows become exponentials in the workspace, and their sums the rows' numbers."""
        h, z = self._state(rows), self._block(len(rows))
        size = max(1, min(PRODUCT_COLUMNS, TILE_BYTES // max(1, self.acc.itemsize * len(h))))
        found = Exponentials(z, len(h), self.head.softcap)
        target = z.new_full((len(rows),), torch.nan)
        own = by_tile(self.labels[rows], size, self.head.vocab_size)
        for columns, (row, place) in zip(exact.blocks(self.head.vocab_size, size), own, strict=True):
            tile = torch.mm(self.head.weight[columns].to(self.acc), h.T, out=z[columns])
            exact.transform_(tile.T, self.head, columns)
            if len(row):
                target[row] = tile[place, row]
                tile[place, row] = -torch.inf
            found.take(tile)
        found.finish()
        shift, total = found.shift[: len(rows)], found.total[: len(rows)]
        if self.head.softcap is not None:
            # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
            total.add_(h[: len(rows)].sum(1).mul_(0.0))
        return Part(rows, shift.double(), total, target.double())

    def add_products(self, part: Part, c: Tensor) -> None:
        """The rows' part of the gradients under dL/dlogp = c, (R,)."""
        head, grads, rows = self.head, self.grads, part.rows
        h, e = self._state(rows), self._block(len(rows))
        real, other = h[: len(rows)], self._states[1, : len(h)]
        by_entry = part.factor(c, head.logit_scale)
        by_label = -by_entry * part.total
        if head.softcap is not None:
            by_label = by_label * (1.0 - (part.target / head.softcap).square())
        by_label = by_label.to(self.acc)[:, None]
        filled = by_label.new_zeros(len(h))
        filled[: len(rows)] = by_entry
        # A label out of range has no row; its z is NaN, and so is all that is made of it.
        own = self.labels[rows].clamp(0, head.vocab_size - 1)
        if grads.bias is not None:
            grads.bias.addmv_(e, filled).index_add_(0, own, by_label[:, 0])
        if grads.weight is not None:
            scaled = torch.mul(h, filled[:, None], out=other)
            grads.weight.addmm_(e, scaled, beta=0 if self._unwritten else 1)
            self._unwritten = False
            grads.weight.index_add_(0, own, real.mul_(by_label))
        if grads.hidden is not None:
            by_state = self._by_state(e, other)[: len(rows)]
            by_own = _rows_of(head.weight, own, real).mul_(by_label)
            grads.hidden.index_copy_(0, rows, by_own.addcmul_(filled[: len(rows), None], by_state))

    def mean_rows(self, part: Part) -> Tensor:
        """Σ_j p_j·J_j·w_j, (R, D), of the rows that lie in the workspace and have no labels; theirs until the next."""
        e = self._block(len(part.rows))
        found = self._by_state(e, self._states[1, : e.shape[1]])
        return found[: len(part.rows)].div_(part.total.to(self.acc)[:, None])

    def _by_state(self, e: Tensor, out: Tensor) -> Tensor:
        """Σ_j e_tj·w_j, (R, D) of exponentials [V, R], in `out` as it suits the machine's library."""
        by_rows = is_intel()
        found = out if by_rows else out.view(out.shape[1], out.shape[0])
        for columns in self._columns():
            w, part, beta = self.head.weight[columns].to(self.acc), e[columns], 1 if columns.start else 0
            if by_rows:
                found.addmm_(part.T, w, beta=beta)
            else:
                found.addmm_(w.T, part, beta=beta)
        return found if by_rows else found.T

    def _columns(self) -> Iterator[slice]:
        """All columns at once; fewer where the weight's rows are upcast beside the workspace."""
        whole = self.hidden.dtype == self.acc
        size = self.head.vocab_size if whole else max(1, TILE_BYTES // (self.acc.itemsize * self.hidden.shape[1]))
        return exact.blocks(self.head.vocab_size, size)

    def rounded(self) -> HeadGradients:
        """The gradients in their inputs' dtypes."""
        if self.grads.weight is not None and self._unwritten:
            self.grads.weight.zero_()
        grads = (self.grads.hidden, self.grads.weight, self.grads.bias)
        return HeadGradients(*(None if x is None else x.to(self.hidden.dtype) for x in grads))


@lru_cache
def is_intel() -> bool:
    """Whether MKL takes its AVX-512 kernels, which make [R, D] in 0.8 to 0.9 of the time of [D, R].

    What it takes on AMD makes [D, R] of a narrow block in the lesser time.
    """
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _rows_of(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """x[rows] in out's first rows and dtype."""
    found = out[: len(rows)]
    if x.dtype == out.dtype:
        return torch.index_select(x, 0, rows, out=found)
    return found.copy_(x[rows])


def by_tile(labels: Tensor, size: int, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """For every tile of so many columns, which of the labels (R,) lie in it, and in which of its columns."""
    tiles = -(-vocab_size // size)
    rows = labels.argsort()
    edges = torch.searchsorted(labels[rows], torch.arange(tiles + 1) * size).tolist()
    found = [rows[a:b] for a, b in itertools.pairwise(edges)]
    return [(row, labels[row] - i * size) for i, row in enumerate(found)]
