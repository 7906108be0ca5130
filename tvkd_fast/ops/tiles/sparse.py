"""The one-GEMM head in torch: the forward selects the entries that make up a softmax, and
the backward gathers them. On any device.

Letters: N tokens, K of them kept, D hidden, V vocabulary, R rows and C vocabulary columns of a tile, E selected
entries.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, SelectedEntries, SelectionRule
from tvkd_fast.ops.tiles import exact, native
from tvkd_fast.ops.tiles.exact import Tiles, blocks, pick_targets
from tvkd_fast.ops.tiles.selected import Collected, block_of


def select_entries(
    hidden: Tensor, head: Head, labels: Tensor, rule: SelectionRule, *, kept: Tensor | None = None
) -> tuple[HeadSums, SelectedEntries]:
    """`head_sums` with labels (K,), each (K,), and what a sparse gradient needs, in one product.

    The entries' rows, tails and dense rows are hidden's; rows that are not kept have none.
    """
    tiles = Tiles(hidden, head, kept)
    maximum = hidden.new_empty(tiles.count, dtype=tiles.acc)
    log_total, target = torch.empty_like(maximum), torch.full_like(maximum, torch.nan)
    tail, below = torch.zeros_like(maximum), torch.zeros_like(maximum)
    dense = torch.zeros_like(maximum, dtype=torch.bool)
    row_blocks = list(tiles.row_blocks())
    dtypes = [torch.int32, torch.int32, tiles.acc, *([] if head.softcap is None else [tiles.acc])]
    found = Collected(hidden, dtypes, row_blocks=len(row_blocks))
    candidates = 0
    for rows in row_blocks:
        h = tiles.states(rows)
        block = block_of(tiles, rule, h, rows)
        for columns in tiles.column_blocks():
            z = tiles.logits(h, tiles.upcast(head.weight[columns]), columns)
            pick_targets(z, labels[rows], columns, out=target[rows])
            block.add(z, labels[rows], columns)
        if head.softcap is not None:
            # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
            block.total.add_(h.sum(1).mul_(0.0))
        maximum[rows], log_total[rows] = block.maximum, block.total.log()
        entries, tail[rows], below[rows], dense[rows] = block.finish(target[rows])
        candidates += block.candidates
        found.add([x.parts for x in entries])
    if too_flat(found.count, below.masked_fill(dense, 0.0), dense, rule):
        dense = torch.ones_like(dense)
        found.forget()
    entry_rows, entry_columns, p, *chain = found.parts
    everywhere = hidden.new_zeros(hidden.shape[0], dtype=tiles.acc)
    selected = SelectedEntries(
        rows=entry_rows,
        columns=entry_columns,
        p=p,
        chain=chain[0] if chain else None,
        bounds=found.bounds,
        tail=_placed(tail, kept, everywhere),
        dense=_placed(dense, kept, everywhere.bool()),
        below=_placed(below, kept, everywhere),
        candidates=candidates,
    )
    return HeadSums(maximum, log_total, target=target), selected


def sparse_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    selected: SelectedEntries,
    grad_logps: Tensor,
    *,
    kept: Tensor | None = None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Return the gradients of Σ_t c_t·logp_t from selected entries; c = `grad_logps`, labels and sums are (K,).

    `sums` have their `target`. With M the selected entries and the label, T the tail and u = c·s·T/(V − |M|), the
    gradient by h·w_j is c·s·J_j·(δ_jy − p_j) on M and −u elsewhere. What is gathered is the difference from −u, which
    is added to all columns at once; columns that a bias of −inf takes out are in neither. Dense rows get the exact
    gradient, recomputed.
    """
    parts = Parts(hidden, head, labels, sums, selected, grad_logps, kept)
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


class SparseParts:
    """A sparse gradient by logits taken apart, row by row: entries less −u, the label less −u, and −u.

    An entry's gradient is −c·p, of `c` (K,) and of what `selected` has for p.
    """

    even: Tensor
    """(K,) u"""
    own: Tensor
    """(K,) the label's gradient less −u; 0 where a row has no label."""

    def __init__(self, tiles: Tiles, labels: Tensor, selected: SelectedEntries) -> None:
        self.tiles, self.selected = tiles, selected
        self.hidden, self.head = tiles.hidden, tiles.head
        n = self.hidden.shape[0]
        self.place = torch.arange(n, device=self.hidden.device) if tiles.kept is None else tiles.kept
        self.dense = selected.dense[self.place]
        # A label that is nobody's (an ignored row's, on a GPU) has no weight row; its coefficient is 0.
        self.labels = labels.clamp(0, self.head.vocab_size - 1)
        bias = self.head.bias
        self.live = None if bias is None else bias.isneginf().logical_not_().to(tiles.acc)
        self.passes = native.passes(tiles.buffers) if selected.chain is None else None

    def share(self, total: Tensor, labels: int) -> Tensor:
        """`total` (K,) over the columns of each row that are neither entries nor its `labels`, 1 or 0."""
        live = self.head.vocab_size if self.live is None else self.live.sum()
        free = live - labels - self._counts(self.hidden.shape[0])[self.place]
        return torch.where(free > 0, total / free.clamp(min=1), 0.0)

    def spread(self, c: Tensor) -> None:
        """Put u and c (K,) at the rows' places among all of hidden's."""
        kept, n = self.tiles.kept, self.hidden.shape[0]
        self.even_everywhere, self.c_everywhere = (_placed(x, kept, c.new_zeros(n)) for x in (self.even, c))

    def _counts(self, n: int) -> Tensor:
        """(n,) entries per row, tile by tile: bincount takes eight bytes more per entry."""
        counts = torch.zeros(n, dtype=torch.int64, device=self.place.device)
        for start, stop in pairwise(self.selected.bounds.tolist()):
            counts += torch.bincount(self.selected.rows[start:stop], minlength=n)
        return counts

    def entries(self, segment: slice) -> Tensor:
        """The gradient by h·w less −u of a run of entries."""
        selected, rows = self.selected, self.selected.rows[segment]
        p = selected.p[segment] if selected.chain is None else selected.p[segment] * selected.chain[segment]
        return self.even_everywhere.index_select(0, rows) - self.c_everywhere.index_select(0, rows) * p

    def by_hidden(self, grad: Tensor | None = None) -> Tensor:
        """Σ_j g_tj w_j [N, D], tile by tile in the forward's order: weight's rows are read while they are near.

        `grad` holds the dense rows' gradients already; their sums here are 0.
        """
        tiles, selected, weight = self.tiles, self.selected, self.head.weight
        grad = self.hidden.new_zeros(self.hidden.shape) if grad is None else grad
        weight_sum = self._sum_of_weight()
        bounds = iter(selected.bounds.tolist())
        start = next(bounds)
        for rows in tiles.row_blocks():
            place = self.place[rows]
            total = weight.new_zeros((place.shape[0], weight.shape[1]), dtype=tiles.acc)
            edges = torch.cat([place, place[-1:] + 1]).int()
            for columns in tiles.column_blocks():
                segment = slice(start, start := next(bounds))
                total += bag(
                    selected.columns[segment] - columns.start,
                    tiles.upcast(weight[columns]),
                    torch.searchsorted(selected.rows[segment], edges, out_int32=True),
                    self.entries(segment),
                )
            total.addcmul_(self.own[rows, None], tiles.upcast(weight[self.labels[rows]]))
            grad[place] += total.addr_(self.even[rows], weight_sum, alpha=-1.0).to(grad.dtype)
        return grad

    def sum_of_states(self) -> Tensor:
        """Σ_t −u_t h_t (D,)."""
        total = self.hidden.new_zeros(self.hidden.shape[1], dtype=self.tiles.acc)
        for rows in self.tiles.row_blocks():
            total -= self.tiles.states(rows).T.mv(self.even[rows])
        return total

    def _sum_of_weight(self) -> Tensor:
        """Return Σ_j w_j (D,) over the columns that no bias of −inf takes out."""
        total = self.hidden.new_zeros(self.hidden.shape[1], dtype=self.tiles.acc)
        ones = total.new_ones(self.tiles.columns)
        for columns in self.tiles.column_blocks():
            w = self.tiles.upcast(self.head.weight[columns])
            total += w.T.mv(ones[: w.shape[0]] if self.live is None else self.live[columns])
        return total


class Parts(SparseParts):
    """Of Σ_t c_t·logp_t; c = `grad_logps`, labels and sums are (K,)."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        sums: HeadSums,
        selected: SelectedEntries,
        grad_logps: Tensor,
        kept: Tensor | None,
    ) -> None:
        super().__init__(Tiles(hidden, head, kept), labels, selected)
        c = (grad_logps * head.logit_scale).masked_fill(self.dense, 0.0)
        self.even = self.share(c * selected.tail[self.place], 1)
        assert sums.target is not None
        own = c * torch.expm1(sums.logps).neg_()
        if head.softcap is not None:
            own *= 1.0 - (sums.target / head.softcap) ** 2
        self.own = own + self.even
        self.spread(c)


class ByColumn:
    """The same entries by column, a tile of columns at a time, for what is summed over rows."""

    def __init__(self, parts: SparseParts) -> None:
        self.parts, self.tiles = parts, parts.tiles
        self.even_states = parts.sum_of_states()
        self.columns = list(parts.tiles.column_blocks())
        self.bounds = parts.selected.bounds.tolist()
        self.labels, self.order = parts.labels.int().sort(stable=True)
        n, d = parts.hidden.shape
        as_it_is = parts.hidden.dtype == self.tiles.acc and parts.hidden.is_contiguous()
        self.in_place = parts.passes if as_it_is and parts.live is None else None
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
            if self.in_place is not None:
                self.in_place.gather(rows, entries, edges, parts.hidden, self.even_states, out)
                continue
            for features in blocks(total.shape[1], self.width):
                h = parts.hidden[:, features].to(acc).contiguous()
                gathered = bag(rows, h, edges, entries)
                even = self.even_states[features]
                if parts.live is None:
                    torch.add(gathered, even, out=out[:, features])
                else:
                    torch.addcmul(gathered, parts.live[there, None], even, out=out[:, features])

    def bias(self) -> Tensor:
        """Σ_t g_tj (V,)."""
        sums = []
        for which, tile in enumerate(self.columns):
            _, entries, edges = self._found(which, tile)
            sums.append(torch.segment_reduce(entries, "sum", lengths=edges.diff().long(), unsafe=True))
        total = self.parts.even.sum()
        return torch.cat(sums) - (total if self.parts.live is None else total * self.parts.live)

    def _found(self, which: int, there: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and gradients of the columns `there`, inside tile `which`, by column; where each column begins."""
        parts, found = self.parts, self.parts.selected
        runs = range(which, len(self.bounds) - 1, len(self.columns))
        segments = [slice(self.bounds[i], self.bounds[i + 1]) for i in runs]
        ends = torch.tensor([there.start, there.stop], dtype=torch.int32, device=self.labels.device)
        own = self.order[slice(*torch.searchsorted(self.labels, ends).tolist())]
        if parts.passes is not None:
            selected = [torch.cat([x[:0], *(x[s] for s in segments)]) for x in (found.columns, found.rows, found.p)]
            labels = [parts.labels[own].int(), parts.place[own].int(), parts.own[own]]
            return parts.passes.by_column(selected, parts.even_everywhere, parts.c_everywhere, labels, there)
        columns = torch.cat([*(found.columns[x] for x in segments), parts.labels[own].int()])
        rows = torch.cat([*(found.rows[x] for x in segments), parts.place[own].int()])
        entries = torch.cat([*(parts.entries(x) for x in segments), parts.own[own]])
        columns, order = columns.sort(stable=True)
        edges = torch.arange(there.start, there.stop + 1, dtype=torch.int32, device=columns.device)
        edges = torch.searchsorted(columns, edges, out_int32=True)
        inside = order[int(edges[0]) : int(edges[-1])]
        return rows[inside], entries[inside], edges - edges[:1]


def bag(index: Tensor, rows: Tensor, edges: Tensor, factors: Tensor) -> Tensor:
    """Σ_k factors_k·rows[index_k] over k of edges[i]..edges[i+1], each sum in the order of k: [len(edges) − 1, D]."""
    return embedding_bag(index, rows, edges, per_sample_weights=factors, mode="sum", include_last_offset=True)


def too_flat(entries: int, below: Tensor, dense: Tensor, rule: SelectionRule) -> bool:
    """Return whether the rows that are not dense lose, or hold, more than the rule lets them on average."""
    sparse = int(dense.logical_not().sum())
    return sparse > 0 and (float(below.sum()) > rule.max_tail * sparse or entries > rule.max_entries * sparse)


def _placed(x: Tensor, kept: Tensor | None, everywhere: Tensor) -> Tensor:
    """The kept rows' numbers at their places among all of hidden's."""
    return x if kept is None else everywhere.index_copy(0, kept, x)
