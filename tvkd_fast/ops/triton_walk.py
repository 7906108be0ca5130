"""The gradient made in the forward on a GPU: products by the vendor's library, what lies between them in Triton.

Letters: N tokens, R rows of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.kernels.block_softmax import block_dlogits, block_sums
from tvkd_fast.kernels.blocks import in_workspace
from tvkd_fast.kernels.products import accumulate
from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.tiles.forward_gradients import Part, rows_of_workspace
from tvkd_fast.ops.triton_backend import packed, packed_rows

_FLOAT16_RANGE = 2.0**14


class TritonWalk:
    """Gradients so far, and the workspace: products [R, V] in float32, and in hidden's dtype the gradient by them."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, workspace_mb: int, wants: Sequence[bool]) -> None:
        want_hidden, want_weight, want_bias = wants
        self.hidden, self.head, self.labels = packed_rows(hidden), packed(head), labels.contiguous()
        vocab_size = head.vocab_size

        def blocks(budget: int) -> tuple[Tensor, Tensor]:
            self.most = rows_of_workspace("triton", budget // 2**20, head, hidden.element_size())
            products = hidden.new_empty((min(self.most, hidden.shape[0]), vocab_size), dtype=torch.float32)
            # Of float32 states the gradient is written over the products.
            if hidden.dtype == torch.float32:
                return products, products
            return products, torch.empty_like(products, dtype=hidden.dtype)

        asked = workspace_mb * 2**20
        self._products, self._dlogits = blocks(asked) if asked else in_workspace(hidden, blocks)
        self._hidden = torch.zeros_like(self.hidden) if want_hidden else None
        self._weight = hidden.new_zeros(head.weight.shape, dtype=torch.float32) if want_weight else None
        with_bias = want_bias and head.bias is not None
        self._bias = hidden.new_zeros(vocab_size, dtype=torch.float32) if with_bias else None

    def sums(self, rows: Tensor) -> Part:
        products = self._products[: len(rows)]
        accumulate(products, self.hidden[rows], self.head.weight.T, fresh=True)
        found = block_sums(products, self.head, self.labels[rows])
        return Part(rows, found.maximum.double(), found.total.double(), found.target.double())

    def add_products(self, part: Part, c: Tensor) -> None:
        rows, count = part.rows, len(part.rows)
        by_entry, by_label = part.factors(c, self.head.logit_scale)
        scale = self._scale(by_entry, by_label)
        dlogits = self._dlogits[:count]
        block_dlogits(
            self._products[:count],
            self.head,
            self.labels[rows],
            part.shift.float(),
            (by_entry / scale).float(),
            (by_label / scale).float(),
            dlogits,
        )
        if self._hidden is not None:
            grad = dlogits.new_empty((count, self.hidden.shape[1]), dtype=torch.float32)
            accumulate(grad, dlogits, self.head.weight, fresh=True, alpha=scale)
            self._hidden[rows] = grad.to(self._hidden.dtype)
        if self._weight is not None:
            accumulate(self._weight, dlogits.T, self.hidden[rows], alpha=scale)
        if self._bias is not None:
            self._bias.add_(dlogits.sum(0, dtype=torch.float32), alpha=scale)

    def rounded(self) -> HeadGradients:
        weight, bias = (None if x is None else x.to(self.hidden.dtype) for x in (self._weight, self._bias))
        return HeadGradients(self._hidden, weight, bias)

    def _scale(self, by_entry: Tensor, by_label: Tensor) -> float:
        """What float16 is divided by, so that its range holds the smallest parts of the block's gradient."""
        if self.hidden.dtype != torch.float16:
            return 1.0
        largest = torch.stack([by_entry.abs().max(), by_label.abs().max()]).nan_to_num(0.0, 0.0).max()
        return float(largest) / _FLOAT16_RANGE or 1.0
