"""A model of the head's time from counted products, bytes and exponentials: no measurement, and never shown as one.

Each phase takes what the slowest of three published limits takes (matrix rate, memory bandwidth, exponentials), and
phases follow each other. Left out: launches, latency, partial waves, caches beyond those named here. So it bounds from
below, and its use is to compare algorithms, not to promise seconds.

Letters: N tokens, D hidden, V vocabulary; 16-bit operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvkd_fast.kernels.blocks import BLOCK_ROWS, WORKSPACE_BYTES
from tvkd_fast.kernels.configs import Demand, choose


@dataclass(frozen=True)
class Chip:
    """Published limits: dense bf16 FLOP/s, memory bytes/s, exponentials/s (16 a clock and multiprocessor)."""

    name: str
    target: str
    flops: float
    bandwidth: float
    exps: float


CHIPS = (
    Chip("A100 SXM", "sm_80", 312e12, 2.039e12, 16 * 108 * 1.41e9),
    Chip("H100 SXM", "sm_90", 989.4e12, 3.35e12, 16 * 132 * 1.83e9),
    Chip("H200 SXM", "sm_90", 989.4e12, 4.8e12, 16 * 132 * 1.83e9),
)
Count = Callable[[int, int, int, Chip], tuple[list["Phase"], list["Phase"]]]
"""Forward and backward of an algorithm at N, D, V on a chip."""

SHAPES = ((4096, 576, 49152), (4096, 2048, 128256), (8192, 4096, 128256))


@dataclass(frozen=True)
class Phase:
    """Work between two points where everything must have finished."""

    products: float = 0.0
    """Products of N × D × V."""
    bytes: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Estimate:
    chip: str
    shape: tuple[int, int, int]
    algorithm: str
    products: float
    forward_ms: float
    backward_ms: float
    whole_ms: float
    over_product: float
    """Whole over the forward product at the matrix rate."""


def ours(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
    stats = choose("head_stats", chip.target, Demand())
    block = choose("dlogits", chip.target, Demand())
    splits = math.ceil(v / stats.block_n / stats.split_tiles)
    operands = 2 * (n * d + v * d * math.ceil(n / (stats.block_m * stats.group)))
    forward = [Phase(1, operands + 2 * 8 * n * splits, n * v)]
    rows = min(n, BLOCK_ROWS)
    width = min(v, WORKSPACE_BYTES // (2 * rows))
    chunks = math.ceil(v / width) * math.ceil(n / rows)
    weights = 2 * v * d * math.ceil(n / (block.block_m * block.group))
    recompute = Phase(1, weights + 2 * chunks * rows * d + 2 * n * v, n * v)
    by_hidden = Phase(1, 2 * n * v + 2 * v * d * math.ceil(n / rows) + 8 * n * d * math.ceil(v / width))
    by_weight = Phase(1, 2 * n * v + 2 * chunks * rows * d + 2 * v * d + (8 * v * d if n > rows else 0))
    return forward, [recompute, by_hidden, by_weight]


def ours_frozen(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
    """Exponentials a block at a time, times the head's rows, into float32; the backward multiplies by its upstream."""
    block = choose("exponentials", chip.target, Demand())
    rows = min(n, BLOCK_ROWS)
    width = min(v, WORKSPACE_BYTES // max(2 * rows, 4 * d))
    chunks = math.ceil(v / width)
    weights = 2 * v * d * math.ceil(n / (block.block_m * block.group))
    partials = 3 * 8 * n * math.ceil(v / block.block_n)
    exponentials = Phase(1, weights + 2 * chunks * n * d + 2 * n * v + partials, n * v)
    by_hidden = Phase(1, 2 * n * v + 2 * v * d * math.ceil(n / rows) + 8 * n * d * chunks)
    return [exponentials, by_hidden, Phase(0, 10 * n * d)], [Phase(0, 6 * n * d)]


def eager(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
    """16-bit logits, upcast, log_softmax, gather; backward through each, and two products."""
    operands, logits = 2 * (n * d + v * d), n * v
    forward = [Phase(1, operands + 2 * logits), Phase(0, 6 * logits), Phase(0, 12 * logits, logits)]
    backward = [
        Phase(0, 4 * logits),
        Phase(0, 12 * logits, logits),
        Phase(0, 6 * logits),
        Phase(1, operands + 2 * logits),
        Phase(1, operands + 2 * logits),
    ]
    return forward, backward


def eager_frozen(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
    forward, backward = eager(n, d, v, chip)
    return forward, backward[:-1]


def liger(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
    """Fused linear cross-entropy with reduction="none": chunks forward, recomputed backward for per-token gradients."""
    operands, logits = 2 * (n * d + v * d), n * v
    forward = [Phase(1, operands + 2 * logits), Phase(0, 2 * logits, logits)]
    backward = [
        Phase(1, operands + 2 * logits),
        Phase(0, 6 * logits, 2 * logits),
        Phase(1, operands + 2 * logits),
        Phase(1, operands + 2 * logits),
    ]
    return forward, backward


def cce(kept: float) -> Count:
    """Tiles of 128 × 128: recompute, then two products of the share of tiles that its filter keeps, summed in place."""

    def count(n: int, d: int, v: int, chip: Chip) -> tuple[list[Phase], list[Phase]]:
        operands = 2 * (n * d + v * d)
        added = 2 * 2 * d * kept * (v * math.ceil(n / 128) + n * math.ceil(v / 128))
        return [Phase(1, operands, n * v)], [Phase(1 + 2 * kept, operands + added, n * v)]

    return count


ALGORITHMS: dict[str, Count] = {
    "tvkd_fast, exact": ours,
    "eager": eager,
    "Liger, per-token gradients": liger,
    "CCE, no tile skipped": cce(1.0),
    "CCE, nine tiles in ten skipped": cce(0.1),
    "tvkd_fast, frozen head": ours_frozen,
    "eager, frozen head": eager_frozen,
}

ASSUMPTIONS = (
    "limits: A100 312 TFLOP/s and 2.04 TB/s, H100 989 and 3.35, H200 989 and 4.8 (dense bf16, SXM, NVIDIA's data "
    "sheets); 16 exponentials per clock and multiprocessor",
    "ours: weight comes from memory once per group of row tiles, hidden once per launch, dlogits are written once and "
    f"read twice in blocks of {WORKSPACE_BYTES // 2**20} MiB; dH's float32 sums are read and written once per block",
    "eager and Liger: operands once per product (cuBLAS is assumed perfect), logits as often as their steps read and "
    "write them; Liger's chunks are assumed to cost nothing",
    "CCE: both gradients are read and written for every tile kept, as memory traffic, though L2 holds much of it",
    "no launches, latency, partial waves or clock limits: a lower bound, for comparing algorithms",
)


def estimate(chip: Chip, shape: tuple[int, int, int], name: str) -> Estimate:
    n, d, v = shape
    product_seconds = 2 * n * d * v / chip.flops

    def seconds(phase: Phase) -> float:
        return max(phase.products * product_seconds, phase.bytes / chip.bandwidth, phase.exps / chip.exps)

    forward, backward = ALGORITHMS[name](n, d, v, chip)
    before, after = (1e3 * sum(map(seconds, phases)) for phases in (forward, backward))
    return Estimate(
        chip=chip.name,
        shape=shape,
        algorithm=name,
        products=sum(phase.products for phase in (*forward, *backward)),
        forward_ms=before,
        backward_ms=after,
        whole_ms=before + after,
        over_product=(before + after) / (1e3 * product_seconds),
    )


def estimates() -> list[Estimate]:
    return [estimate(chip, shape, name) for shape in SHAPES for chip in CHIPS for name in ALGORITHMS]


def report_estimates(found: list[Estimate]) -> str:
    lines = ["A model, not a measurement: " + "; ".join(ASSUMPTIONS) + "."]
    lines.append(
        f"{'shape':<18}{'chip':<10}{'algorithm':<32}{'products':>9}{'forward':>9}{'backward':>9}{'/product':>9}"
    )
    for x in found:
        shape = "x".join(map(str, x.shape))
        lines.append(
            f"{shape:<18}{x.chip:<10}{x.algorithm:<32}{x.products:>9.1f}{x.forward_ms:>6.2f} ms{x.backward_ms:>6.2f} ms"
            f"{x.over_product:>9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report_estimates(estimates()))
