"""The one-GEMM head in torch: the forward marks what a softmax is made of, the backward gathers it. On any device.

Letters: N tokens, K of them kept, D hidden, V vocabulary, R rows and C vocabulary columns of a tile, E marked entries.

An entry is marked where e^z exceeds ε times its row's sum so far, its own tile included. The sum only grows, so nothing
that belongs is missed, and the finished sum prunes the rest: about one marked entry in eight, on real states.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tvkd_fast.kernels.dice import Dice
from tvkd_fast.kernels.head import Head, HeadGradients, HeadSums, MarkRule, Marks
from tvkd_fast.ops import compiled
from tvkd_fast.ops import tiles as exact
from tvkd_fast.ops.tiles import Tiles, blocks, locate, pick_targets

FAN = 8
"""Columns whose largest entry is looked at before they are: an eighth of a tile is searched, not all of it."""


def mark(
    hidden: Tensor, head: Head, labels: Tensor, rule: MarkRule, *, kept: Tensor | None = None
) -> tuple[HeadSums, Marks]:
    """`head_sums` with labels (K,), each (K,), and what a sparse gradient needs, in one product.

    The marks' rows, tails and dense rows are hidden's; rows that are not kept have none.
    """
    tiles = Tiles(hidden, head, kept)
    maximum = hidden.new_empty(tiles.count, dtype=tiles.acc)
    log_total, target = torch.empty_like(maximum), torch.full_like(maximum, torch.nan)
    tail, below = torch.zeros_like(maximum), torch.zeros_like(maximum)
    dense = torch.zeros_like(maximum, dtype=torch.bool)
    found: list[_Entries] = []
    marked = 0
    for rows in tiles.row_blocks():
        h = tiles.states(rows)
        block = _Block(tiles, rule, h, rows)
        for columns in tiles.column_blocks():
            z = tiles.logits(h, tiles.upcast(head.weight[columns]), columns)
            pick_targets(z, labels[rows], columns, out=target[rows])
            block.add(z, labels[rows], columns)
        if head.softcap is not None:
            # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
            block.total.add_(h.sum(1).mul_(0.0))
        maximum[rows], log_total[rows] = block.maximum, block.total.log()
        marked += sum(entries.rows.shape[0] for entries, _ in block.found)
        entries, tail[rows], below[rows], dense[rows] = block.finish(target[rows])
        found += entries
    if _too_flat(found, below.masked_fill(dense, 0.0), dense, rule):
        dense, found = torch.ones_like(dense), [x.none() for x in found]
    bounds = torch.tensor([0, *(x.rows.shape[0] for x in found)]).cumsum(0)
    flat = _joined(found, hidden, tiles.acc, chained=head.softcap is not None)
    everywhere = hidden.new_zeros(hidden.shape[0], dtype=tiles.acc)
    marks = Marks(
        rows=flat.rows,
        columns=flat.columns,
        p=flat.p,
        chain=flat.chain,
        bounds=bounds,
        tail=_placed(tail, kept, everywhere),
        dense=_placed(dense, kept, everywhere.bool()),
        below=_placed(below, kept, everywhere),
        marked=marked,
    )
    return HeadSums(maximum, log_total, target=target), marks


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    marks: Marks,
    grad_logps: Tensor,
    *,
    kept: Tensor | None = None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Gradients of Σ_t c_t·logp_t from the marks, with c = `grad_logps`; labels, sums (with `target`) and c are (K,).

    With M the marks and the label, T the tail and u = c·s·T/(V − |M|), the gradient by h·w_j is c·s·J_j·(δ_jy − p_j) on
    M and −u elsewhere. What is gathered is the difference from −u, which is added to all columns at once; columns that
    a bias of −inf takes out are in neither. Rows marked dense get the exact gradient, recomputed.
    """
    parts = Parts(hidden, head, labels, sums, marks, grad_logps, kept)
    dense = parts.dense.nonzero()[:, 0]
    by_column = ByColumn(parts) if want_weight or want_bias else None
    grads = exact.head_gradients(
        hidden,
        head,
        labels[dense],
        HeadSums(sums.maximum[dense], sums.log_total[dense]),
        grad_logps[dense],
        kept=parts.place[dense],
        want_hidden=want_hidden and dense.numel() > 0,
        want_weight=want_weight,
        want_bias=want_bias,
        weight_start=None if by_column is None else by_column.weight,
        bias_start=by_column.bias() if by_column is not None and want_bias else None,
    )
    return HeadGradients(parts.by_hidden(grads.hidden) if want_hidden else None, grads.weight, grads.bias)


@dataclass(frozen=True)
class _Entries:
    """Marked entries of one tile, by row; of `rows`, which tile's row each is in."""

    rows: Tensor
    columns: Tensor
    p: Tensor
    chain: Tensor | None

    def where(self, keep: Tensor) -> _Entries:
        # Counted once, and not by each of four masks.
        chosen = keep.nonzero()[:, 0]
        rows, columns, p = (x.index_select(0, chosen) for x in (self.rows, self.columns, self.p))
        return _Entries(rows, columns, p, None if self.chain is None else self.chain.index_select(0, chosen))

    def none(self) -> _Entries:
        return self.where(torch.zeros_like(self.rows, dtype=torch.bool))


class _Block:
    """A block of rows on its way through the vocabulary: running sums, and what was marked."""

    def __init__(self, tiles: Tiles, rule: MarkRule, h: Tensor, rows: slice) -> None:
        self.tiles, self.rule = tiles, rule
        place = torch.arange(rows.start, rows.stop, device=h.device) if tiles.kept is None else tiles.kept[rows]
        self.place = place
        self.maximum = h.new_full((h.shape[0],), -torch.inf)
        self.total, self.total_chain = torch.zeros_like(self.maximum), torch.zeros_like(self.maximum)
        self.counts = torch.zeros_like(place)
        self.found: list[tuple[_Entries, Tensor]] = []
        self.dice = Dice(rule.seed, place, tiles.head.vocab_size) if rule.unbiased else None

    def add(self, z: Tensor, labels: Tensor, columns: slice) -> None:
        """Take in a tile of logits, which is overwritten."""
        native = compiled.passes(z)
        if native is not None and self.dice is None and self.tiles.head.softcap is None:
            here, local = locate(labels, columns)
            own = torch.where(here, local, -1)[:, 0]
            spare = self.tiles.buffers[1]
            rule = self.rule
            row, column, e = native.mark(z, own, self.maximum, self.total, self.counts, rule.eps, rule.row_cap, spare)
            shift = self.maximum.masked_fill(self.maximum == -torch.inf, 0.0)
            self.found.append((_Entries(row, column + columns.start, e, None), shift))
            return
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
        if self.dice is not None:
            # What exceeds the limit is then e/u: an entry below ε is kept with probability p/ε.
            peaks = e.div_(self.dice.of(slice(None), columns)).view(r, fan, -1).amax(1)
        else:
            peaks = peaks.sub_(shift[:, None]).exp_()
        lanes = peaks.shape[1]
        seen = (peaks > limit[:, None]).flatten().nonzero()[:, 0]
        row, lane = seen // lanes, seen % lanes
        group = e.view(r, fan, lanes)[row, :, lane]
        which, k = (group > limit[row, None]).nonzero().unbind(1)
        row, column = row[which], k * lanes + lane[which]
        entries = _Entries(row, column + columns.start, group[which, k], None if chain is None else chain[row, column])
        self.counts += torch.bincount(row, minlength=r)
        self.found.append((entries, shift))

    def finish(self, target: Tensor) -> tuple[list[_Entries], Tensor, Tensor, Tensor]:
        """What is kept, its rows hidden's and p final; the tails less what was sampled; the tails; dense rows."""
        softcap, dense = self.tiles.head.softcap, self.counts > self.rule.row_cap
        top = self.maximum.masked_fill(self.maximum == -torch.inf, 0.0)
        logp = target - top - self.total.log()
        tail = torch.expm1(logp).neg_()
        if softcap is not None:
            tail = self.total_chain / self.total - logp.exp() * (1.0 - (target / softcap) ** 2)
        kept, below = [], tail.clone()
        for entries, shift in self.found:
            scale = (shift - top).exp_().div_(self.total)
            final = self._final(entries, scale, dense)
            weighted = final.p if final.chain is None else final.p * final.chain
            lengths = torch.bincount(final.rows, minlength=tail.shape[0])
            tail -= torch.segment_reduce(weighted, "sum", lengths=lengths, unsafe=True)
            if self.dice is not None:
                weighted = weighted.masked_fill(final.p <= self.rule.eps, 0.0)
                below -= torch.segment_reduce(weighted, "sum", lengths=lengths, unsafe=True)
            rows = self.place[final.rows]
            kept.append(_Entries(rows.int(), final.columns.int(), final.p, final.chain))
        return kept, tail, tail if self.dice is None else below, dense

    def _final(self, entries: _Entries, scale: Tensor, dense: Tensor) -> _Entries:
        p = entries.p * scale.index_select(0, entries.rows)
        found = _Entries(entries.rows, entries.columns, p, entries.chain)
        final = found.where((p >= self.rule.eps) & ~dense.index_select(0, entries.rows))
        if self.dice is None:
            return final
        chances = self.dice.at(final.rows, final.columns)
        return _Entries(final.rows, final.columns, (final.p * chances).clamp_min_(self.rule.eps), final.chain)


class Parts:
    """A sparse gradient taken apart, row by row: entries less −u, the label less −u, and −u."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        sums: HeadSums,
        marks: Marks,
        grad_logps: Tensor,
        kept: Tensor | None,
    ) -> None:
        self.tiles, self.marks = Tiles(hidden, head, kept), marks
        self.hidden, self.head, n = hidden, head, hidden.shape[0]
        self.place = torch.arange(n, device=hidden.device) if kept is None else kept
        self.dense = marks.dense[self.place]
        # A label that is nobody's (an ignored row's, on a GPU) has no weight row; its coefficient is 0.
        self.labels = labels.clamp(0, head.vocab_size - 1)
        c = (grad_logps * head.logit_scale).masked_fill(self.dense, 0.0)
        self.live = None if head.bias is None else head.bias.isneginf().logical_not_().to(c.dtype)
        live = head.vocab_size if self.live is None else self.live.sum()
        free = live - 1 - self._counts(n)[self.place]
        self.even = torch.where(free > 0, c * marks.tail[self.place] / free.clamp(min=1), 0.0)
        assert sums.target is not None
        own = c * torch.expm1(sums.logps).neg_()
        if head.softcap is not None:
            own *= 1.0 - (sums.target / head.softcap) ** 2
        self.own = own + self.even
        self.even_everywhere, self.c_everywhere = (_placed(x, kept, c.new_zeros(n)) for x in (self.even, c))

    def _counts(self, n: int) -> Tensor:
        """(n,) entries a row, tile by tile: bincount takes eight bytes more an entry."""
        counts = torch.zeros(n, dtype=torch.int64, device=self.place.device)
        for start, stop in pairwise(self.marks.bounds.tolist()):
            counts += torch.bincount(self.marks.rows[start:stop], minlength=n)
        return counts

    def entries(self, segment: slice) -> Tensor:
        """The gradient by h·w less −u of a run of marks."""
        marks, rows = self.marks, self.marks.rows[segment]
        p = marks.p[segment] if marks.chain is None else marks.p[segment] * marks.chain[segment]
        return self.even_everywhere.index_select(0, rows) - self.c_everywhere.index_select(0, rows) * p

    def by_hidden(self, grad: Tensor | None = None) -> Tensor:
        """Σ_j g_tj w_j [N, D], tile by tile in the forward's order: weight's rows are read while they are near.

        `grad` holds the dense rows' gradients already; their sums here are 0.
        """
        tiles, marks, weight = self.tiles, self.marks, self.head.weight
        grad = self.hidden.new_zeros(self.hidden.shape) if grad is None else grad
        everyone = self._sum_of_weight()
        bounds = iter(marks.bounds.tolist())
        start = next(bounds)
        for rows in tiles.row_blocks():
            place = self.place[rows]
            total = weight.new_zeros((place.shape[0], weight.shape[1]), dtype=tiles.acc)
            edges = torch.cat([place, place[-1:] + 1]).int()
            for columns in tiles.column_blocks():
                segment = slice(start, start := next(bounds))
                total += bag(
                    marks.columns[segment] - columns.start,
                    tiles.upcast(weight[columns]),
                    torch.searchsorted(marks.rows[segment], edges, out_int32=True),
                    self.entries(segment),
                )
            total.addcmul_(self.own[rows, None], tiles.upcast(weight[self.labels[rows]]))
            grad[place] += total.addr_(self.even[rows], everyone, alpha=-1.0).to(grad.dtype)
        return grad

    def sum_of_states(self) -> Tensor:
        """Σ_t −u_t h_t (D,)."""
        total = self.hidden.new_zeros(self.hidden.shape[1], dtype=self.tiles.acc)
        for rows in self.tiles.row_blocks():
            total -= self.tiles.states(rows).T.mv(self.even[rows])
        return total

    def _sum_of_weight(self) -> Tensor:
        """Σ_j w_j (D,) over the columns that are there."""
        total = self.hidden.new_zeros(self.hidden.shape[1], dtype=self.tiles.acc)
        ones = total.new_ones(self.tiles.columns)
        for columns in self.tiles.column_blocks():
            w = self.tiles.upcast(self.head.weight[columns])
            total += w.T.mv(ones[: w.shape[0]] if self.live is None else self.live[columns])
        return total


class ByColumn:
    """The same entries by column, a tile of columns at a time, for what is summed over rows."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.tiles = parts, parts.tiles
        self.everyone = parts.sum_of_states()
        self.columns = list(parts.tiles.column_blocks())
        self.bounds = parts.marks.bounds.tolist()
        self.labels, self.order = parts.labels.int().sort(stable=True)
        n, d = parts.hidden.shape
        as_it_is = parts.hidden.dtype == self.tiles.acc and parts.hidden.is_contiguous()
        self.width = d if as_it_is else max(1, min(d, exact.WORKSPACE_FLOATS // max(n, 1)))

    def weight(self, columns: slice, total: Tensor) -> None:
        """Σ_t g_tj h_t of a slice of columns into `total` [C, D]."""
        parts, acc = self.parts, self.tiles.acc
        for which, tile in enumerate(self.columns):
            there = slice(max(tile.start, columns.start), min(tile.stop, columns.stop))
            if there.start >= there.stop:
                continue
            rows, entries, edges = self._found(which, there)
            out = total[there.start - columns.start : there.stop - columns.start]
            for features in blocks(total.shape[1], self.width):
                h = parts.hidden[:, features].to(acc).contiguous()
                gathered = bag(rows, h, edges, entries)
                everyone = self.everyone[features]
                if parts.live is None:
                    torch.add(gathered, everyone, out=out[:, features])
                else:
                    torch.addcmul(gathered, parts.live[there, None], everyone, out=out[:, features])

    def bias(self) -> Tensor:
        """Σ_t g_tj (V,)."""
        sums = []
        for which, tile in enumerate(self.columns):
            _, entries, edges = self._found(which, tile)
            sums.append(torch.segment_reduce(entries, "sum", lengths=edges.diff().long(), unsafe=True))
        everyone = self.parts.even.sum()
        return torch.cat(sums) - (everyone if self.parts.live is None else everyone * self.parts.live)

    def _found(self, which: int, there: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and gradients of the columns `there`, inside tile `which`, by column; where each column begins."""
        parts, marks = self.parts, self.parts.marks
        runs = range(which, len(self.bounds) - 1, len(self.columns))
        segments = [slice(self.bounds[i], self.bounds[i + 1]) for i in runs]
        ends = torch.tensor([there.start, there.stop], dtype=torch.int32, device=self.labels.device)
        own = self.order[slice(*torch.searchsorted(self.labels, ends).tolist())]
        columns = torch.cat([*(marks.columns[x] for x in segments), parts.labels[own].int()])
        rows = torch.cat([*(marks.rows[x] for x in segments), parts.place[own].int()])
        entries = torch.cat([*(parts.entries(x) for x in segments), parts.own[own]])
        columns, order = columns.sort(stable=True)
        edges = torch.arange(there.start, there.stop + 1, dtype=torch.int32, device=columns.device)
        edges = torch.searchsorted(columns, edges, out_int32=True)
        inside = order[int(edges[0]) : int(edges[-1])]
        return rows[inside], entries[inside], edges - edges[:1]


def bag(index: Tensor, rows: Tensor, edges: Tensor, factors: Tensor) -> Tensor:
    """Σ_k factors_k·rows[index_k] over k of edges[i]..edges[i+1], each sum in the order of k: [len(edges) − 1, D]."""
    return embedding_bag(index, rows, edges, per_sample_weights=factors, mode="sum", include_last_offset=True)


def _too_flat(found: list[_Entries], below: Tensor, dense: Tensor, rule: MarkRule) -> bool:
    """Whether the rows that are not dense lose, or hold, more than the rule lets them on average."""
    sparse = int(dense.logical_not().sum())
    entries = sum(x.rows.shape[0] for x in found)
    return sparse > 0 and (float(below.sum()) > rule.max_tail * sparse or entries > rule.max_entries * sparse)


def _joined(found: list[_Entries], hidden: Tensor, acc: torch.dtype, *, chained: bool) -> _Entries:
    """All tiles' entries in one; `found` is emptied, so that no more than one column of them is held twice."""
    integers, floats = (hidden.new_empty(0, dtype=dtype) for dtype in (torch.int32, acc))
    rows, columns, p, chain = ([empty] for empty in (integers, integers, floats, floats))
    while found:
        tile = found.pop(0)
        rows.append(tile.rows)
        columns.append(tile.columns)
        p.append(tile.p)
        chain += [] if tile.chain is None else [tile.chain]
        del tile
    flat = []
    for column in (rows, columns, p, chain):
        flat.append(torch.cat(column))
        column.clear()
    return _Entries(flat[0], flat[1], flat[2], flat[3] if chained else None)


def _placed(x: Tensor, kept: Tensor | None, everywhere: Tensor) -> Tensor:
    """The kept rows' numbers at their places among all of hidden's."""
    return x if kept is None else everywhere.index_copy(0, kept, x)
