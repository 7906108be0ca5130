"""The size of the blocks of [N, V] that are written to memory, and the memory that they may take.

Letters: N tokens, D hidden, V vocabulary, R rows and C vocabulary columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import triton
from torch import Tensor

from tvkd_fast.kernels.configs import TileConfig

WORKSPACE_BYTES = 32 * 2**20
"""The least that a block and its float32 sums may take; all that they take in the interpreter."""
MOST_BYTES = 2**30
DEVICE_SHARE = 64
"""A device's memory over its workspace."""
BLOCK_ROWS = 8192
"""Rows that are taken at once, and more where the workspace still has `LEAST_COLUMNS` of them."""
LEAST_COLUMNS = 2048

Result = TypeVar("Result")


def workspace_bytes(on: Tensor) -> int:
    """A 64th of the memory of a tensor's device, from 32 MiB to 1 GiB.

    Of all its memory, and not of what is free: blocks of one size leave the same last digits in every run.
    """
    return _device_workspace(on.get_device()) if on.is_cuda else WORKSPACE_BYTES


@lru_cache
def _device_workspace(device: int) -> int:
    share: int = torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE
    return max(WORKSPACE_BYTES, min(share // 2**20 * 2**20, MOST_BYTES))


def in_workspace(on: Tensor, run: Callable[[int], Result]) -> Result:
    """`run` in the device's workspace, or in the least one where the device has no room for that.

    Raises torch.OutOfMemoryError where it has no room for the least either.
    """
    most = workspace_bytes(on)
    try:
        return run(most)
    except torch.OutOfMemoryError:
        if most <= WORKSPACE_BYTES:
            raise
    try:
        return run(WORKSPACE_BYTES)
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"The head's blocks take {WORKSPACE_BYTES // 2**20} MiB at least beside its gradients: shorten the "
            "micro-batch (--tokens_per_micro_batch), or keep optimizer states elsewhere (--parallel.cpu_offload)"
        )
        raise


@dataclass(frozen=True)
class Blocks:
    """Blocks of R × C over [N, V], both whole tiles unless N or V is smaller."""

    rows: int
    columns: int


def plan(
    shape: tuple[int, int, int],
    element_size: int,
    tiles: tuple[TileConfig, ...],
    *,
    budget: int,
    row_sums: int = 0,
    column_sums: int = 0,
    always: bool = False,
) -> Blocks:
    """Blocks for (N, D, V), each side a multiple of every tile's, that with their sums fit a budget of bytes.

    Args:
        row_sums: bytes of sums that each row of a block holds.
        column_sums: bytes of sums that each column of it holds, where rows make several blocks, or `always`.
    """
    n, _, v = shape
    whole = max(max(x.block_m, x.block_n, x.block_k) for x in tiles)

    def rounded(count: int) -> int:
        return triton.cdiv(max(count, 1), whole) * whole

    limit = max(BLOCK_ROWS, budget // (LEAST_COLUMNS * element_size) // whole * whole)
    if row_sums:
        limit = max(whole, min(limit, budget // 2 // row_sums // whole * whole))
    rows = rounded(min(n, limit))
    bytes_per_column = rows * element_size + (column_sums if always or rows < n else 0)
    fits = (budget - rows * row_sums) // bytes_per_column // whole * whole
    columns = min(max(fits, whole), rounded(v))
    # Of one size as nearly as tiles allow: a remainder would leave most of a chip idle.
    return Blocks(rows, rounded(triton.cdiv(v, triton.cdiv(v, columns))))


def slices(total: int, size: int, *, start: int = 0) -> Iterator[slice]:
    for first in range(start, total, size):
        yield slice(first, min(first + size, total))
