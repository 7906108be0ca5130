"""The kernels of `native`, in numba: imported only where it is installed.

What was compiled stays on disk (numba's cache), since compiling takes seconds.

Letters: R rows and C columns of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

f32, i32 = np.float32, np.int32
BLOCK = 32
"""Columns that are summed before they are looked at: a block without an entry is passed over."""
PART = 131_072
"""Entries of a tile [C, R] that one thread takes at a time, or hardly more."""


@intrinsic
def bits(typing_context: Any, x: Any) -> Any:
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def floating(typing_context: Any, x: Any) -> Any:
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


# Adding 1.5·2²³ leaves the nearest integer in a float's last bits; reassociation would undo it, and is not allowed.
@njit(cache=True, fastmath={"contract"})
def exponential(d: Any) -> Any:
    """e^d of d ≤ 40 to a unit in the last place or so: 2^k·e^f, f by the Cephes library's polynomial."""
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
    p = p * f + f32(1.0)
    p = p * f + f32(1.0)
    # e^f lies in [√½, √2]: k goes straight into its exponent.
    e = floating(bits(p) + (bits(shifted) << i32(23)))
    # Written so that NaN is not less.
    return f32(0.0) if d < f32(-87.0) else e


@njit(cache=True)
def ordered(x: Any) -> Any:
    """A float's bits as an integer that is as large as the float is among floats; its own inverse, but for the type."""
    return x ^ ((x >> i32(31)) & i32(0x7FFFFFFF))


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def sum_blocks(row: Any, shift: Any, sums: Any) -> None:
    for b in range(sums.shape[0]):
        s = f32(0.0)
        for c in range(b * BLOCK, b * BLOCK + BLOCK):
            s += exponential(row[c] - shift)
        sums[b] = s


# Of integers: LLVM makes a loop of scalars of a largest float. A NaN is the largest or the smallest there is, and the
# sum that follows is NaN either way.
@njit(cache=True)
def largest(row: Any, so_far: Any) -> Any:
    numbers, top = row.view(np.int32), ordered(bits(so_far))
    for c in range(numbers.shape[0]):
        top = max(top, ordered(numbers[c]))
    return floating(ordered(top))


@njit(cache=True, fastmath={"contract"})
def advance(row: Any, maximum: Any, total: Any, sums: Any) -> Any:
    """The running maximum, what is to be subtracted, the running total; `sums` gets the blocks' sums."""
    top = largest(row, maximum)
    # A row whose logits so far are all -inf has no finite maximum to subtract.
    shift = f32(0.0) if top == -np.inf else top
    wide = row.shape[0] // BLOCK
    sum_blocks(row, shift, sums[:wide])
    rest = f32(0.0)
    for c in range(wide * BLOCK, row.shape[0]):
        rest += exponential(row[c] - shift)
    sums[wide] = rest
    new = 0.0
    for b in range(wide + 1):
        new += sums[b]
    return top, shift, new + total * np.exp(np.float64(maximum) - shift)


@njit(cache=True, parallel=True, nogil=True)
def add(z: Any, maximum: Any, total: Any) -> None:
    for r in prange(z.shape[0]):
        sums = np.empty(z.shape[1] // BLOCK + 1, np.float32)
        top, _, new = advance(z[r], maximum[r], total[r], sums)
        maximum[r], total[r] = top, new


@njit(cache=True)
def largest_by_row(z: Any, top: Any) -> None:
    """Of z [C, R] the largest logit of every row, (R,), as `ordered` integers."""
    top[:] = ordered(bits(f32(-np.inf)))
    numbers = z.view(np.int32)
    for c in range(z.shape[0]):
        tile = numbers[c]
        for r in range(tile.shape[0]):
            top[r] = max(top[r], ordered(tile[r]))


@njit(cache=True, fastmath={"contract"})
def keep_exponentials(z: Any, shift: Any, sums: Any, total: Any) -> None:
    """z [C, R] becomes e^(z − shift), and total (R,) its sums over C; sums (R,) is overwritten."""
    total[:] = 0.0
    for b in range(0, z.shape[0], BLOCK):
        sums[:] = f32(0.0)
        for c in range(b, min(b + BLOCK, z.shape[0])):
            tile = z[c]
            for r in range(tile.shape[0]):
                e = exponential(tile[r] - shift[r])
                tile[r] = e
                sums[r] += e
        for r in range(sums.shape[0]):
            total[r] += sums[r]


@njit(cache=True, parallel=True, nogil=True)
def exponentiate(z: Any, shift: Any, total: Any, slack: float) -> None:
    # Parts of one size, so that sums are the same whatever the number of threads.
    rows = z.shape[1]
    part = max(BLOCK, PART // max(1, rows))
    parts = -(-z.shape[0] // part)
    tops, sums = np.empty((parts, rows), np.int32), np.empty((parts, rows), np.float32)
    totals = np.empty((parts, rows), np.float64)
    for p in prange(parts):
        largest_by_row(z[p * part : (p + 1) * part], tops[p])
    subtracted = np.empty(rows, np.float32)
    for r in range(rows):
        top = tops[0, r]
        for p in range(1, parts):
            top = max(top, tops[p, r])
        new, old = floating(ordered(top)), shift[r]
        if new > old + f32(slack) or (old == -np.inf and new > old):
            total[r] *= np.exp(np.float64(old) - new)
            shift[r] = new
        # A row without a finite logit has nothing to subtract.
        subtracted[r] = f32(0.0) if shift[r] == -np.inf else shift[r]
    for p in prange(parts):
        keep_exponentials(z[p * part : (p + 1) * part], subtracted, sums[p], totals[p])
    for p in range(parts):
        for r in range(rows):
            total[r] += totals[p, r]


@njit(cache=True, fastmath={"contract"})
def exponentials(row: Any, maximum: Any, log_total: Any) -> None:
    # In place: of two arrays that may overlap LLVM makes a scalar loop.
    for c in range(row.shape[0]):
        row[c] = exponential((row[c] - maximum) - log_total)


@njit(cache=True, parallel=True, nogil=True)
def softmax(z: Any, maximum: Any, log_total: Any) -> None:
    for r in prange(z.shape[0]):
        exponentials(z[r], maximum[r], log_total[r])


@njit(cache=True, parallel=True, nogil=True)
def softmax_of(z: Any, maximum: Any, log_total: Any, out: Any) -> None:
    for r in prange(z.shape[0]):
        out[r, :] = z[r]
        exponentials(out[r], maximum[r], log_total[r])


@njit(cache=True)
def starts_of(lengths: Any) -> Any:
    starts = np.empty(lengths.shape[0] + 1, np.int64)
    starts[0] = 0
    for i in range(lengths.shape[0]):
        starts[i + 1] = starts[i] + lengths[i]
    return starts


@njit(cache=True, parallel=True, nogil=True, fastmath={"contract"})
def select(
    z: Any, labels: Any, maximum: Any, total: Any, counts: Any, columns: Any, eps: float, cap: int
) -> tuple[Any, Any, Any]:
    found = np.empty(z.shape[0], np.int64)
    for r in prange(z.shape[0]):
        row = z[r]
        sums = np.empty(z.shape[1] // BLOCK + 1, np.float32)
        top, shift, new = advance(row, maximum[r], total[r], sums)
        maximum[r], total[r] = top, new
        # A hair below ε: what rounds over the edge here is pruned by the finished sum.
        limit = new * eps * (1.0 - 1e-5)
        edge = f32(shift + np.log(limit))
        n = 0
        if counts[r] <= cap:
            for b in range(sums.shape[0]):
                if sums[b] > limit:
                    for c in range(b * BLOCK, min(b * BLOCK + BLOCK, z.shape[1])):
                        if row[c] >= edge and c != labels[r]:
                            # n ≤ c: what is overwritten was read before.
                            e = exponential(row[c] - shift)
                            row[n] = e
                            columns[r, n] = c
                            n += 1
        found[r] = n
        counts[r] += n
    starts = starts_of(found)
    where, e = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    for r in prange(z.shape[0]):
        where[starts[r] : starts[r + 1]] = columns[r, : found[r]]
        e[starts[r] : starts[r + 1]] = z[r, : found[r]]
    return found, where, e


@njit(cache=True, parallel=True, nogil=True)
def rescale(
    found: Any, columns: Any, e: Any, scale: Any, dense: Any, eps: Any, place: Any, first: int, tail: Any
) -> tuple[Any, Any, Any]:
    before, kept = starts_of(found), np.zeros_like(found)
    for r in prange(found.shape[0]):
        if not dense[r]:
            for i in range(before[r], before[r + 1]):
                kept[r] += e[i] * scale[r] >= eps
    after = starts_of(kept)
    rows, where = np.empty(after[-1], np.int32), np.empty(after[-1], np.int32)
    p = np.empty(after[-1], np.float32)
    for r in prange(found.shape[0]):
        n, left = after[r], f32(0.0)
        if not dense[r]:
            for i in range(before[r], before[r + 1]):
                x = e[i] * scale[r]
                if x >= eps:
                    rows[n], where[n], p[n] = place[r], first + columns[i], x
                    left += x
                    n += 1
        tail[r] -= left
    return rows, where, p


@njit(cache=True, nogil=True)
def by_column(
    columns: Any,
    rows: Any,
    p: Any,
    even: Any,
    c: Any,
    own_columns: Any,
    own_rows: Any,
    own: Any,
    first: int,
    count: int,
) -> tuple[Any, Any, Any]:
    edges = np.zeros(count + 1, np.int32)
    for i in range(columns.shape[0]):
        if first <= columns[i] < first + count:
            edges[columns[i] - first + 1] += 1
    for i in range(own_columns.shape[0]):
        edges[own_columns[i] - first + 1] += 1
    for i in range(count):
        edges[i + 1] += edges[i]
    free = edges[:-1].copy()
    sorted_rows, entries = np.empty(edges[-1], np.int32), np.empty(edges[-1], np.float32)
    for i in range(columns.shape[0]):
        if first <= columns[i] < first + count:
            n, r = free[columns[i] - first], rows[i]
            free[columns[i] - first] += 1
            sorted_rows[n], entries[n] = r, even[r] - c[r] * p[i]
    for i in range(own_columns.shape[0]):
        n = free[own_columns[i] - first]
        free[own_columns[i] - first] += 1
        sorted_rows[n], entries[n] = own_rows[i], own[i]
    return sorted_rows, entries, edges


@njit(cache=True, nogil=True, fastmath={"contract"})
def accumulate(index: Any, factors: Any, rows: Any, total: Any) -> None:
    k, stop = 0, index.shape[0]
    # Four rows at a time, so that the sum is read and written a quarter as often.
    while k + 4 <= stop:
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        r0, r1, r2, r3 = rows[index[k]], rows[index[k + 1]], rows[index[k + 2]], rows[index[k + 3]]
        for d in range(total.shape[0]):
            total[d] += (f0 * r0[d] + f1 * r1[d]) + (f2 * r2[d] + f3 * r3[d])
        k += 4
    while k < stop:
        f0, r0 = factors[k], rows[index[k]]
        for d in range(total.shape[0]):
            total[d] += f0 * r0[d]
        k += 1


@njit(cache=True, parallel=True, nogil=True)
def gather(index: Any, factors: Any, edges: Any, rows: Any, base: Any, out: Any) -> None:
    for i in prange(out.shape[0]):
        out[i, :] = base
        accumulate(index[edges[i] : edges[i + 1]], factors[edges[i] : edges[i + 1]], rows, out[i])


def compile_all() -> None:
    """Compile every pass now, so that an error does not come in the middle of a call."""
    z, one, small = np.zeros((1, BLOCK), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    integers = np.zeros(1, np.int64)
    add(z, one, one.copy())
    softmax(z, one, one)
    softmax_of(z, one, one, z.copy())
    exponentiate(z, np.zeros(BLOCK, np.float32), np.zeros(BLOCK), 40.0)
    found, columns, e = select(z, integers, one, one.copy(), integers, np.zeros((1, BLOCK), np.int32), 0.5, 1)
    rescale(found, columns, e, one, np.zeros(1, np.bool_), 0.5, integers, 0, one.copy())
    by_column(small, small, one, one, one, small, small, one, 0, 1)
    gather(small, one, np.zeros(2, np.int32), z, z[0], z.copy())
