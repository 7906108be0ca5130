"""How much of [N, V] is held at a time where a block of it has to be written down.

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
    """Blocks of R × C over [N, V], both whole tiles but where N or V is less."""

    rows: int
    columns: int


def plan(
    shape: tuple[int, int, int], element_size: int, tiles: tuple[TileConfig, ...], *, sum_bytes_a_row: int = 0
) -> Blocks:
    """Blocks for (N, D, V) whose every side is a multiple of every tile's.

    Where sums are held a row (`sum_bytes_a_row` of them), R is what the workspace has room for, and C what then fits;
    else sums of D float32 are held a column.
    """
    n, d, v = shape
    whole = max(max(x.block_m, x.block_n, x.block_k) for x in tiles)

    def rounded(count: int) -> int:
        return triton.cdiv(max(count, 1), whole) * whole

    limit = BLOCK_ROWS
    if sum_bytes_a_row:
        limit = max(whole, min(limit, WORKSPACE_BYTES // sum_bytes_a_row // whole * whole))
    rows = rounded(min(n, limit))
    bytes_a_column = rows * element_size if sum_bytes_a_row else max(rows * element_size, 4 * d)
    fits = WORKSPACE_BYTES // bytes_a_column // whole * whole
    return Blocks(rows, min(max(fits, whole), rounded(v)))


def slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
