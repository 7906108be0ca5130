"""The kernels of `one_walk`, in numba: imported only where it is installed.

Letters: R rows and C vocabulary entries of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from tvkd_fast.ops.tiles.numba_passes import BLOCK, exponential, f32, i32, largest, starts_of

STUDENT, TEACHER = 0, 1
SUMMED = 256
"""Entries that are summed in float32 before their sum is added in float64."""


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def add_block(z: Any, u: Any, top: Any, other_top: Any, sums: Any) -> None:
    """A block's Σ e^z, Σ e^u, Σ e^z·d and Σ e^u·d, d = u − z, each logit less its row's maximum."""
    s, t, by_s, by_t = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
    for c in range(z.shape[0]):
        x, y = z[c] - top, u[c] - other_top
        a, b, d = exponential(x), exponential(y), y - x
        s += a
        t += b
        by_s += a * d
        by_t += b * d
    sums[0], sums[1], sums[2], sums[3] = s, t, by_s, by_t


@njit(cache=True)
def advance(z: Any, u: Any, maximum: Any, total: Any) -> None:
    """Bring a row's maxima (2,) and totals (4,) up to a tile's row.

    Where a maximum moves by a, Σ e^z·d becomes e^a·(Σ e^z·d + (c − a)·Σ e^z), c the teacher's, and Σ e^u·d likewise.
    """
    top, other_top = largest(z, maximum[STUDENT]), largest(u, maximum[TEACHER])
    if total[0] > 0.0 and (top != maximum[STUDENT] or other_top != maximum[TEACHER]):
        a = np.float64(maximum[STUDENT]) - top
        c = np.float64(maximum[TEACHER]) - other_top
        total[2] = (total[2] + (c - a) * total[0]) * np.exp(a)
        total[3] = (total[3] + (c - a) * total[1]) * np.exp(c)
        total[0] *= np.exp(a)
        total[1] *= np.exp(c)
    maximum[STUDENT], maximum[TEACHER] = top, other_top
    sums = np.empty(4, np.float32)
    for b in range(0, z.shape[0], SUMMED):
        add_block(z[b : b + SUMMED], u[b : b + SUMMED], top, other_top, sums)
        for k in range(4):
            total[k] += sums[k]


@njit(cache=True, fastmath={"contract", "reassoc"})
def above(z: Any, u: Any, edge: Any, other_edge: Any) -> Any:
    """How many entries lie above an edge of their model's."""
    n = i32(0)
    for c in range(z.shape[0]):
        n += i32(z[c] >= edge) | i32(u[c] >= other_edge)
    return n


@njit(cache=True, parallel=True, nogil=True)
def select(
    z: Any, u: Any, labels: Any, maximum: Any, total: Any, counts: Any, columns: Any, eps: float, cap: int
) -> tuple[Any, Any, Any, Any]:
    found = np.empty(z.shape[0], np.int64)
    for r in prange(z.shape[0]):
        advance(z[r], u[r], maximum[r], total[r])
        # A hair below ε: what rounds over the edge here is pruned by the finished sums.
        edge = f32(maximum[r, STUDENT] + np.log(total[r, 0] * eps * (1.0 - 1e-5)))
        other_edge = f32(maximum[r, TEACHER] + np.log(total[r, 1] * eps * (1.0 - 1e-5)))
        n = 0
        if counts[r] <= cap:
            for b in range(0, z.shape[1], BLOCK):
                stop = min(b + BLOCK, z.shape[1])
                if above(z[r, b:stop], u[r, b:stop], edge, other_edge):
                    for c in range(b, stop):
                        if (z[r, c] >= edge or u[r, c] >= other_edge) and c != labels[r]:
                            # n ≤ c: what is overwritten was read before.
                            z[r, n], u[r, n], columns[r, n] = z[r, c], u[r, c], c
                            n += 1
        found[r] = n
        counts[r] += n
    starts = starts_of(found)
    where, own = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    other = np.empty(starts[-1], np.float32)
    for r in prange(z.shape[0]):
        where[starts[r] : starts[r + 1]] = columns[r, : found[r]]
        own[starts[r] : starts[r + 1]] = z[r, : found[r]]
        other[starts[r] : starts[r + 1]] = u[r, : found[r]]
    return found, where, own, other


@njit(cache=True, parallel=True, nogil=True)
def prune(
    found: Any,
    columns: Any,
    z: Any,
    u: Any,
    sums: Any,
    dense: Any,
    edge: Any,
    place: Any,
    first: int,
    tail: Any,
) -> tuple[Any, Any, Any, Any]:
    before, kept = starts_of(found), np.zeros_like(found)
    for r in prange(found.shape[0]):
        if not dense[r]:
            for i in range(before[r], before[r + 1]):
                x, y = (z[i] - sums[0, r]) - sums[1, r], (u[i] - sums[2, r]) - sums[3, r]
                kept[r] += x >= edge or y >= edge
    after = starts_of(kept)
    rows, where = np.empty(after[-1], np.int32), np.empty(after[-1], np.int32)
    log_p, log_q = np.empty(after[-1], np.float32), np.empty(after[-1], np.float32)
    for r in prange(found.shape[0]):
        n = after[r]
        if not dense[r]:
            for i in range(before[r], before[r + 1]):
                x, y = (z[i] - sums[0, r]) - sums[1, r], (u[i] - sums[2, r]) - sums[3, r]
                if x >= edge or y >= edge:
                    rows[n], where[n], log_p[n], log_q[n] = place[r], first + columns[i], x, y
                    tail[STUDENT, r] -= exponential(x)
                    tail[TEACHER, r] -= exponential(y)
                    n += 1
    return rows, where, log_p, log_q


@njit(cache=True, parallel=True, nogil=True, fastmath={"contract"})
def differentiate(rows: Any, log_p: Any, log_q: Any, factors: Any, out: Any) -> None:
    """p·(factors[0] + factors[2]·log q/p) + q·factors[1] of each entry, factors (3, N) of its row."""
    for i in prange(rows.shape[0]):
        r = rows[i]
        w = log_q[i] - log_p[i]
        out[i] = exponential(log_p[i]) * (factors[0, r] + factors[2, r] * w) + exponential(log_q[i]) * factors[1, r]


def compile_all() -> None:
    """Compile every pass now, so that an error does not come in the middle of a call."""
    z, one, integers = np.zeros((1, BLOCK), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64)
    columns = np.zeros((1, BLOCK), np.int32)
    arguments = (integers, np.zeros((1, 2), np.float32), np.zeros((1, 4)), integers.copy(), columns, 0.5, 1)
    found, where, own, other = select(z, z.copy(), *arguments)
    sums, dense = np.zeros((4, 1), np.float32), np.zeros(1, np.bool_)
    rows, _, log_p, log_q = prune(found, where, own, other, sums, dense, f32(-1.0), integers, 0, np.zeros((2, 1)))
    differentiate(rows, log_p, log_q, np.zeros((3, 1), np.float32), one[:0])
