"""The kernels of `compiled`, in numba: imported only where it is installed.

A row of a tile is taken in stages, each a loop over few arrays: of many that may overlap LLVM makes loops of scalars.
What a stage leaves for the next lies in the innermost cache.

Letters: R rows and C vocabulary entries of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from tvkd_fast.ops.tiles.numba_passes import (
    BLOCK,
    PART,
    bits,
    exponential,
    f32,
    floating,
    i32,
    largest_by_row,
    ordered,
)

SLACK = 40.0
"""As `exponentials.SLACK`: nats by which a logit may lie above what is subtracted from it."""
LARGE = float(np.exp(SLACK))
HIGHEST = f32(80.0)
"""Under float32's end, which is at 88."""
FORWARD, REVERSE, ENTROPY, P2, P_OVER_M, Q_OVER_M, OVERLAP, SCORE = range(8)
MOMENTS = 8
"""The places of the moments, and below those of the terms' factors."""
BY_P, BY_Q, W, LOG_P, BY_P2, LOG_P_OVER_M, SHARE, LOG_Q = range(8)


@njit(cache=True, fastmath={"contract"})
def sum_exponentials(z: Any, shift: Any, sums: Any, total: Any) -> None:
    """Σ e^(z − shift) of each row, where a logit counts for no more than `HIGHEST` above the shift."""
    total[:] = 0.0
    for b in range(0, z.shape[0], BLOCK):
        sums[:] = f32(0.0)
        for c in range(b, min(b + BLOCK, z.shape[0])):
            tile = z[c]
            for r in range(tile.shape[0]):
                d = tile[r] - shift[r]
                # Written so that NaN stays.
                sums[r] += exponential(HIGHEST if d > HIGHEST else d)
        for r in range(sums.shape[0]):
            total[r] += sums[r]


@njit(cache=True)
def raise_shift(tops: Any, shift: Any, subtracted: Any, total: Any) -> None:
    """Where the largest logit of a tile's parts, (parts, R) `ordered`, is far above the shift it becomes the shift."""
    for r in range(shift.shape[0]):
        top = tops[0, r]
        for p in range(1, tops.shape[0]):
            top = max(top, tops[p, r])
        new, old = floating(ordered(top)), shift[r]
        if new > old + f32(SLACK) or (old == -np.inf and new > old):
            total[r] *= np.exp(np.float64(old) - new)
            shift[r] = new
        # A row without a finite logit has nothing to subtract.
        subtracted[r] = f32(0.0) if shift[r] == -np.inf else shift[r]


@njit(cache=True, parallel=True, nogil=True)
def add_exponentials(z: Any, shift: Any, total: Any) -> None:
    rows = z.shape[1]
    # Parts of one size, so that sums are the same whatever the number of threads.
    part = max(BLOCK, PART // max(1, rows))
    parts = -(-z.shape[0] // part)
    sums, totals = np.empty((parts, rows), np.float32), np.empty((parts, rows), np.float64)
    subtracted = shift.copy()
    # Few tiles have a logit far above what came before: that is seen by the sums, and the tile taken again.
    fits = True
    for r in range(rows):
        fits &= shift[r] > -np.inf
    if fits:
        for p in prange(parts):
            sum_exponentials(z[p * part : (p + 1) * part], subtracted, sums[p], totals[p])
        for p in range(parts):
            for r in range(rows):
                fits &= not totals[p, r] > LARGE
    if not fits:
        tops = np.empty((parts, rows), np.int32)
        for p in prange(parts):
            largest_by_row(z[p * part : (p + 1) * part], tops[p])
        raise_shift(tops, shift, subtracted, total)
        for p in prange(parts):
            sum_exponentials(z[p * part : (p + 1) * part], subtracted, sums[p], totals[p])
    for p in range(parts):
        for r in range(rows):
            total[r] += totals[p, r]


@njit(cache=True, fastmath={"contract"})
def logarithm(x: Any) -> Any:
    """log x of 0 < x ≤ 1 to a unit in the last place or so, by the Cephes library's polynomial; −88 or so of 0."""
    # The exponent such that the mantissa lies in [√½, √2].
    k = (bits(x) - i32(0x3F3504F3)) >> i32(23)
    f = floating(bits(x) - (k << i32(23))) - f32(1.0)
    y = f * f
    p = f32(7.0376836292e-2)
    p = p * f + f32(-1.1514610310e-1)
    p = p * f + f32(1.1676998740e-1)
    p = p * f + f32(-1.2420140846e-1)
    p = p * f + f32(1.4249322787e-1)
    p = p * f + f32(-1.6668057665e-1)
    p = p * f + f32(2.0000714765e-1)
    p = p * f + f32(-2.4999993993e-1)
    p = p * f + f32(3.3333331174e-1)
    e = f32(k)
    return f + (p * f * y + e * f32(-2.12194440e-4) - f32(0.5) * y) + e * f32(0.693359375)


@njit(cache=True, fastmath={"contract"})
def excess(a: Any, b: Any, w: Any) -> Any:
    """a·(w + e^(−w) − 1) of w = log a/b, which is not negative; b where a is 0."""
    x = w if w < f32(1.0) else f32(1.0)
    x = -x if x > f32(-1.0) else f32(1.0)
    s = f32(2.7557319224e-7)
    s = s * x + f32(2.7557319224e-6)
    s = s * x + f32(2.4801587302e-5)
    s = s * x + f32(1.9841269841e-4)
    s = s * x + f32(1.3888888889e-3)
    s = s * x + f32(8.3333333333e-3)
    s = s * x + f32(4.1666666667e-2)
    s = s * x + f32(1.6666666667e-1)
    s = s * x + f32(0.5)
    far = (a * w if a > f32(0.0) else f32(0.0)) - a + b
    return a * (s * (x * x)) if a > f32(0.0) and abs(w) <= f32(1.0) else far


@njit(cache=True, fastmath={"contract"})
def probabilities(z: Any, maximum: Any, log_total: Any, logs: Any, p: Any) -> None:
    for r in range(z.shape[0]):
        x = (z[r] - maximum[r]) - log_total[r]
        logs[r] = x
        p[r] = exponential(x)


@njit(cache=True, fastmath={"contract"})
def ratios(log_p: Any, log_q: Any, p: Any, q: Any, w: Any) -> None:
    for r in range(w.shape[0]):
        # Written so that NaN stays.
        w[r] = f32(0.0) if p[r] + q[r] == f32(0.0) else log_q[r] - log_p[r]


@njit(cache=True, fastmath={"contract"})
def add_excess(a: Any, b: Any, w: Any, sign: Any, sums: Any) -> None:
    for r in range(sums.shape[0]):
        sums[r] += excess(a[r], b[r], sign * w[r])


@njit(cache=True, fastmath={"contract"})
def add_means(p: Any, x: Any, sums: Any) -> None:
    """Σ p·x, nothing where p is 0."""
    for r in range(sums.shape[0]):
        sums[r] += p[r] * x[r] if p[r] > f32(0.0) else f32(0.0)


@njit(cache=True, fastmath={"contract"})
def mix(w: Any, beta: Any, larger: Any, x: Any) -> None:
    """log of the larger of p and q over m, and log p/m."""
    for r in range(x.shape[0]):
        size = abs(w[r])
        share = f32(1.0) - beta if w[r] > f32(0.0) else beta
        y = -logarithm(f32(1.0) - share * (f32(1.0) - exponential(-size)))
        y = size if y > size else y
        larger[r] = y
        x[r] = y - w[r] if w[r] > f32(0.0) else y


@njit(cache=True, fastmath={"contract"})
def add_mixed(p: Any, q: Any, x: Any, beta: Any, sums: Any) -> None:
    """KL(p‖m)'s terms."""
    for r in range(sums.shape[0]):
        sums[r] += excess(p[r], (f32(1.0) - beta) * p[r] + beta * q[r], x[r])


@njit(cache=True, fastmath={"contract"})
def add_teacher_mixed(p: Any, q: Any, larger: Any, w: Any, beta: Any, sums: Any) -> None:
    """KL(q‖m)'s."""
    for r in range(sums.shape[0]):
        y = larger[r] if w[r] > f32(0.0) else larger[r] + w[r]
        sums[r] += excess(q[r], (f32(1.0) - beta) * p[r] + beta * q[r], y)


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def share_of_teacher(p: Any, q: Any, beta: Any, out: Any) -> None:
    """q/m."""
    for r in range(out.shape[0]):
        out[r] = q[r] / ((f32(1.0) - beta) * p[r] + beta * q[r]) if q[r] > f32(0.0) else f32(0.0)


@njit(cache=True, fastmath={"contract"})
def add_products(a: Any, b: Any, sums: Any) -> None:
    for r in range(sums.shape[0]):
        sums[r] += a[r] * b[r]


@njit(cache=True, fastmath={"contract"})
def add_weighted(p: Any, x: Any, factor: Any, out: Any) -> None:
    """out += p·x·factor, nothing where p is 0."""
    for r in range(out.shape[0]):
        out[r] += p[r] * (x[r] * factor[r]) if p[r] > f32(0.0) else f32(0.0)


@njit(cache=True, fastmath={"contract"})
def put_both(p: Any, by_p: Any, q: Any, by_q: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = p[r] * by_p[r] + q[r] * by_q[r]


@njit(cache=True, fastmath={"contract"})
def put(p: Any, factor: Any, out: Any) -> None:
    for r in range(out.shape[0]):
        out[r] = p[r] * factor[r]


@njit(cache=True, fastmath={"contract"})
def walk(z: Any, u: Any, sums: Any, factors: Any, beta: Any, moments: Any, terms: Any, wants: Any, found: Any) -> None:
    """A part of a tile: `visit` has the arguments."""
    with_teacher, write, late = wants[0], wants[1], wants[2]
    needs_mix = moments[P_OVER_M] or moments[Q_OVER_M] or terms[LOG_P_OVER_M]
    needs_share = moments[OVERLAP] or terms[SHARE]
    needs_w = needs_mix or moments[FORWARD] or moments[REVERSE] or terms[W]
    rows = z.shape[1]
    log_p, log_q = np.empty(rows, np.float32), np.empty(rows, np.float32)
    p, q, w = np.empty(rows, np.float32), np.zeros(rows, np.float32), np.empty(rows, np.float32)
    larger, x, share = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    block = np.empty((found.shape[0], rows), np.float32)
    found[:] = 0.0
    for b in range(0, z.shape[0], BLOCK):
        block[:] = f32(0.0)
        for c in range(b, min(b + BLOCK, z.shape[0])):
            probabilities(z[c], sums[0], sums[1], log_p, p)
            if with_teacher:
                probabilities(u[c], sums[2], sums[3], log_q, q)
            if needs_w:
                ratios(log_p, log_q, p, q, w)
            if needs_mix:
                mix(w, beta, larger, x)
            if needs_share:
                share_of_teacher(p, q, beta, share)
            if moments[FORWARD]:
                add_excess(q, p, w, f32(1.0), block[FORWARD])
            if moments[REVERSE]:
                add_excess(p, q, w, f32(-1.0), block[REVERSE])
            if moments[ENTROPY]:
                add_means(p, log_p, block[ENTROPY])
            if moments[P2]:
                add_products(p, p, block[P2])
            if moments[P_OVER_M]:
                add_mixed(p, q, x, beta, block[P_OVER_M])
            if moments[Q_OVER_M]:
                add_teacher_mixed(p, q, larger, w, beta, block[Q_OVER_M])
            if moments[OVERLAP]:
                add_products(p, share, block[OVERLAP])
            if moments[SCORE]:
                add_means(p, log_q, block[SCORE])
            if write:
                out = z[c]
                if terms[BY_P] and terms[BY_Q]:
                    put_both(p, factors[BY_P], q, factors[BY_Q], out)
                elif terms[BY_P]:
                    put(p, factors[BY_P], out)
                elif terms[BY_Q]:
                    put(q, factors[BY_Q], out)
                else:
                    out[:] = f32(0.0)
                if terms[W]:
                    add_weighted(p, w, factors[W], out)
                if terms[LOG_P]:
                    add_weighted(p, log_p, factors[LOG_P], out)
                if terms[BY_P2]:
                    add_weighted(p, p, factors[BY_P2], out)
                if terms[LOG_P_OVER_M]:
                    add_weighted(p, x, factors[LOG_P_OVER_M], out)
                if terms[LOG_Q]:
                    add_weighted(p, log_q, factors[LOG_Q], out)
                if terms[SHARE]:
                    add_weighted(p, share, factors[SHARE], out)
            if late:
                u[c, :] = p
        for k in range(found.shape[0]):
            if moments[k]:
                for r in range(rows):
                    found[k, r] += block[k, r]
    # What was summed is Σ p log p.
    found[ENTROPY] *= -1.0


@njit(cache=True, parallel=True, nogil=True)
def visit(
    z: Any, u: Any, sums: Any, factors: Any, beta: float, moments: Any, terms: Any, wants: Any, found: Any
) -> None:
    """Moments into `found` (8, R) float64; where wants say so, z becomes the gradient of `factors` (8, R), and u p.

    `sums` (4, R) are the fields of `RowSums`; `moments` and `terms` (8,) bool say which are asked for.
    """
    rows = z.shape[1]
    # Parts of one size, so that sums are the same whatever the number of threads.
    part = max(BLOCK, PART // max(1, rows))
    parts = -(-z.shape[0] // part)
    totals = np.empty((parts, found.shape[0], rows), np.float64)
    for i in prange(parts):
        here = slice(i * part, (i + 1) * part)
        walk(z[here], u[here], sums, factors, f32(beta), moments, terms, wants, totals[i])
    for i in range(parts):
        found += totals[i]


def compile_all() -> None:
    """Compile every pass now, so that an error does not come in the middle of a call."""
    z, one = np.zeros((1, BLOCK), np.float32), np.zeros(BLOCK, np.float32)
    add_exponentials(z, one, np.zeros(BLOCK))
    asked = np.zeros(MOMENTS, np.bool_)
    sums, factors = np.zeros((4, BLOCK), np.float32), np.zeros((MOMENTS, BLOCK), np.float32)
    visit(z, z.copy(), sums, factors, 0.5, asked, asked, np.zeros(3, np.bool_), np.zeros((MOMENTS, BLOCK)))
