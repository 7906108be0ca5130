"""Random numbers of single softmax entries, from their places alone, whatever the tiles or batches are.

They decide what an unbiased tail keeps, and which token a sampler draws.

Letters: N tokens, R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HashUniform:
    """u_tj in (0, 1], the same for a (seed, row, column) whatever the tiles are.

    u_tj = frac(a_t + b_j) of two hashes, one per row and one per column: each u is uniform over seeds and any two of a
    row are independent, as an unbiased tail needs, for one addition per entry.
    """

    def __init__(self, seed: int, rows: Tensor, vocab_size: int) -> None:
        self.row_hashes = hashed(rows, 2 * seed)
        """(N,) int32"""
        self.column_hashes = hashed(torch.arange(vocab_size, device=rows.device), 2 * seed + 1)
        """(V,) int32"""

    def of(self, rows: slice, columns: slice) -> Tensor:
        """u of a block, [R, C]."""
        return self._uniform(self.row_hashes[rows, None] + self.column_hashes[columns])

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """u of single entries."""
        return self._uniform(self.row_hashes[rows] + self.column_hashes[columns])

    def _uniform(self, wrapped: Tensor) -> Tensor:
        # 2⁻²⁴ more than the middle keeps 0 out, and rounds back to 1 at the top.
        return wrapped.float().mul_(2.0**-32).add_(0.5 + 2.0**-24)


def hashed(index: Tensor, key: int) -> Tensor:
    """32 well-mixed bits of each index, as int32 (Wellons' lowbias32, twice, with the key between)."""
    x = index.long()
    for salt in (0x9E3779B9, key):
        x = (x ^ (salt & 0xFFFFFFFF)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return (x - 2**31).int()


def hashed_rows(columns: Tensor, xors: Tensor, factors: Tensor) -> Tensor:
    """[R, V] int32, 32 well-mixed bits of every entry by itself: lowbias32 of (column hash ^ xor) · factor.

    Args:
        columns: (V,) int32, `hashed` ids.
        xors, factors: (R,) int32, a row's two keys; factors are odd. Products of int32 wrap.
    """
    x = (columns ^ xors[:, None]).mul_(factors[:, None])
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        # int32 shifts its sign in, which the mask takes out.
        x ^= (x >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        x *= factor
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
