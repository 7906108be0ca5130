"""The size of the blocks of [N, V] that are written to memory.

Letters: N tokens, D hidden, V vocabulary, R rows and C vocabulary columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton

from tvkd_fast.kernels.configs import TileConfig

WORKSPACE_BYTES = 32 * 2**20
"""The block in hidden's dtype; as much again may go to float32 sums of a slice of dW, or of a block of dH."""

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Blocks:
    """Blocks of R × C over [N, V], both whole tiles unless N or V is smaller."""

    rows: int
    columns: int


def plan(
    shape: tuple[int, int, int], element_size: int, tiles: tuple[TileConfig, ...], *, sum_bytes_per_row: int = 0
) -> Blocks:
    """Blocks for (N, D, V), each side a multiple of every tile's.

    Sums are held either per row, `sum_bytes_per_row` of them, or else per column, D float32 each. With sums per row, R
    is the number of rows whose sums fit in the workspace, and C the number of columns that then fit.
    """
    n, d, v = shape
    whole = max(max(x.block_m, x.block_n, x.block_k) for x in tiles)

    def rounded(count: int) -> int:
        return triton.cdiv(max(count, 1), whole) * whole

    limit = BLOCK_ROWS
    if sum_bytes_per_row:
        limit = max(whole, min(limit, WORKSPACE_BYTES // sum_bytes_per_row // whole * whole))
    rows = rounded(min(n, limit))
    bytes_per_column = rows * element_size if sum_bytes_per_row else max(rows * element_size, 4 * d)
    fits = WORKSPACE_BYTES // bytes_per_column // whole * whole
    return Blocks(rows, min(max(fits, whole), rounded(v)))


def slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
