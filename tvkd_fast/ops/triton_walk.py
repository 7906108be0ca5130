"""Blocks of rows on a GPU: products by the vendor's library, the pass between them in Triton.

The gradient is made in the forward where the loss is known. Where it is not, exponentials of the first rows may be kept
for the backward: they are the gradient by the logits but for a factor a row, so that two products remain.

Letters: N tokens, R rows of a block, S rows whose exponentials are kept, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.kernels.block_softmax import SCALE, block_exponentials
from tvkd_fast.kernels.blocks import in_workspace, slices
from tvkd_fast.kernels.products import accumulate
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.ops.inputs import packed, packed_rows
from tvkd_fast.ops.tiles.forward_gradients import Part, rows_of_workspace

PRODUCTS_SHARE = 4
"""A workspace that keeps exponentials, over what of it holds a block's products."""


class Gradients:
    """The gradients so far: hidden's, each row's of its own, and float32 sums of the others."""

    def __init__(self, hidden: Tensor, head: Head, wants: Sequence[bool]) -> None:
        want_hidden, want_weight, want_bias = wants
        self.head = head
        self._hidden = torch.zeros_like(hidden) if want_hidden else None
        self._weight = hidden.new_zeros(head.weight.shape, dtype=torch.float32) if want_weight else None
        with_bias = want_bias and head.bias is not None
        self._bias = hidden.new_zeros(head.vocab_size, dtype=torch.float32) if with_bias else None

    def add(self, rows: Tensor, states: Tensor, e: Tensor, by_entry: Tensor, largest: float | None = None) -> None:
        """Those of rows with states [R, D] and exponentials e [R, V], which `by_entry` (R,) float64 multiplies as they
        are stored; of float16 the host waits for the largest of it, unless it is known."""
        scale = _scale(by_entry, e.dtype) if largest is None else largest
        factors = by_entry.float()[:, None]
        if self._hidden is not None:
            grad = e.new_empty(states.shape, dtype=torch.float32)
            accumulate(grad, e, self.head.weight, fresh=True)
            self._hidden[rows] = grad.mul_(factors).to(self._hidden.dtype)
        if scale != 1.0:
            factors = factors / scale
        if self._weight is not None:
            accumulate(self._weight, e.T, (states * factors).to(e.dtype), alpha=scale)
        if self._bias is not None:
            # In two parts, of 16 bits: what the first one's rounding leaves out is the second.
            high = factors.to(e.dtype)
            sums = e.new_empty((len(self._bias), 2), dtype=torch.float32)
            accumulate(sums, e.T, torch.cat([high, (factors - high).to(e.dtype)], 1), fresh=True)
            self._bias.add_(sums.sum(1), alpha=scale)

    def rounded(self) -> HeadGradients:
        dtype = self.head.weight.dtype
        weight, bias = (None if x is None else x.to(dtype) for x in (self._weight, self._bias))
        return HeadGradients(self._hidden, weight, bias)


class TritonWalk:
    """Gradients so far, and the workspace [R, V]: products in float32, and over them exponentials in hidden's dtype."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        workspace_mb: int,
        wants: Sequence[bool],
        *,
        visited: int | None = None,
    ) -> None:
        """`visited` rows at most are going to be asked for, of all of hidden's [N, D]."""
        self.hidden, self.head, self.labels = packed_rows(hidden), packed(head), labels.contiguous()
        visited = hidden.shape[0] if visited is None else visited

        def block(budget: int) -> Tensor:
            self.most = rows_of_workspace("triton", budget // 2**20, head, hidden.element_size())
            return hidden.new_empty((min(self.most, visited), head.vocab_size), dtype=torch.float32)

        asked = workspace_mb * 2**20
        self._products = block(asked) if asked else in_workspace(hidden, block)
        self.gradients = Gradients(self.hidden, self.head, wants)
        self._states = self.hidden[:0]
        """[R, D] of the block in the workspace."""

    def sums(self, rows: Tensor, out: Tensor | None = None) -> Part:
        """The rows' sums, and their exponentials in `out` [R, V], or over their products."""
        products = self._products[: len(rows)]
        self._states = self.hidden[rows]
        accumulate(products, self._states, self.head.weight.T, fresh=True)
        e = self._exponentials(len(rows)) if out is None else out
        return Part(rows, *block_exponentials(products, self.head, self.labels[rows], e))

    def add_products(self, part: Part, c: Tensor) -> None:
        e = self._exponentials(len(part.rows))
        self.gradients.add(part.rows, self._states, e, part.factor(c, self.head.logit_scale / SCALE[e.dtype]))

    def rounded(self) -> HeadGradients:
        return self.gradients.rounded()

    def _exponentials(self, rows: int) -> Tensor:
        """[R, V] of hidden's dtype where the products lie, each row's at its beginning."""
        products = self._products[:rows]
        return products.view(self.hidden.dtype)[:, : products.shape[1]]


def kept_forward(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int, workspace_mb: int
) -> tuple[HeadSums, Tensor]:
    """Statistics (N,), and the exponentials [S, V] of the first rows, in `workspace_mb` MiB with a block's products.

    `maximum` is what was subtracted from a row's logits, which lies near the largest.
    """
    of_products = max(1, workspace_mb // PRODUCTS_SHARE)
    kept = hidden.new_empty((_fitting(hidden, head, workspace_mb - of_products), head.vocab_size))
    walk = TritonWalk(*_without_ignored(hidden, head, labels, ignore_index), of_products, (False, False, False))
    order = torch.arange(len(hidden), device=hidden.device)
    blocks = [*slices(len(kept), walk.most), *slices(len(hidden), walk.most, start=len(kept))]
    parts = [walk.sums(order[block], kept[block] if block.stop <= len(kept) else None) for block in blocks]
    numbers = ([part.shift, part.total, part.target] for part in parts)
    whole = Part(order, *(torch.cat(of_blocks) for of_blocks in zip(*numbers, strict=True)))
    # A label that has all of the probability has no other entry, and nothing was subtracted from any.
    maximum = torch.where(whole.shift == -torch.inf, whole.target, whole.shift)
    return HeadSums(maximum.float(), (whole.lse - maximum).float(), target=whole.target.float()), kept


def kept_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    sums: HeadSums,
    grad_logps: Tensor,
    kept: Tensor,
    *,
    ignore_index: int,
    wants: Sequence[bool],
) -> HeadGradients:
    """Exact gradients of Σ_t grad_logps_t·logp_t from what `kept_forward` left; logits of other rows are made again."""
    c = grad_logps.masked_fill(labels == ignore_index, 0.0).double()
    by_entry = c * sums.log_total.double().neg().exp() * (-head.logit_scale / SCALE[kept.dtype])
    of_products = max(1, kept.nbytes // (PRODUCTS_SHARE - 1) // 2**20)
    inputs = _without_ignored(hidden, head, labels, ignore_index)
    walk = TritonWalk(*inputs, of_products, wants, visited=len(hidden) - len(kept))
    order, first = torch.arange(len(hidden), device=hidden.device), slice(len(kept))
    walk.gradients.add(order[first], walk.hidden[first], kept, by_entry[first])
    for block in slices(len(hidden), walk.most, start=len(kept)):
        walk.add_products(walk.sums(order[block]), c[block])
    return walk.rounded()


def _fitting(hidden: Tensor, head: Head, megabytes: int) -> int:
    """The rows of hidden whose exponentials fit."""
    return min(len(hidden), megabytes * 2**20 // (head.vocab_size * hidden.element_size()))


def _without_ignored(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int) -> tuple[Tensor, Head, Tensor]:
    """The same with ignored rows of zeros and some label: theirs are computed too, and must stay finite."""
    ignored = labels == ignore_index
    return hidden.masked_fill(ignored[:, None], 0.0), head, labels.masked_fill(ignored, 0)


def _scale(by_entry: Tensor, dtype: torch.dtype) -> float:
    """What float16's factors are divided by, so that the largest is 1."""
    if dtype != torch.float16 or not len(by_entry):
        return 1.0
    return float(by_entry.abs().nan_to_num(0.0, 0.0).max()) or 1.0
