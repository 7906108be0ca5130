"""One pass over a tile of logits on a CPU, compiled by numba where it is installed: sums and marks together.

The same steps in torch are some ten passes over the tile. Numba brings its own compiler; without it, or where it cannot
compile, torch's passes are taken, and the last bits of a result differ.

Letters: R rows and C columns of a tile.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 32
"""Columns that are summed before they are looked at: a block without an entry is passed over."""

_log = logging.getLogger("tvkd_fast")
Found = tuple[Tensor, Tensor, Tensor]


def native(z: Tensor) -> Callable[..., Found] | None:
    """`mark_tile` for tiles like z, or None."""
    return _compiled() if z.device.type == "cpu" and z.dtype == torch.float32 else None


@lru_cache
def _compiled() -> Callable[..., Found] | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        mark, gather = _kernels()
    except Exception as why:  # whatever keeps numba from compiling, torch's passes compute the same
        _log.warning("numba is installed and cannot compile here (%s): sparse gradients are marked in torch", why)
        return None

    def mark_tile(
        z: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, counts: Tensor, eps: float, cap: int, spare: Tensor
    ) -> Found:
        """Rows, columns and e^(z − maximum) of entries above ε of the running total; z [R, C] is overwritten.

        `maximum` and `total` (R,) are brought up to this tile, `counts` (R,) grows by what was found; rows that have
        more than `cap` are not looked at any longer, nor is the label's column. `spare` has room for R·C int32.
        """
        columns = spare.view(torch.int32)[: z.numel()].view(z.shape)
        found = torch.empty(z.shape[0], dtype=torch.int64)
        _set_threads()
        arrays = (z, z.amax(1), labels, maximum, total, counts, found, columns)
        mark(*(x.numpy() for x in arrays), eps, cap)
        counts += found
        ends = found.cumsum(0)
        size = int(ends[-1])
        rows, where = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.int64)
        e = torch.empty(size)
        gather(*(x.numpy() for x in (z, columns, ends, rows, where, e)))
        return rows, where, e

    return mark_tile


def _set_threads() -> None:
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _kernels() -> tuple[Any, Any]:
    import numpy as np
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.extending import intrinsic

    f32, i32 = np.float32, np.int32

    @intrinsic
    def bits(typing_context: Any, x: Any) -> Any:
        return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))

    @intrinsic
    def floating(typing_context: Any, x: Any) -> Any:
        return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())

    # Adding 1.5·2²³ leaves the nearest integer in a float's last bits; reassociation would undo it, and is not allowed.
    @njit(fastmath={"contract"})
    def exponential(d: Any) -> Any:
        """e^d of d ≤ 0 to a unit in the last place or so: 2^k·e^f, f by the Cephes library's polynomial."""
        shifted = d * f32(1.4426950408889634) + f32(12582912.0)
        k = shifted - f32(12582912.0)
        f = d - k * f32(0.693359375)
        f = f - k * f32(-2.12194440054690583e-4)
        p = f32(1.9875691500e-4)
        p = p * f + f32(1.3981999507e-3)
        p = p * f + f32(8.3334519073e-3)
        p = p * f + f32(4.1665795894e-2)
        p = p * f + f32(1.6666665459e-1)
        p = p * f + f32(5.0000001201e-1)
        p = p * f * f + f + f32(1.0)
        e = p * floating((bits(shifted) << i32(23)) + i32(0x3F800000))
        # Written so that NaN is not less.
        return f32(0.0) if d < f32(-87.0) else e

    @njit(fastmath={"contract", "reassoc", "nsz"})
    def sum_blocks(row: Any, shift: Any, sums: Any) -> None:
        for b in range(sums.shape[0]):
            s = f32(0.0)
            for c in range(b * BLOCK, b * BLOCK + BLOCK):
                s += exponential(row[c] - shift)
            sums[b] = s

    @njit(parallel=True, nogil=True, fastmath={"contract"})
    def mark(
        z: Any,
        peaks: Any,
        labels: Any,
        maximum: Any,
        total: Any,
        counts: Any,
        found: Any,
        columns: Any,
        eps: float,
        cap: int,
    ) -> None:
        wide = z.shape[1] // BLOCK
        for r in prange(z.shape[0]):
            row = z[r]
            top = max(maximum[r], peaks[r])
            shift = f32(0.0) if top == -np.inf else top
            sums = np.empty(wide + 1, np.float32)
            sum_blocks(row, shift, sums[:wide])
            rest = f32(0.0)
            for c in range(wide * BLOCK, z.shape[1]):
                rest += exponential(row[c] - shift)
            sums[wide] = rest
            new = 0.0
            for b in range(wide + 1):
                new += sums[b]
            new += total[r] * np.exp(np.float64(maximum[r]) - shift)
            maximum[r], total[r] = top, new
            # A hair below ε: what rounds over the edge here is pruned by the finished sum.
            limit = new * eps * (1.0 - 1e-5)
            edge = f32(shift + np.log(limit))
            n = 0
            if counts[r] <= cap:
                for b in range(wide + 1):
                    if sums[b] > limit:
                        for c in range(b * BLOCK, min(b * BLOCK + BLOCK, z.shape[1])):
                            if row[c] >= edge and c != labels[r]:
                                # n ≤ c: what is overwritten was read before.
                                e = exponential(row[c] - shift)
                                row[n] = e
                                columns[r, n] = c
                                n += 1
            found[r] = n

    @njit(parallel=True, nogil=True)
    def gather(z: Any, columns: Any, ends: Any, rows: Any, where: Any, e: Any) -> None:
        for r in prange(z.shape[0]):
            start = ends[r - 1] if r > 0 else 0
            for i in range(start, ends[r]):
                rows[i], where[i], e[i] = r, columns[r, i - start], z[r, i - start]

    # Compiled here, so that what fails fails before it is needed.
    z, one = np.zeros((1, BLOCK), np.float32), np.zeros(1, np.float32)
    integers = np.zeros(1, np.int64)
    mark(z, one, integers, one.copy(), one.copy(), integers, integers.copy(), np.zeros((1, BLOCK), np.int32), 0.5, 1)
    gather(z, np.zeros((1, BLOCK), np.int32), integers, integers, integers, one)
    return mark, gather
