"""The head in torch, one tile of logits at a time: statistics forward, gradients backward, on any device.

Letters: N tokens, K of them kept, D hidden, V vocabulary, R rows and C vocabulary columns of a tile.

A tile is the only place where logits exist. `WORKSPACE_FLOATS` bounds what a call holds beside its inputs and its
results, whatever N and V are; 16-bit inputs are upcast tile by tile, because a 16-bit `mm` on a CPU rounds its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.huge_pages import large_empty

WORKSPACE_FLOATS = 4 * 2**20
TILE_ROWS = 1024


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_sums(
    hidden: Tensor,
    head: Head,
    *,
    kept: Tensor | None = None,
    labels: Tensor | None = None,
    kappa: float | None = None,
    entropy: bool = False,
    logits: Tensor | None = None,
) -> HeadSums:
    """Online log-sum-exp over the vocabulary, and beside it what else was asked of the same tiles.

    hidden [N, D]; kept (K,) names the rows to compute (all where None); labels (K,) or None; kappa asks for LSE(κz),
    which shares the tile and its maximum: κ·max z = max κz; entropy for −Σ p log p; `logits`, from
    `logits_workspace`, is filled for the backward. A label that no tile holds leaves NaN, not a number.
    """
    tiles = Tiles(hidden, head, kept, logits)
    maximum = hidden.new_empty(tiles.count, dtype=tiles.acc)
    log_total = torch.empty_like(maximum)
    lse_kappa = None if kappa is None else torch.empty_like(maximum)
    entropies = torch.empty_like(maximum) if entropy else None
    target = None if labels is None else torch.full_like(maximum, torch.nan)
    for rows in tiles.row_blocks():
        h = tiles.states(rows)
        running_max = h.new_full((h.shape[0],), -torch.inf)
        total, total_kappa, moment = (torch.zeros_like(running_max) for _ in range(3))
        for columns in tiles.column_blocks():
            z = tiles.logits(h, tiles.upcast(head.weight[columns]), columns, kept_for=rows)
            if labels is not None and target is not None:
                pick_targets(z, labels[rows], columns, out=target[rows])
            passes = native.passes(z)
            if passes is not None and kappa is None and not entropy:
                passes.add(z, running_max, total)
                continue
            new_max = torch.maximum(running_max, z.amax(1))
            # A row whose logits so far are all -inf has no finite maximum to subtract.
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
            decay = running_max - shift
            z = torch.sub(z, shift[:, None], out=tiles.tile(z.shape))
            if kappa is not None:
                scaled = torch.mul(z, kappa, out=tiles.spare(z))
                total_kappa.mul_(decay.mul(kappa).exp_()).add_(scaled.exp_().sum(1))
            if entropy:
                # Σ e^z·z moves with the maximum; 0·log 0 is 0, for which -inf would give NaN.
                moment.addcmul_(total, decay.nan_to_num(neginf=0.0)).mul_(decay.exp())
                weights = torch.exp(z, out=tiles.spare(z))
                moment.add_(weights.mul_(z.masked_fill(z == -torch.inf, 0.0)).sum(1))
            total.mul_(decay.exp_()).add_(z.exp_().sum(1))
            running_max = new_max
        if head.softcap is not None:
            # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
            total.add_(h.sum(1).mul_(0.0))
        if entropies is not None:
            entropies[rows] = total.log().sub_(moment / total)
        maximum[rows], log_total[rows] = running_max, total.log_()
        if lse_kappa is not None and kappa is not None:
            lse_kappa[rows] = total_kappa.log_().add_(running_max, alpha=kappa)
    return HeadSums(maximum, log_total, lse_kappa, target, entropies)


def head_dlogp_dhidden(
    hidden: Tensor, head: Head, labels: Tensor, *, kept: Tensor | None = None
) -> tuple[HeadSums, Tensor]:
    """Return `head_sums` with labels (K,), and the derivatives dlogp_t/dh_t = s·(J_y w_y − Σ_j p_j J_j w_j), [N, D].

    Like attention's output the sum is a mean under a softmax, and moves with the running maximum: two products. The
    label's term is left out of it and added at the end, since p_y − 1 of a peaked softmax must not be a difference of
    rounded numbers. Derivatives of rows that are not kept are 0.
    """
    tiles = Tiles(hidden, head, kept)
    maximum = hidden.new_empty(tiles.count, dtype=tiles.acc)
    log_total = torch.empty_like(maximum)
    target = torch.full_like(maximum, torch.nan)
    derivatives = hidden.new_zeros(hidden.shape, dtype=tiles.acc)
    for rows in tiles.row_blocks():
        h = tiles.states(rows)
        running_max = h.new_full((h.shape[0],), -torch.inf)
        others, mean = torch.zeros_like(running_max), torch.zeros_like(h)
        for columns in tiles.column_blocks():
            w = tiles.upcast(head.weight[columns])
            z = tiles.logits(h, w, columns)
            pick_targets(z, labels[rows], columns, out=target[rows])
            new_max = torch.maximum(running_max, z.amax(1))
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
            decay = running_max.sub_(shift).exp_()
            chain = tiles.chain(z)
            e = z.sub_(shift[:, None]).exp_()
            here, local = locate(labels[rows], columns)
            e.scatter_(1, local, e.gather(1, local).masked_fill_(here, 0.0))
            others.mul_(decay).add_(e.sum(1))
            mean.mul_(decay[:, None]).addmm_(e if chain is None else e.mul_(chain), w)
            running_max = new_max
        if head.softcap is not None:
            others.add_(h.sum(1).mul_(0.0))
        shift = running_max.masked_fill(running_max == -torch.inf, 0.0)
        total = target[rows].sub(shift).exp_().add_(others)
        maximum[rows], log_total[rows] = running_max, total.log()
        missing = others.div_(total)
        if head.softcap is not None:
            missing.mul_(1.0 - (target[rows] / head.softcap).square_())
        # A label out of range has no row to read; its target is NaN, and so is all that is made of it.
        own = tiles.upcast(head.weight[labels[rows].clamp(0, head.vocab_size - 1)])
        derivative = own.mul_(missing[:, None]).sub_(mean.div_(total[:, None]))
        derivatives[tiles.index(rows)] = derivative.mul_(head.logit_scale)
    return HeadSums(maximum, log_total, target=target), derivatives


def head_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    grad_logps: Tensor,
    *,
    kept: Tensor | None = None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    logits: Tensor | None = None,
    weight_start: Callable[[slice, Tensor], None] | None = None,
    bias_start: Tensor | None = None,
) -> HeadGradients:
    """Exact gradients of Σ_t c_t·logp_t by recomputed tiles, with c = `grad_logps`; labels, sums and c are (K,).

    Rows whose `logits` the forward kept are read instead.

    `weight_start(columns, total)` fills a slice of dW's float32 sum, and `bias_start` (V,) the bias's, with what other
    rows than the kept ones add to it.

    With p = softmax(z) and J = dz/da, the gradient by h·w_j is −c·s·J_j·(p_j − δ_jy). Columns are walked outside, rows
    inside, so that a slice of dW is accumulated in float32 over all rows and written once. dH is then accumulated over
    the columns: in place where it already has the accumulator's dtype, else in a float32 buffer where that fits the
    workspace, else in a walk of its own with rows outside (one product more, and the memory stays bounded).
    """
    tiles, upstream = Tiles(hidden, head, kept, logits), -grad_logps
    want_columns = want_weight or want_bias
    hidden_in_place = hidden.dtype == tiles.acc or hidden.numel() <= WORKSPACE_FLOATS
    grad_hidden = accumulated = None
    if want_hidden and want_columns and hidden_in_place:
        accumulated = hidden.new_zeros(hidden.shape, dtype=tiles.acc)
    elif want_hidden:
        grad_hidden = _hidden_gradient(tiles, labels, sums, upstream)
    grad_weight = large_empty(head.weight, head.weight.shape) if want_weight else None
    grad_bias = torch.empty_like(head.bias) if want_bias and head.bias is not None else None
    if want_columns:
        starts = (weight_start, bias_start)
        _column_gradients(tiles, labels, sums, upstream, accumulated, grad_weight, grad_bias, *starts)
    if accumulated is not None:
        grad_hidden = accumulated.to(hidden.dtype)
    return HeadGradients(grad_hidden, grad_weight, grad_bias)


def _hidden_gradient(tiles: Tiles, labels: Tensor, sums: HeadSums, upstream: Tensor) -> Tensor:
    weight = tiles.head.weight
    grad = tiles.hidden.new_zeros(tiles.hidden.shape)
    for rows in tiles.row_blocks():
        h = tiles.states(rows)
        total = h.new_zeros(h.shape)
        for columns in tiles.column_blocks():
            w = tiles.upcast(weight[columns])
            total.addmm_(tiles.dlosses(h, w, labels[rows], sums, rows, columns), w)
        grad[tiles.index(rows)] = total.mul_(upstream[rows, None]).to(grad.dtype)
    return grad


def _column_gradients(
    tiles: Tiles,
    labels: Tensor,
    sums: HeadSums,
    upstream: Tensor,
    accumulated: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weight_start: Callable[[slice, Tensor], None] | None,
    bias_start: Tensor | None,
) -> None:
    for columns in tiles.column_blocks():
        w = tiles.upcast(tiles.head.weight[columns])
        in_place = grad_weight is not None and grad_weight.dtype == tiles.acc
        total = grad_weight[columns] if grad_weight is not None and in_place else torch.empty_like(w)
        if weight_start is not None:
            weight_start(columns, total)
        else:
            total.zero_()
        total_bias = w.new_zeros(w.shape[0]) if bias_start is None else bias_start[columns].clone()
        for rows in tiles.row_blocks():
            h, c = tiles.states(rows), upstream[rows]
            g = tiles.dlosses(h, w, labels[rows], sums, rows, columns)
            # c multiplies [R, D] rows, not the [R, C] tile: the same products for fewer multiplications.
            if accumulated is not None:
                accumulated[tiles.index(rows)] += torch.mm(g, w).mul_(c[:, None])
            if grad_weight is not None:
                total.addmm_(g.T, h * c[:, None])
            if grad_bias is not None:
                total_bias.addmv_(g.T, c)
        if grad_weight is not None and not in_place:
            grad_weight[columns] = total.to(grad_weight.dtype)
        if grad_bias is not None:
            grad_bias[columns] = total_bias.to(grad_bias.dtype)


def logits_workspace(hidden: Tensor, head: Head, kept: Tensor | None, megabytes: int) -> Tensor:
    """[S, V] unwritten, for as many of the first rows as fit: whole blocks of rows, S = 0 where none does."""
    acc = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0] if kept is None else kept.shape[0]
    fitting = min(count, megabytes * 2**20 // (head.vocab_size * acc.itemsize))
    block = rows_of_a_tile(count, hidden.shape[1])
    rows = fitting if fitting == count else fitting // block * block
    return large_empty(hidden, (rows, head.vocab_size), acc)


def rows_of_a_tile(count: int, hidden_size: int) -> int:
    return max(1, min(count, TILE_ROWS, WORKSPACE_FLOATS // (4 * hidden_size)))


def transform_(z: Tensor, head: Head, columns: slice) -> Tensor:
    """Turn products [R, C] into the logits of these columns, in place: bias, scale and softcap."""
    if head.bias is not None:
        z.add_(head.bias[columns])
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def pick_targets(z: Tensor, labels: Tensor, columns: slice, out: Tensor) -> None:
    here, local = locate(labels, columns)
    out.copy_(torch.where(here, z.gather(1, local), out[:, None])[:, 0])


def locate(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return whether each row's target lies in these columns, and where in them: [R, 1] each, the place clamped."""
    here = (labels >= columns.start) & (labels < columns.stop)
    return here[:, None], (labels - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]


class Tiles:
    """The walk over [K, V] in [R, C] tiles that share two buffers; K are the kept rows of hidden, or all of them.

    `kept_logits` [S, V] holds, or is to hold, the logits of the first S rows, tile by tile.
    """

    def __init__(self, hidden: Tensor, head: Head, kept: Tensor | None, kept_logits: Tensor | None = None) -> None:
        self.hidden, self.head, self.kept, self.kept_logits = hidden, head, kept, kept_logits
        self.acc = accumulation_dtype(hidden.dtype)
        self.count = hidden.shape[0] if kept is None else kept.shape[0]
        d = hidden.shape[1]
        # A 16-bit walk also holds the upcast rows of the weight and the float32 slice of their gradient.
        held_per_column = 0 if hidden.dtype == self.acc else 2 * d
        self.rows = rows_of_a_tile(self.count, d)
        self.columns = max(1, min(head.vocab_size, WORKSPACE_FLOATS // 2 // (self.rows + held_per_column)))
        # Made once: a tile that came from the allocator anew each time would cost its page faults each time.
        self.buffers = large_empty(hidden, (2, self.rows * self.columns), self.acc)

    def index(self, rows: slice) -> slice | Tensor:
        return rows if self.kept is None else self.kept[rows]

    def states(self, rows: slice) -> Tensor:
        return self.upcast(self.hidden[self.index(rows)])

    def row_blocks(self) -> Iterator[slice]:
        return blocks(self.count, self.rows)

    def column_blocks(self) -> Iterator[slice]:
        return blocks(self.head.vocab_size, self.columns)

    def upcast(self, x: Tensor) -> Tensor:
        return x.to(self.acc)

    def logits(self, h: Tensor, w: Tensor, columns: slice, *, kept_for: slice | None = None) -> Tensor:
        """z [R, C] in the first buffer, valid until the next tile; or where the rows `kept_for` are to be kept."""
        head = self.head
        place = None if kept_for is None else self.kept_tile(kept_for, columns)
        z = self.tile((h.shape[0], w.shape[0])) if place is None else place
        torch.mm(h, w.T, out=z)
        return transform_(z, head, columns)

    def kept_tile(self, rows: slice, columns: slice) -> Tensor | None:
        """Return the place where a tile's logits are kept, or None. Tiles are stored in the order of the walk."""
        if self.kept_logits is None or rows.stop > self.kept_logits.shape[0]:
            return None
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        start = rows.start * self.head.vocab_size + shape[0] * columns.start
        return self.kept_logits.view(-1)[start : start + shape[0] * shape[1]].view(shape)

    def tile(self, shape: tuple[int, ...]) -> Tensor:
        """A tile in the first buffer."""
        return self.buffers[0, : shape[0] * shape[1]].view(shape)

    def spare(self, z: Tensor) -> Tensor:
        """A tile of z's shape in the second buffer."""
        return self.buffers[1, : z.numel()].view(z.shape)

    def chain(self, z: Tensor) -> Tensor | None:
        """J = dz/da in the second buffer; None where it is 1."""
        if self.head.softcap is None:
            return None
        return torch.div(z, self.head.softcap, out=self.spare(z)).square_().neg_().add_(1.0)

    def dlosses(self, h: Tensor, w: Tensor, labels: Tensor, sums: HeadSums, rows: slice, columns: slice) -> Tensor:
        """d(−logp)/d(h·w) = s·J·(softmax − onehot), [R, C] in the first buffer; labels are these rows'."""
        head = self.head
        z = self.kept_tile(rows, columns)
        if z is None:
            z = self.logits(h, w, columns)
        chain = self.chain(z)
        g = self.tile(z.shape)
        passes = native.passes(z)
        if passes is not None:
            passes.softmax(z, sums.maximum[rows], sums.log_total[rows], out=g)
        else:
            torch.sub(z, sums.maximum[rows, None], out=g).sub_(sums.log_total[rows, None]).exp_()
        here, local = locate(labels, columns)
        g.scatter_add_(1, local, here.to(g.dtype).neg_())
        if chain is not None:
            g.mul_(chain)
        return g.mul_(head.logit_scale) if head.logit_scale != 1.0 else g


def blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
