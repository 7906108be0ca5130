"""Statistics and, in the same pass, dlogp/dh of each label: a frozen head's forward *and* backward.

Letters: N tokens, D hidden, V vocabulary, R rows and C columns of a block, T column tiles of it.

Where only hidden wants a gradient, the gradient's direction does not depend on what comes from upstream:
dlogp_t/dh_t = s·(J_y w_y − Σ_j p_j J_j w_j). Like attention's output it is a mean of rows under a softmax, so it can be
summed while the softmax still grows, and the backward has only to multiply by the upstream gradient: two products in
all, where recomputed logits make three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.blocks import in_workspace, plan, slices
from tvkd_fast.kernels.configs import UNTILED, TileConfig, precision
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import exp, grouped_tile, logits_tile, without_end
from tvkd_fast.kernels.products import product
from tvkd_fast.kernels.records import Head, HeadSums

# ln 2 in two parts (Cody and Waite): 355/512 has 9 bits, so k·LN2_HIGH is exact for |k| < 2¹⁵ and z − k·ln 2 keeps the
# digits of z.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440054690583e-4)

RESCALE_ROWS = 16
DHIDDEN_ROWS, DHIDDEN_COLUMNS = 4, 512


@triton.jit
def exponentials_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    held_exponents_ptr,
    exponentials_ptr,
    exponents_ptr,
    totals_ptr,
    target_ptr,
    R,
    C,
    D,
    hidden_stride,
    weight_stride,
    exponentials_stride,
    first_column,
    ignore_index,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile; one of ignored rows costs nothing.
    m, n = grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP)
    row, column = m * BLOCK_M, n * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    label = tl.load(labels_ptr + rows, mask=rows < R, other=ignore_index)
    if tl.max((label != ignore_index).to(tl.int32), 0) == 0:
        return
    # 2. Its logits, and z at the label.
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, row, column, R, C, D, hidden_stride, weight_stride, logit_scale, softcap,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    local = tl.where((label >= first_column) & (label < first_column + C), label - first_column, -1).to(tl.int32)
    here = (local >= column) & (local < column + BLOCK_N)
    own = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if tl.max(here.to(tl.int32), 0) > 0:
        at_label = columns[None, :] == local[:, None]
        own = tl.where(here, tl.sum(tl.where(at_label, z, 0.0), 1), own)
        tl.store(target_ptr + rows, own, mask=here & (rows < R))
        # The label's term is added at the end: p_y − 1 of a peaked softmax must not be a difference of rounded numbers.
        z = tl.where(at_label, float("-inf"), z)
    # 3. The exponent k of each row, near its largest logit over ln 2.
    z = without_end(z, column, C, BLOCK_N)
    top = tl.maximum(tl.max(z, 1), own)
    # Whole steps, and the older exponent where it still serves: neighbours then mostly agree and need no rescaling.
    k = tl.floor(top * (1.4426950408889634 / STEP) + 0.5) * STEP
    k = tl.maximum(k, tl.load(held_exponents_ptr + rows, mask=rows < R, other=0.0))
    # 4. Exponentials 2^(z·log₂e − k), and their sum in float32, before they are rounded.
    shift = tl.where(k == float("-inf"), 0.0, k)
    high, low = shift * LN2_HIGH, shift * LN2_LOW
    e = exp(z - high[:, None] - low[:, None])
    place = n.to(tl.int64) * R + rows
    tl.store(exponents_ptr + place, k, mask=rows < R)
    tl.store(totals_ptr + place, tl.sum(e, 1), mask=rows < R)
    # 5. Times J = dz/da into the block that the product reads.
    if HAS_SOFTCAP:
        capped = tl.maximum(z, -softcap) / softcap
        e *= 1.0 - capped * capped
    tl.store(exponentials_ptr + rows.to(tl.int64)[:, None] * exponentials_stride + columns[None, :], e * SCALE)


@triton.jit
def power_of_two(k, base):
    """2^(k − base); 0 of nothing, where both are −inf."""
    return tl.where(k == float("-inf"), 0.0, tl.exp2(k - base))


@triton.jit
def rescale_kernel(
    exponentials_ptr,
    exponents_ptr,
    totals_ptr,
    held_exponents_ptr,
    new_exponents_ptr,
    held_total_ptr,
    held_sums_ptr,
    R,
    D,
    exponentials_stride,
    held_stride,
    tiles,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_HELD: tl.constexpr,
):
    # 1. The base of each row: the largest exponent of the block's tiles and of the blocks before.
    m, n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < R
    place = rows.to(tl.int64)
    before = tl.load(held_exponents_ptr + rows, mask=inside, other=0.0)
    base = before
    there = exponents_ptr + place
    for _ in range(tiles):
        base = tl.maximum(base, tl.load(there, mask=inside, other=0.0))
        there += R
    # 2. The softmax's sum, brought to the base: by one program of each tile of rows.
    decay = power_of_two(before, base)
    if n == 0:
        total = tl.load(held_total_ptr + rows, mask=inside, other=0.0) * decay
        entry = place
        for _ in range(tiles):
            k = tl.load(exponents_ptr + entry, mask=inside, other=0.0)
            total += tl.load(totals_ptr + entry, mask=inside, other=0.0) * power_of_two(k, base)
            entry += R
        tl.store(held_total_ptr + rows, total, mask=inside)
        tl.store(new_exponents_ptr + rows, base, mask=inside)
    # 3. This tile of the block, if any of its rows has another exponent.
    own = tl.load(exponents_ptr + n.to(tl.int64) * R + rows, mask=inside, other=0.0)
    if tl.max((inside & (own != base)).to(tl.int32), 0) > 0:
        columns = n * TILE + tl.arange(0, TILE)
        e_pointers = exponentials_ptr + place[:, None] * exponentials_stride + columns[None, :]
        e = tl.load(e_pointers, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(e_pointers, e * power_of_two(own, base)[:, None], mask=inside[:, None])
    # 4. A share of the earlier blocks' vectors, if any row's base has moved.
    if HAS_HELD and tl.max((inside & (before != base)).to(tl.int32), 0) > 0:
        for d in range(n * TILE, D, tiles * TILE):
            columns = d + tl.arange(0, TILE)
            sum_pointers = held_sums_ptr + place[:, None] * held_stride + columns[None, :]
            wanted = inside[:, None] & (columns < D)[None, :]
            tl.store(sum_pointers, tl.load(sum_pointers, mask=wanted, other=0.0) * decay[:, None], mask=wanted)


@triton.jit
def dlogp_dhidden_kernel(
    dlogp_dhidden_ptr,
    weight_ptr,
    labels_ptr,
    target_ptr,
    exponents_ptr,
    totals_ptr,
    maximum_ptr,
    log_total_ptr,
    R,
    V,
    D,
    dlogp_dhidden_stride,
    weight_stride,
    ignore_index,
    logit_scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
):
    # 1. The softmax's sum with the label's term, which no block holds.
    column_tiles = tl.cdiv(D, BLOCK_N)
    m, n = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    rows, columns = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels_ptr + rows, mask=rows < R, other=ignore_index)
    kept = label != ignore_index
    k = tl.load(exponents_ptr + rows, mask=kept, other=0.0)
    z = tl.load(target_ptr + rows, mask=kept, other=0.0)
    shift = tl.where(k == float("-inf"), 0.0, k)
    others = tl.load(totals_ptr + rows, mask=kept, other=0.0)
    total = others + exp(z - shift * LN2_HIGH - shift * LN2_LOW)
    # 2. The statistics, by one program of each tile of rows.
    if n == 0:
        # Powers of two go from the total into k, so that the logarithm is small and keeps its digits.
        power = tl.where(total > 0, tl.floor(tl.log2(total)), 0.0)
        rest = tl.log(total * tl.exp2(-power)) + (shift + power) * LN2_LOW
        tl.store(maximum_ptr + rows, tl.where(kept, (shift + power) * LN2_HIGH, 0.0), mask=rows < R)
        tl.store(log_total_ptr + rows, tl.where(kept, rest, 0.0), mask=rows < R)
    # 3. s·(J_y (1 − p_y) w_y − mean): 1 − p_y is a quotient, not a difference of rounded numbers.
    missing = others / total
    if HAS_SOFTCAP:
        missing *= 1.0 - (z / softcap) * (z / softcap)
    wanted = kept[:, None] & (columns < D)[None, :]
    place = rows.to(tl.int64)[:, None]
    # A label out of range has no row to read; its target is NaN, and so is all that is made of it.
    own = tl.where((label >= 0) & (label < V), label, 0).to(tl.int64)[:, None]
    w = tl.load(weight_ptr + own * weight_stride + columns[None, :], mask=wanted, other=0.0).to(tl.float32)
    pointers = dlogp_dhidden_ptr + place * dlogp_dhidden_stride + columns[None, :]
    mean = tl.load(pointers, mask=wanted, other=0.0) / (total * SCALE)[:, None]
    derivative = logit_scale * (missing[:, None] * w - mean)
    tl.store(pointers, derivative, mask=(rows < R)[:, None] & (columns < D)[None, :])


def head_dlogp_dhidden(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int = -100, config: TileConfig | None = None
) -> tuple[HeadSums, Tensor]:
    """The statistics of `head_sums` with labels, and dlogp_t/dh_t = s·(J_y w_y − Σ_j p_j J_j w_j).

    A block's exponentials 2^(z·log₂e − k) are written in hidden's dtype, k a whole number per row and tile, and then
    multiplied by the head's rows into float32 sums. Where tiles took different k, a small kernel brings them to the
    largest: times a power of two, which rounds nothing. k moves in steps of 16 (8 in float16), so that this is seldom
    needed. The label's own term is never among what is rounded. No atomics and no locks: bitwise repeatable.

    Args:
        hidden: [N, D] float32, bfloat16 or float16, columns contiguous.
        head: weight [V, D] and bias (V,) of hidden's dtype, columns contiguous.
        labels: (N,) int32 or int64 token ids, contiguous; where `ignore_index`, sums and derivatives are 0.
        config: tiles to take in place of the table's for the first product.

    Returns:
        The sums, whose `maximum` is a number near LSE(z) that `log_total` completes; the derivatives [N, D] float32.

    Traffic: as `head_sums`; R·C exponentials written and read in blocks, the derivatives once per block. Two products.
    """

    def passed(budget: int) -> tuple[HeadSums, Tensor]:
        walk = _Pass(hidden, head, labels, ignore_index, config, budget)
        for rows in slices(hidden.shape[0], walk.blocks.rows):
            walk.through(rows)
        return walk.sums, walk.dlogp_dhidden

    return in_workspace(hidden, passed)


class _Pass:
    """Blocks of exponentials over [N, V], and the sums that they are added to."""

    def __init__(
        self, hidden: Tensor, head: Head, labels: Tensor, ignore_index: int, config: TileConfig | None, budget: int
    ) -> None:
        self.hidden, self.head, self.labels, self.ignore_index = hidden, head, labels, ignore_index
        (n, d), v = hidden.shape, head.vocab_size
        demand = {"heavy": head.softcap is not None, "bias": head.bias is not None}
        self.tiles = config or tiles("exponentials", hidden, head.weight, n, **demand)
        self.product_tiles = tiles("product", hidden, head.weight, n)
        self.blocks = plan((n, d, v), hidden.element_size(), (self.tiles, self.product_tiles), budget=budget)
        # The product reads whole steps of block_k from the zeros that were written past the end.
        assert self.tiles.block_n % self.product_tiles.block_k == 0
        self.step, self.scale = (8, 2.0**11) if hidden.dtype == torch.float16 else (16, 1.0)

        def floats(*shape: int) -> Tensor:
            return hidden.new_empty(shape, dtype=torch.float32)

        self.sums = HeadSums(floats(n), floats(n), target=floats(n).fill_(torch.nan))
        self.dlogp_dhidden = floats(n, d)
        held = min(n, self.blocks.rows)
        column_tiles = triton.cdiv(self.blocks.columns, self.tiles.block_n)
        self.exponentials = hidden.new_empty((self.blocks.rows, self.blocks.columns))
        self.exponents, self.totals = floats(column_tiles, held), floats(column_tiles, held)
        self.held_exponents, self.held_total = floats(2, held), floats(held)

    def through(self, rows: slice) -> None:
        """Take one block of rows through the vocabulary."""
        held_sums = self.dlogp_dhidden[rows]
        before, after = self.held_exponents
        before.fill_(-torch.inf)
        self.held_total.zero_()
        for columns in slices(self.head.vocab_size, self.blocks.columns):
            first = columns.start == 0
            self._exponentials(rows, columns, before)
            self._rescale(rows, columns, before, after, None if first else held_sums)
            product(
                self.exponentials,
                self.head.weight[columns],
                held_sums,
                self.product_tiles,
                previous=None if first else held_sums,
            )
            before, after = after, before
        self._complete(rows, before)

    def _exponentials(self, rows: slice, columns: slice, held_exponents: Tensor) -> None:
        hidden, head, config = self.hidden[rows], self.head.columns(columns.start, columns.stop), self.tiles
        (r, d), c = hidden.shape, head.vocab_size
        launch(
            exponentials_kernel,
            triton.cdiv(r, config.block_m) * triton.cdiv(c, config.block_n),
            on=hidden,
            options=config.options,
            hidden_ptr=operand(hidden, (config.block_m, config.block_k), config),
            weight_ptr=operand(head.weight, (config.block_n, config.block_k), config),
            bias_ptr=head.bias,
            labels_ptr=self.labels[rows],
            held_exponents_ptr=held_exponents,
            exponentials_ptr=self.exponentials,
            exponents_ptr=self.exponents,
            totals_ptr=self.totals,
            target_ptr=self._target(rows),
            R=r,
            C=c,
            D=d,
            hidden_stride=hidden.stride(0),
            weight_stride=head.weight.stride(0),
            exponentials_stride=self.exponentials.stride(0),
            first_column=columns.start,
            ignore_index=self.ignore_index,
            logit_scale=head.logit_scale,
            softcap=head.softcap or 1.0,
            **config.switches,
            EVEN_K=d % config.block_k == 0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            STEP=self.step,
            SCALE=self.scale,
            PRECISION=precision(hidden.dtype, target_of(hidden)),
        )

    def _rescale(self, rows: slice, columns: slice, before: Tensor, after: Tensor, held_sums: Tensor | None) -> None:
        r, d = self.hidden[rows].shape
        column_tiles = triton.cdiv(columns.stop - columns.start, self.tiles.block_n)
        launch(
            rescale_kernel,
            triton.cdiv(r, RESCALE_ROWS) * column_tiles,
            on=self.hidden,
            options=UNTILED,
            exponentials_ptr=self.exponentials,
            exponents_ptr=self.exponents,
            totals_ptr=self.totals,
            held_exponents_ptr=before,
            new_exponents_ptr=after,
            held_total_ptr=self.held_total,
            held_sums_ptr=held_sums,
            R=r,
            D=d,
            exponentials_stride=self.exponentials.stride(0),
            held_stride=0 if held_sums is None else held_sums.stride(0),
            tiles=column_tiles,
            TILE=self.tiles.block_n,
            BLOCK_M=RESCALE_ROWS,
            HAS_HELD=held_sums is not None,
        )

    def _complete(self, rows: slice, exponents: Tensor) -> None:
        (r, d), weight, block = self.hidden[rows].shape, self.head.weight, self.dlogp_dhidden[rows]
        launch(
            dlogp_dhidden_kernel,
            triton.cdiv(r, DHIDDEN_ROWS) * triton.cdiv(d, DHIDDEN_COLUMNS),
            on=self.hidden,
            options=UNTILED,
            dlogp_dhidden_ptr=block,
            weight_ptr=weight,
            labels_ptr=self.labels[rows],
            target_ptr=self._target(rows),
            exponents_ptr=exponents,
            totals_ptr=self.held_total,
            maximum_ptr=self.sums.maximum[rows],
            log_total_ptr=self.sums.log_total[rows],
            R=r,
            V=self.head.vocab_size,
            D=d,
            dlogp_dhidden_stride=block.stride(0),
            weight_stride=weight.stride(0),
            ignore_index=self.ignore_index,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap or 1.0,
            BLOCK_M=DHIDDEN_ROWS,
            BLOCK_N=DHIDDEN_COLUMNS,
            HAS_SOFTCAP=self.head.softcap is not None,
            SCALE=self.scale,
        )

    def _target(self, rows: slice) -> Tensor:
        assert self.sums.target is not None
        return self.sums.target[rows]
