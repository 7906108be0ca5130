"""The gradient made in the forward on a GPU: products by the vendor's library, the pass between them in Triton.

Letters: N tokens, R rows of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.kernels.block_softmax import SCALE, block_exponentials
from tvkd_fast.kernels.blocks import in_workspace
from tvkd_fast.kernels.products import accumulate
from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.tiles.forward_gradients import Part, rows_of_workspace
from tvkd_fast.ops.triton_backend import packed, packed_rows


class TritonWalk:
    """Gradients so far, and the workspace [R, V]: products in float32, and over them exponentials in hidden's dtype."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, workspace_mb: int, wants: Sequence[bool]) -> None:
        want_hidden, want_weight, want_bias = wants
        self.hidden, self.head, self.labels = packed_rows(hidden), packed(head), labels.contiguous()
        vocab_size = head.vocab_size

        def block(budget: int) -> Tensor:
            self.most = rows_of_workspace("triton", budget // 2**20, head, hidden.element_size())
            return hidden.new_empty((min(self.most, hidden.shape[0]), vocab_size), dtype=torch.float32)

        asked = workspace_mb * 2**20
        self._products = block(asked) if asked else in_workspace(hidden, block)
        self._hidden = torch.zeros_like(self.hidden) if want_hidden else None
        self._weight = hidden.new_zeros(head.weight.shape, dtype=torch.float32) if want_weight else None
        with_bias = want_bias and head.bias is not None
        self._bias = hidden.new_zeros(vocab_size, dtype=torch.float32) if with_bias else None
        self._states = self.hidden[:0]
        """[R, D] of the block in the workspace."""

    def sums(self, rows: Tensor) -> Part:
        products = self._products[: len(rows)]
        self._states = self.hidden[rows]
        accumulate(products, self._states, self.head.weight.T, fresh=True)
        return Part(rows, *block_exponentials(products, self.head, self.labels[rows], self._exponentials(len(rows))))

    def add_products(self, part: Part, c: Tensor) -> None:
        rows, e = part.rows, self._exponentials(len(part.rows))
        by_entry = part.factor(c, self.head.logit_scale / SCALE[e.dtype])
        scale = self._scale(by_entry)
        factors = by_entry.float()[:, None]
        if self._hidden is not None:
            grad = e.new_empty((len(rows), self.hidden.shape[1]), dtype=torch.float32)
            accumulate(grad, e, self.head.weight, fresh=True)
            self._hidden[rows] = grad.mul_(factors).to(self._hidden.dtype)
        if scale != 1.0:
            factors = factors / scale
        if self._weight is not None:
            accumulate(self._weight, e.T, (self._states * factors).to(e.dtype), alpha=scale)
        if self._bias is not None:
            # In two parts, of 16 bits: what the first one's rounding leaves out is the second.
            high = factors.to(e.dtype)
            sums = e.new_empty((len(self._bias), 2), dtype=torch.float32)
            accumulate(sums, e.T, torch.cat([high, (factors - high).to(e.dtype)], 1), fresh=True)
            self._bias.add_(sums.sum(1), alpha=scale)

    def rounded(self) -> HeadGradients:
        weight, bias = (None if x is None else x.to(self.hidden.dtype) for x in (self._weight, self._bias))
        return HeadGradients(self._hidden, weight, bias)

    def _exponentials(self, rows: int) -> Tensor:
        """[R, V] of hidden's dtype where the products lie, each row's at its beginning."""
        products = self._products[:rows]
        return products.view(self.hidden.dtype)[:, : products.shape[1]]

    def _scale(self, by_entry: Tensor) -> float:
        """What float16's factors are divided by, so that the largest is 1."""
        if self.hidden.dtype != torch.float16 or not len(by_entry):
            return 1.0
        return float(by_entry.abs().nan_to_num(0.0, 0.0).max()) or 1.0
