"""The head's exact gradients: logits recomputed a block at a time, and two products of each block.

Letters: N tokens, D hidden, V vocabulary, R rows and C vocabulary columns of a block.

A block's gradient by the logits is held in one buffer of hidden's dtype, whose size `blocks.py` plans. Four products in
all with the forward; the one for dH is left out where the backbone is frozen. `head_dhidden.py` serves a frozen head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.blocks import in_workspace, plan, slices
from tvkd_fast.kernels.configs import TileConfig
from tvkd_fast.kernels.dlogits import dlogits
from tvkd_fast.kernels.products import library_sums, product
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.kernels.sliced_head import LastColumns, bytes_per_column

HIDDEN_SUM_SHARE = 2
"""The workspace over the most that float32 sums of a whole 16-bit dH may take of it. A larger dH takes its own pass,
which recomputes the logits again."""

_FLOAT16_SCALE = 2.0**-14


def head_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    coefficients: Tensor,
    *,
    ignore_index: int = -100,
    elsewhere: bool = False,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Exact gradients of Σ_t c_t·logp_t with c = `coefficients` (N,), zero where a label is `ignore_index`.

    The gradient by h·w_j is −s·c·J_j·(p_j − δ_jy). hidden [N, D], labels, sums (N,) as `head_sums` took and gave them.
    dH and dW accumulate in float32 and are rounded once; every slice of dW is written once. Bitwise repeatable.

    With dW the outer loop is over columns, and a 16-bit dH is summed in a float32 buffer of its size (up to half of the
    workspace); without dW the outer loop is over rows, and a buffer of R rows is enough.

    A label that no row of weight holds makes its row NaN, unless it may lie `elsewhere`: in another part of the
    vocabulary that `sums` are over.
    """
    walk = _Walk(hidden, head, labels, sums, coefficients, ignore_index, elsewhere)
    return walk.gradients(want_hidden=want_hidden, want_weight=want_weight, want_bias=want_bias)


class BlockWalk:
    """Blocks of dlogits over [N, V], and the products that read them: the walk of any loss of the logits.

    A kind of it makes a block: its gradient by a = h·w + bias, over `alpha` and `scale`.
    """

    def __init__(self, hidden: Tensor, head: Head, tiles_of_dlogits: TileConfig, largest: Tensor, alpha: float) -> None:
        """Set out over hidden [N, D]; `largest` (N,) float32 bounds a row's entries before they are rounded."""
        self.hidden, self.head, self.alpha = hidden, head, alpha
        self.columns = LastColumns(head)
        self.bytes_per_column = bytes_per_column(head)
        self.count, self.size = hidden.shape
        self.wide = hidden.dtype == torch.float32
        self.tiles = tiles_of_dlogits
        self.product_tiles = tiles("product", hidden, head.weight, self.count)
        self.scale = largest.new_ones(1)
        if hidden.dtype == torch.float16 and self.count:
            # c/scale uses float16's range down to 2⁻²⁸ of the largest c; the division is undone in float32.
            most = torch.where(largest.isfinite(), largest, 0.0).max()
            self.scale *= (most * _FLOAT16_SCALE).clamp_min(torch.finfo(torch.float32).tiny)
        # The products read whole steps of block_k from the zeros that dlogits wrote past the end.
        assert self.tiles.block_m % self.product_tiles.block_k == 0 == self.tiles.block_n % self.product_tiles.block_k

    def dlogits(self, rows: slice, columns: slice, buffer: Tensor, *, want_bias: bool = False) -> Tensor | None:
        """Fill the buffer with a block, whole tiles of it; return the sums of its columns where the bias wants them."""
        raise NotImplementedError

    def gradients(self, *, want_hidden: bool, want_weight: bool, want_bias: bool) -> HeadGradients:
        """Walk; with dW column by column, and else row by row."""
        hidden, head = self.hidden, self.head
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        grad_weight = hidden.new_empty((head.vocab_size, self.size)) if want_weight else None
        grad_bias = None if head.bias is None or not want_bias else hidden.new_empty(head.vocab_size)

        def fill(budget: int) -> None:
            want_columns = grad_weight is not None or grad_bias is not None
            together = want_columns and (self.wide or hidden.numel() * 4 * HIDDEN_SUM_SHARE <= budget)
            if grad_hidden is not None and not together:
                self.by_rows(grad_hidden, budget)
            if want_columns:
                self.by_columns(grad_hidden if together else None, grad_weight, grad_bias, budget)

        in_workspace(hidden, fill)
        return HeadGradients(grad_hidden, grad_weight, grad_bias)

    def blocks(self, budget: int, *, row_sums: int = 0, column_sums: int = 0) -> tuple[int, int, Tensor]:
        """R, C, and the buffer [R, C] for dlogits."""
        blocks = plan(
            (self.count, self.size, self.head.vocab_size),
            self.hidden.element_size(),
            (self.tiles, self.product_tiles),
            budget=budget,
            row_sums=row_sums,
            column_sums=column_sums + self.bytes_per_column,
            always=library_sums(self.hidden.device, self.hidden.dtype) or self.bytes_per_column > 0,
        )
        return blocks.rows, blocks.columns, self.hidden.new_empty((blocks.rows, blocks.columns))

    def add(self, left: Tensor, right: Tensor, total: _Sum, *, transposed: bool = False) -> None:
        """total += left·right, and the gradient where this was the last block of it."""
        product(
            left,
            right,
            total.target,
            self.product_tiles,
            transposed=transposed,
            previous=total.previous,
            scale=self.scale,
            alpha=self.alpha,
            last=total.last,
        )

    def by_rows(self, grad_hidden: Tensor, budget: int) -> None:
        step, width, buffer = self.blocks(budget, row_sums=0 if self.wide else 4 * self.size)
        held = None if self.wide else self.hidden.new_empty((step, self.size), dtype=torch.float32)
        for rows in slices(self.count, step):
            place = grad_hidden[rows]
            total = _Sum(place, place if held is None else held[: place.shape[0]])
            for columns in slices(self.head.vocab_size, width):
                self.dlogits(rows, columns, buffer)
                total.turn(columns.start == 0, columns.stop == self.head.vocab_size)
                self.add(buffer, self.columns(columns).weight, total)

    def by_columns(
        self, grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, budget: int
    ) -> None:
        held = 0 if grad_hidden is None or self.wide else 4 * grad_hidden.numel()
        sums = 0 if grad_weight is None or self.wide else 4 * self.size
        step, width, buffer = self.blocks(budget - held, column_sums=sums)
        vocab = self.head.vocab_size
        hidden_sums = grad_hidden
        if grad_hidden is not None and not self.wide and width < vocab:
            hidden_sums = torch.empty_like(grad_hidden, dtype=torch.float32)
        slice_sums = None
        if grad_weight is not None and not self.wide and step < self.count:
            slice_sums = self.hidden.new_empty((width, self.size), dtype=torch.float32)
        for columns in slices(vocab, width):
            bias_total = None
            for rows in slices(self.count, step):
                bias_sums = self.dlogits(rows, columns, buffer, want_bias=grad_bias is not None)
                if bias_sums is not None:
                    bias_total = bias_sums if bias_total is None else bias_total.add_(bias_sums)
                if grad_hidden is not None and hidden_sums is not None:
                    total = _Sum(grad_hidden[rows], hidden_sums[rows])
                    total.turn(columns.start == 0, columns.stop == vocab)
                    self.add(buffer, self.columns(columns).weight, total)
                if grad_weight is not None:
                    place = grad_weight[columns]
                    total = _Sum(place, place if slice_sums is None else slice_sums[: place.shape[0]])
                    total.turn(rows.start == 0, rows.stop == self.count)
                    self.add(buffer, self.hidden[rows], total, transposed=True)
            if grad_weight is not None and not self.count:
                grad_weight[columns] = 0
            if grad_bias is not None:
                scaled = 0 if bias_total is None else bias_total.mul_(self.scale).mul_(self.alpha)
                grad_bias[columns] = scaled


class _Walk(BlockWalk):
    """The walk of log-probabilities."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        sums: HeadSums,
        coefficients: Tensor,
        ignore_index: int,
        elsewhere: bool,
    ) -> None:
        self.labels, self.sums, self.ignore_index = labels, sums, ignore_index
        demand = {"heavy": head.softcap is not None, "bias": head.bias is not None}
        coefficients = coefficients.float()
        if not elsewhere:
            # A label that no row of weight holds has no logp, and must not get a gradient that looks like one.
            nowhere = (labels < 0) | (labels >= head.vocab_size)
            coefficients = coefficients.masked_fill(nowhere, torch.nan)
        self.coefficients = coefficients.masked_fill(labels == ignore_index, 0.0).contiguous()
        chosen = tiles("dlogits", hidden, head.weight, hidden.shape[0], **demand)
        super().__init__(hidden, head, chosen, self.coefficients.abs(), alpha=-head.logit_scale)

    def dlogits(self, rows: slice, columns: slice, buffer: Tensor, *, want_bias: bool = False) -> Tensor | None:
        sums = HeadSums(self.sums.maximum[rows], self.sums.log_total[rows])
        return dlogits(
            self.hidden[rows],
            self.columns(columns),
            self.labels[rows],
            sums,
            self.coefficients[rows],
            self.scale,
            buffer,
            self.tiles,
            first_column=columns.start,
            ignore_index=self.ignore_index,
            want_bias=want_bias,
        )


@dataclass
class _Sum:
    """A gradient summed over blocks: in `held` until the last block, which writes `grad`."""

    grad: Tensor
    held: Tensor
    first: bool = True
    last: bool = True

    def turn(self, first: bool, last: bool) -> None:
        self.first, self.last = first, last

    @property
    def previous(self) -> Tensor | None:
        return None if self.first else self.held

    @property
    def target(self) -> Tensor:
        return self.grad if self.last else self.held
