"""A block of products of two heads, made by the vendor's library, to divergences and to the gradient by the logits.

Where upstream gradients are known beforehand, a block goes through both heads once. A first pass reads the products for
both log-sum-exps, a second one for what p = softmax(z) and q = softmax(u) sum to; then a row's factors are known, and a
third one writes the gradient by the student's logits over its products.

Letters: R rows of a block, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.joint_dlogits import Flags
from tvkd_fast.kernels.joint_stats import finite
from tvkd_fast.kernels.joint_values import FARTHEST, LEAST, excess_of, log_over_mixture, log_ratio, sign
from tvkd_fast.kernels.launch import INTERPRETED, launch
from tvkd_fast.kernels.logits import exp, transformed
from tvkd_fast.kernels.records import Head, HeadSums, JointSums, JointValues

BLOCK = 128 if INTERPRETED else 1024
"""Columns that a program takes at a time; few in the interpreter, so that small vocabularies have several parts."""
WARPS = 8
NUMBERS = 15
"""The numbers of a row, in the order in which `block_moments_kernel` stores them."""


class Mixture(NamedTuple):
    """β' of m = (1 − β')p + β'q and α of Σ p^α·q^{1−α}; None where they are not asked for."""

    beta: float | None
    alpha: float | None


@triton.jit
def row_logits(
    products_ptr, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """A row's logits at columns [1, C], −inf past the vocabulary's end."""
    product = tl.load(products_ptr + columns, mask=columns < V, other=0.0)
    z = transformed(product, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    return tl.where(columns < V, z, float("-inf"))


@triton.jit
def exponentials_so_far(top, total, z):
    """The running maximum and Σ exp(z − maximum), a sum per lane, with a part's logits."""
    new = tl.maximum(top, tl.max(z))
    shift = finite(new)
    return new, total * exp(top - shift) + exp(z - shift)


@triton.jit
def block_moments_kernel(
    products_ptr,
    bias_ptr,
    other_products_ptr,
    other_bias_ptr,
    labels_ptr,
    numbers_ptr,
    V,
    products_stride,
    other_products_stride,
    numbers_stride,
    logit_scale,
    softcap,
    other_logit_scale,
    other_softcap,
    beta,
    log_rest,
    log_beta,
    alpha,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_LOGS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_VARIATION: tl.constexpr,
    HAS_POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)[None, :]
    products_ptr += row.to(tl.int64) * products_stride
    other_products_ptr += row.to(tl.int64) * other_products_stride
    numbers_ptr += row
    # 1. Both log-sum-exps.
    top = tl.full((), float("-inf"), tl.float32)
    other_top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    other_total = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        z = row_logits(products_ptr, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        u = row_logits(
            other_products_ptr, other_bias_ptr, columns, V, other_logit_scale, other_softcap, HAS_OTHER_BIAS,
            HAS_OTHER_SOFTCAP,
        )  # fmt: skip
        top, total = exponentials_so_far(top, total, z)
        other_top, other_total = exponentials_so_far(other_top, other_total, u)
    rest, other_rest = tl.log(tl.sum(total)), tl.log(tl.sum(other_total))
    tl.store(numbers_ptr, top)
    tl.store(numbers_ptr + numbers_stride, rest)
    tl.store(numbers_ptr + 2 * numbers_stride, other_top)
    tl.store(numbers_ptr + 3 * numbers_stride, other_rest)
    # 2. What p and q sum to. An entry of no weight counts as nothing, however far the other side's logit is.
    forward = tl.zeros((1, BLOCK), tl.float32)
    reverse = tl.zeros((1, BLOCK), tl.float32)
    entropy = tl.zeros((1, BLOCK), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    to_mixture = tl.zeros((1, BLOCK), tl.float32)
    other_to_mixture = tl.zeros((1, BLOCK), tl.float32)
    overlap = tl.zeros((1, BLOCK), tl.float32)
    variation = tl.zeros((1, BLOCK), tl.float32)
    excess = tl.zeros((1, BLOCK), tl.float32)
    power = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        z = row_logits(products_ptr, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        u = row_logits(
            other_products_ptr, other_bias_ptr, columns, V, other_logit_scale, other_softcap, HAS_OTHER_BIAS,
            HAS_OTHER_SOFTCAP,
        )  # fmt: skip
        x, y = z - top - rest, u - other_top - other_rest
        p, q = exp(x), exp(y)
        w = tl.where((p == 0.0) & (q == 0.0), 0.0, y - x)
        forward += tl.where(q == 0.0, p, excess_of(q, p, w))
        reverse += tl.where(p == 0.0, q, excess_of(p, q, -w))
        if HAS_LOGS:
            entropy -= tl.where(p == 0.0, 0.0, p * x)
            squares += p * p
        if HAS_MIXTURE:
            ratio = tl.minimum(tl.maximum(w, -FARTHEST), FARTHEST)
            ours, theirs = log_over_mixture(ratio, log_rest, log_beta)
            mixed = p + beta * (q - p)
            to_mixture += excess_of(p, mixed, ours)
            other_to_mixture += excess_of(q, mixed, theirs)
            overlap += p * exp(theirs)
        if HAS_VARIATION:
            more = p - q
            variation += 0.5 * tl.abs(more)
            excess += p * sign(more)
        if HAS_POWER:
            power += tl.where((p == 0.0) | (q == 0.0), p * q, exp(alpha * x + (1.0 - alpha) * y))
    tl.store(numbers_ptr + 4 * numbers_stride, tl.sum(forward))
    tl.store(numbers_ptr + 5 * numbers_stride, tl.sum(reverse))
    if HAS_LOGS:
        tl.store(numbers_ptr + 6 * numbers_stride, tl.sum(entropy))
        tl.store(numbers_ptr + 7 * numbers_stride, tl.log(tl.sum(squares)))
    if HAS_MIXTURE:
        tl.store(numbers_ptr + 8 * numbers_stride, tl.sum(other_to_mixture))
        tl.store(numbers_ptr + 9 * numbers_stride, tl.sum(to_mixture))
        tl.store(numbers_ptr + 10 * numbers_stride, tl.sum(overlap))
    if HAS_VARIATION:
        tl.store(numbers_ptr + 11 * numbers_stride, tl.sum(variation))
        tl.store(numbers_ptr + 12 * numbers_stride, tl.sum(excess))
    if HAS_POWER:
        tl.store(numbers_ptr + 13 * numbers_stride, tl.sum(power))
    # 3. z at the label.
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        there = (label >= 0) & (label < V)
        column = tl.arange(0, 1)[None, :] + tl.where(there, label, 0)
        own = row_logits(products_ptr, bias_ptr, column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        tl.store(numbers_ptr + 14 * numbers_stride, tl.where(there, tl.sum(own), float("nan")))


@triton.jit
def block_gradient_kernel(
    products_ptr,
    bias_ptr,
    other_products_ptr,
    other_bias_ptr,
    labels_ptr,
    numbers_ptr,
    factors_ptr,
    dlogits_ptr,
    V,
    products_stride,
    other_products_stride,
    numbers_stride,
    factors_stride,
    dlogits_stride,
    ignore_index,
    logit_scale,
    softcap,
    other_logit_scale,
    other_softcap,
    beta,
    log_rest,
    log_beta,
    alpha,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_LOGS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_VARIATION: tl.constexpr,
    HAS_POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)[None, :]
    products_ptr += row.to(tl.int64) * products_stride
    other_products_ptr += row.to(tl.int64) * other_products_stride
    dlogits_ptr += row.to(tl.int64) * dlogits_stride
    numbers_ptr += row
    factors_ptr += row
    top, rest = tl.load(numbers_ptr), tl.load(numbers_ptr + numbers_stride)
    other_top = tl.load(numbers_ptr + 2 * numbers_stride)
    other_rest = tl.load(numbers_ptr + 3 * numbers_stride)
    by_own, by_other = tl.load(factors_ptr), tl.load(factors_ptr + factors_stride)
    keep = 1
    label = row
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        keep = (label != ignore_index).to(tl.int32)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        z = row_logits(products_ptr, bias_ptr, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        u = row_logits(
            other_products_ptr, other_bias_ptr, columns, V, other_logit_scale, other_softcap, HAS_OTHER_BIAS,
            HAS_OTHER_SOFTCAP,
        )  # fmt: skip
        x = tl.maximum(z - top - rest, LEAST, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(u - other_top - other_rest, LEAST, propagate_nan=tl.PropagateNan.ALL)
        p = exp(x)
        # What multiplies p, and what stands by itself, as in joint_dlogits_kernel.
        inner = tl.zeros((1, BLOCK), tl.float32) + by_own
        g = by_other * exp(y)
        if HAS_LOGS:
            inner += tl.load(factors_ptr + 2 * factors_stride) * x
            inner += tl.load(factors_ptr + 3 * factors_stride) * y
            inner += tl.load(factors_ptr + 4 * factors_stride) * p
        if HAS_MIXTURE:
            ours, theirs = log_over_mixture(log_ratio(x, y), log_rest, log_beta)
            inner += tl.load(factors_ptr + 5 * factors_stride) * (ours - (1.0 - beta) * exp(ours))
            inner -= tl.load(factors_ptr + 6 * factors_stride) * (1.0 - beta) * exp(theirs)
        if HAS_VARIATION:
            inner += tl.load(factors_ptr + 7 * factors_stride) * sign(x - y)
        if HAS_POWER:
            g += tl.load(factors_ptr + 8 * factors_stride) * exp(alpha * x + (1.0 - alpha) * y)
        g += p * inner
        if HAS_LABELS:
            g += tl.where(columns == label, tl.load(factors_ptr + 9 * factors_stride), 0.0)
        if HAS_SOFTCAP:
            capped = tl.maximum(z, -softcap) / softcap
            g *= 1.0 - capped * capped
        g = tl.where(keep != 0, g, 0.0)
        # 16 bits are written over 32 that every warp has read.
        tl.debug_barrier()
        tl.store(dlogits_ptr + columns, g, mask=columns < V)


def block_moments(
    products: Tensor,
    head: Head,
    other_products: Tensor,
    other_head: Head,
    numbers: Tensor,
    *,
    labels: Tensor | None,
    flags: Flags,
    mixture: Mixture,
) -> None:
    """The rows' numbers into `numbers` [15, R] float32, those of a flag that is off unwritten.

    products and other_products [R, V] float32, h·w of either head; labels (R,). KL(q‖p) is summed as
    Σ q·(w + e^{−w} − 1), w = log q/p, whose terms are not negative; the other divergences alike.

    Traffic: the products twice.
    """
    launch(
        block_moments_kernel,
        products.shape[0],
        on=products,
        options={"num_warps": WARPS},
        numbers_ptr=numbers,
        numbers_stride=numbers.stride(0),
        **_two_blocks(products, head, other_products, other_head, labels, flags, mixture),
    )


def block_gradient(
    products: Tensor,
    head: Head,
    other_products: Tensor,
    other_head: Head,
    numbers: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    labels: Tensor | None,
    ignore_index: int,
    flags: Flags,
    mixture: Mixture,
) -> None:
    """out[t, j] = J_tj·g_tj with g as `joint_dlogits.Factors` has it, J = dz/da: rounded once; 0 in ignored rows.

    numbers [15, R] as `block_moments` left them, factors [10, R] float32. out [R, V] of the head's dtype may begin
    where the products do, row by row: then they are gone. Traffic: the products once, and out.
    """
    launch(
        block_gradient_kernel,
        products.shape[0],
        on=products,
        options={"num_warps": WARPS},
        numbers_ptr=numbers,
        numbers_stride=numbers.stride(0),
        factors_ptr=factors,
        factors_stride=factors.stride(0),
        dlogits_ptr=out,
        dlogits_stride=out.stride(0),
        ignore_index=ignore_index,
        **_two_blocks(products, head, other_products, other_head, labels, flags, mixture),
    )


def _two_blocks(
    products: Tensor,
    head: Head,
    other_products: Tensor,
    other_head: Head,
    labels: Tensor | None,
    flags: Flags,
    mixture: Mixture,
) -> dict[str, object]:
    """The arguments that both kernels take."""
    beta, alpha = mixture.beta or 0.5, mixture.alpha or 0.5
    return {
        "products_ptr": products,
        "bias_ptr": head.bias,
        "other_products_ptr": other_products,
        "other_bias_ptr": other_head.bias,
        "labels_ptr": labels,
        "V": products.shape[1],
        "products_stride": products.stride(0),
        "other_products_stride": other_products.stride(0),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or 1.0,
        "other_logit_scale": other_head.logit_scale,
        "other_softcap": other_head.softcap or 1.0,
        "beta": beta,
        "log_rest": math.log1p(-beta),
        "log_beta": math.log(beta),
        "alpha": alpha,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "HAS_OTHER_BIAS": other_head.bias is not None,
        "HAS_OTHER_SOFTCAP": other_head.softcap is not None,
        "HAS_LABELS": labels is not None,
        "HAS_LOGS": flags.logs,
        "HAS_MIXTURE": flags.mixture,
        "HAS_VARIATION": flags.variation,
        "HAS_POWER": flags.power,
        "BLOCK": BLOCK,
    }


def records_of(numbers: Tensor, flags: Flags, mixture: Mixture, *, labelled: bool) -> tuple[JointSums, JointValues]:
    """The rows' numbers [15, R] as the joint walk's records, None where a flag is off."""

    def number(which: int, there: bool = True) -> Tensor | None:
        return numbers[which] if there else None

    own = HeadSums(numbers[0], numbers[1], target=number(14, labelled), entropy=number(6, flags.logs))
    other = HeadSums(numbers[2], numbers[3])
    values = JointValues(
        mixture.beta,
        mixture.alpha,
        other_to_mixture=number(8, flags.mixture),
        own_to_mixture=number(9, flags.mixture),
        overlap=number(10, flags.mixture),
        total_variation=number(11, flags.variation),
        excess=number(12, flags.variation),
        power=number(13, flags.power),
    )
    return JointSums(own, other, numbers[4], numbers[5], number(7, flags.logs)), values


def new_numbers(on: Tensor, rows: int) -> Tensor:
    return on.new_zeros((NUMBERS, rows), dtype=torch.float32)
