"""A block of rows on its way through the vocabulary: running sums, and the entries that a sparse gradient keeps.

An entry is selected where e^z exceeds ε times its row's sum so far, its own tile included. The sum only grows, so
nothing that belongs is missed, and the finished sum prunes the rest: about one selected entry in five, on real states.

Letters: R rows and C vocabulary columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.hash_uniform import HashUniform
from tvkd_fast.kernels.records import SelectionRule
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.exact import Tiles, locate
from tvkd_fast.ops.tiles.native import Passes

FAN = 8
"""Columns whose largest entry is looked at before they are: an eighth of a tile is searched, not all of it."""


def block_of(tiles: Tiles, rule: SelectionRule, h: Tensor, rows: slice) -> Block | CompiledBlock:
    """Return a block in compiled passes where available; they have no softcap and no unbiased tail."""
    passes = native.passes(tiles.buffers)
    if passes is None or rule.unbiased or tiles.head.softcap is not None:
        return Block(tiles, rule, h, rows)
    return CompiledBlock(passes, tiles, rule, h, rows)


@dataclass(frozen=True)
class Entries:
    """Selected entries of one tile, by row; of `rows`, which tile's row each is in."""

    rows: Tensor
    columns: Tensor
    p: Tensor
    chain: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        found = (self.rows, self.columns, self.p)
        return found if self.chain is None else (*found, self.chain)

    def where(self, keep: Tensor) -> Entries:
        # Counted once, and not by each of four masks.
        chosen = keep.nonzero()[:, 0]
        rows, columns, p = (x.index_select(0, chosen) for x in (self.rows, self.columns, self.p))
        return Entries(rows, columns, p, None if self.chain is None else self.chain.index_select(0, chosen))


class Block:
    """A block of rows on its way through the vocabulary: running sums, and the entries that were selected."""

    def __init__(self, tiles: Tiles, rule: SelectionRule, h: Tensor, rows: slice) -> None:
        self.tiles, self.rule = tiles, rule
        place = torch.arange(rows.start, rows.stop, device=h.device) if tiles.kept is None else tiles.kept[rows]
        self.place = place
        self.maximum = h.new_full((h.shape[0],), -torch.inf)
        self.total, self.total_chain = torch.zeros_like(self.maximum), torch.zeros_like(self.maximum)
        self.counts = torch.zeros_like(place)
        self.found: list[tuple[Entries, Tensor]] = []
        self.candidates = 0
        self.uniforms = HashUniform(rule.seed, place, tiles.head.vocab_size) if rule.unbiased else None

    def add(self, z: Tensor, labels: Tensor, columns: slice) -> None:
        """Take in a tile of logits, which is overwritten."""
        r, c = z.shape
        fan = FAN if c % FAN == 0 else 1
        peaks = z.view(r, fan, -1).amax(1)
        new_max = torch.maximum(self.maximum, peaks.amax(1))
        shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
        decay = self.maximum.sub_(shift).exp_()
        chain = self.tiles.chain(z)
        e = z.sub_(shift[:, None]).exp_()
        self.total.mul_(decay).add_(e.sum(1))
        if chain is not None:
            self.total_chain.mul_(decay).add_(torch.linalg.vecdot(e, chain))
        self.maximum = new_max
        # The label is kept whatever its probability, and apart.
        here, local = locate(labels, columns)
        e.scatter_(1, local, e.gather(1, local).masked_fill_(here, 0.0))
        limit = (self.total * self.rule.eps).masked_fill_(self.counts > self.rule.row_cap, torch.inf)
        if self.uniforms is not None:
            # What exceeds the limit is then e/u: an entry below ε is kept with probability p/ε.
            peaks = e.div_(self.uniforms.of(slice(None), columns)).view(r, fan, -1).amax(1)
        else:
            peaks = peaks.sub_(shift[:, None]).exp_()
        lanes = peaks.shape[1]
        seen = (peaks > limit[:, None]).flatten().nonzero()[:, 0]
        row, lane = seen // lanes, seen % lanes
        group = e.view(r, fan, lanes)[row, :, lane]
        which, k = (group > limit[row, None]).nonzero().unbind(1)
        row, column = row[which], k * lanes + lane[which]
        there = None if chain is None else chain[row, column]
        entries = Entries(row.int(), (column + columns.start).int(), group[which, k], there)
        self.counts += torch.bincount(row, minlength=r)
        self.candidates += row.shape[0]
        self.found.append((entries, shift))

    def finish(self, target: Tensor) -> tuple[list[Entries], Tensor, Tensor, Tensor]:
        """Return the entries with hidden's rows and final p, the tails less sampled ones, the tails, and dense rows."""
        softcap, dense = self.tiles.head.softcap, self.counts > self.rule.row_cap
        top = self.maximum.masked_fill(self.maximum == -torch.inf, 0.0)
        logp = target - top - self.total.log()
        tail = torch.expm1(logp).neg_()
        if softcap is not None:
            tail = self.total_chain / self.total - logp.exp() * (1.0 - (target / softcap) ** 2)
        kept, below = [], tail.clone()
        # Popped, so that what is pruned frees memory for what is kept.
        while self.found:
            entries, shift = self.found.pop(0)
            scale = (shift - top).exp_().div_(self.total)
            final = self._final(entries, scale, dense)
            weighted = final.p if final.chain is None else final.p * final.chain
            lengths = torch.bincount(final.rows, minlength=tail.shape[0])
            tail -= torch.segment_reduce(weighted, "sum", lengths=lengths, unsafe=True)
            if self.uniforms is not None:
                weighted = weighted.masked_fill(final.p <= self.rule.eps, 0.0)
                below -= torch.segment_reduce(weighted, "sum", lengths=lengths, unsafe=True)
            rows = self.place[final.rows].int()
            kept.append(Entries(rows, final.columns, final.p, final.chain))
        return kept, tail, tail if self.uniforms is None else below, dense

    def _final(self, entries: Entries, scale: Tensor, dense: Tensor) -> Entries:
        p = entries.p * scale.index_select(0, entries.rows)
        found = Entries(entries.rows, entries.columns, p, entries.chain)
        final = found.where((p >= self.rule.eps) & ~dense.index_select(0, entries.rows))
        if self.uniforms is None:
            return final
        chances = self.uniforms.at(final.rows, final.columns)
        return Entries(final.rows, final.columns, (final.p * chances).clamp_min_(self.rule.eps), final.chain)


class CompiledBlock:
    """`Block` in compiled passes."""

    def __init__(self, passes: Passes, tiles: Tiles, rule: SelectionRule, h: Tensor, rows: slice) -> None:
        self.passes, self.tiles, self.rule = passes, tiles, rule
        self.place = torch.arange(rows.start, rows.stop) if tiles.kept is None else tiles.kept[rows]
        self.maximum = h.new_full((h.shape[0],), -torch.inf)
        self.total = torch.zeros_like(self.maximum)
        self.counts = torch.zeros_like(self.place)
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
        self.candidates = 0

    def add(self, z: Tensor, labels: Tensor, columns: slice) -> None:
        """Take in a tile of logits, which is overwritten."""
        rule = self.rule
        found, column, e = self.passes.select(
            z,
            labels - columns.start,
            self.maximum,
            self.total,
            self.counts,
            rule.eps,
            rule.row_cap,
            self.tiles.spare(z),
        )
        self.candidates += e.shape[0]
        self.found.append((found, column, e, self.maximum.clone(), columns.start))

    def finish(self, target: Tensor) -> tuple[list[Entries], Tensor, Tensor, Tensor]:
        """Return the same as `Block.finish`."""
        dense = self.counts > self.rule.row_cap
        top = self.maximum.masked_fill(self.maximum == -torch.inf, 0.0)
        tail = torch.expm1(target - top - self.total.log()).neg_()
        kept = []
        # Popped, as there.
        while self.found:
            found, column, e, maximum, start = self.found.pop(0)
            # A row without a finite maximum yet has no selected entries.
            scale = (maximum - top).exp_().div_(self.total)
            kept.append(
                Entries(
                    *self.passes.rescale(found, column, e, scale, dense, self.rule.eps, self.place, start, tail), None
                )
            )
        return kept, tail, tail, dense


class Collected:
    """The entries of all tiles, one after the other.

    A tile's own tensors are small, and what is freed of such the C library keeps: held to the end, all would be held
    twice. So they go into long ones as soon as their rows are through, and their memory serves the next rows. The long
    ones are made for as many entries as the rows so far foretell; what stays empty of them is never touched, and takes
    no memory on a CPU.
    """

    def __init__(self, like: Tensor, dtypes: Sequence[torch.dtype], *, row_blocks: int) -> None:
        """`like` is on the entries' device; of what an entry has these are the dtypes."""
        self._parts = [like.new_empty(0, dtype=dtype) for dtype in dtypes]
        self._row_blocks, self._done = row_blocks, 0
        self._bounds = [0]

    @property
    def count(self) -> int:
        return self._bounds[-1]

    @property
    def bounds(self) -> Tensor:
        """(tiles + 1,) int64, on the host: where each tile's entries begin and end."""
        return torch.tensor(self._bounds)

    @property
    def parts(self) -> list[Tensor]:
        """What the entries have, (E,) each."""
        return [x[: self.count] for x in self._parts]

    def add(self, tiles: Sequence[Sequence[Tensor]]) -> None:
        """Add the entries of a block of rows, tile of columns by tile of columns."""
        start, self._done = self.count, self._done + 1
        for first, *_ in tiles:
            self._bounds.append(self.count + first.shape[0])
        self._reserve(start)
        for part, theirs in zip(self._parts, zip(*tiles, strict=True), strict=True):
            torch.cat(theirs, out=part[start : self.count])

    def forget(self) -> None:
        """Empty all tiles, and keep their number."""
        self._parts = [x[:0].clone() for x in self._parts]
        self._bounds = [0] * len(self._bounds)

    def _reserve(self, filled: int) -> None:
        if self.count <= self._parts[0].shape[0]:
            return
        capacity = self.count
        if self._done < self._row_blocks:
            capacity = int(1.1 * capacity * self._row_blocks / self._done)
        for i, part in enumerate(self._parts):
            self._parts[i] = part.new_empty(capacity)
            self._parts[i][:filled] = part[:filled]
