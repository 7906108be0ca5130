"""A model of the head's time from counted products, bytes and instructions: no measurement, never shown as one.

A phase takes what the slower of two limits takes, products or memory traffic, and phases follow each other. Products
of the vendor's library run at a share of the published rate, those of our kernels at a share of the library's; behind
each tile of theirs come the instructions that the census counted there, which nothing hides while one program fills a
multiprocessor. The unit is one product h·Wᵀ of the library's.

Letters: N tokens, D hidden, V vocabulary; 16-bit operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from bench.census.epilogue import issue_cycles
from tvkd_fast.kernels import blocks
from tvkd_fast.kernels.configs import Demand, Kernel, choose
from tvkd_fast.kernels.dense_columns import DENSE_COLUMNS, DENSE_SHARE
from tvkd_fast.kernels.logit_sums import LEAST_WIDTH
from tvkd_fast.ops.tiles.forward_gradients import WORKSPACE_MB, row_bytes

LIBRARY = 0.8
"""A library's product over the published rate: 790 of 989 TFLOP/s on an H200."""
KERNEL = 0.85
"""Of ours over the library's in the main loop: the best that a reading of the compiled loops allows them."""
ENTRIES = 300
"""Entries a token of a sparse gradient, those above 2⁻¹⁴ of a trained model's softmax."""
HELD = ((1024 / 49152, 0.277), (2048 / 49152, 0.500), (4096 / 49152, 0.676), (8192 / 49152, 0.804))
"""Columns that are dense, as a share of the vocabulary, and the share of those entries that lie in them: of one model's
states (bench/results/dense_columns.json)."""
WORKSPACE = blocks.MOST_BYTES


@dataclass(frozen=True)
class Chip:
    """Published limits: dense bf16 FLOP/s, memory bytes/s; multiprocessors, and their clock in Hz."""

    name: str
    target: str
    flops: float
    bandwidth: float
    processors: int
    clock: float


CHIPS = (
    Chip("A100 SXM", "sm_80", 312e12, 2.039e12, 108, 1.41e9),
    Chip("H100 SXM", "sm_90", 989.4e12, 3.35e12, 132, 1.83e9),
    Chip("H200 SXM", "sm_90", 989.4e12, 4.8e12, 132, 1.83e9),
)
SHAPES = ((4096, 576, 49152), (4096, 2048, 128256), (8192, 4096, 128256))


@dataclass(frozen=True)
class Phase:
    """Work between two points where everything must have finished."""

    products: float = 0.0
    """Products of N × D × V."""
    bytes: float = 0.0
    kernel: Kernel | None = None
    """Ours that makes them; the library where there is none."""


@dataclass(frozen=True)
class Count:
    forward: list[Phase]
    backward: list[Phase] = field(default_factory=list)
    sums: float = 0.0
    """Bytes held beyond inputs and gradients, at most."""


Algorithm = Callable[[int, int, int, Chip], Count]
"""What an algorithm does at N, D, V on a chip."""


def _ours(kernel: Kernel, n: int, d: int, v: int, chip: Chip, more: float = 0.0) -> Phase:
    """One of our kernels over all tiles: hidden once a launch, weight once a group of row tiles, and what else."""
    tiles = choose(kernel, chip.target, Demand())
    return Phase(1, 2 * n * d + 2 * v * d * math.ceil(n / (tiles.block_m * tiles.group)) + more, kernel)


def _partials(kernel: Kernel, n: int, v: int, chip: Chip) -> float:
    tiles = choose(kernel, chip.target, Demand())
    return 2 * 8 * n * math.ceil(v / tiles.block_n / tiles.split_tiles)


def _columns(n: int, d: int, v: int) -> int:
    """Columns of a block of all rows, beside dH's float32 sums and a slice of dW's."""
    return max(128, min(v, (WORKSPACE - 4 * n * d) // (2 * n + 4 * d)))


def ours(n: int, d: int, v: int, chip: Chip) -> Count:
    blocks_of_columns = math.ceil(v / _columns(n, d, v))
    recompute = _ours("dlogits", n, d, v, chip, 2 * n * v)
    by_hidden = Phase(1, 2 * n * v + 2 * v * d + 8 * n * d * blocks_of_columns)
    by_weight = Phase(1, 2 * n * v + 2 * n * d * blocks_of_columns + 4 * v * d)
    rounding = Phase(0, 6 * v * d)
    forward = _ours("head_stats", n, d, v, chip, _partials("head_stats", n, v, chip))
    held = min(WORKSPACE, 4 * n * d + _columns(n, d, v) * (2 * n + 4 * d))
    return Count([forward], [recompute, by_hidden, by_weight, rounding], held)


def ours_known(workspace: float) -> Algorithm:
    """The loss known beforehand: plain products of blocks of rows, two passes over their logits, dW summed a block."""

    def count(n: int, d: int, v: int, chip: Chip) -> Count:
        rows = min(n, int(workspace // row_bytes("triton", v, d, 2)))
        visits = math.ceil(n / rows)
        held = rows * row_bytes("triton", v, d, 2) + 4 * v * d
        return Count([*_block_forward(n, d, v, visits), *_block_backward(n, d, v, visits)], sums=held)

    return count


def _block_forward(n: int, d: int, v: int, visits: int) -> list[Phase]:
    """Products of blocks of rows, the weight once a block, and the pass that writes exponentials."""
    return [Phase(1, 4 * n * v + visits * 2 * v * d + 2 * n * d), Phase(0, (4 + 2) * n * v)]


def _block_backward(n: int, d: int, v: int, visits: int) -> list[Phase]:
    """Both products of the exponentials, a block's at a time, and the rounding of dW's sums."""
    by_hidden = Phase(1, 2 * n * v + visits * 2 * v * d + 6 * n * d)
    by_weight = Phase(1, 2 * n * v + 2 * n * d + 8 * v * d * visits)
    return [by_hidden, by_weight, Phase(0, 6 * v * d)]


def ours_kept(n: int, d: int, v: int, chip: Chip) -> Count:
    """The loss unknown: exponentials of all rows kept for the backward, beside products of a third of their size."""
    visits = math.ceil(n / max(1, 2 * n * v // 3 // row_bytes("triton", v, d, 2)))
    return Count(_block_forward(n, d, v, visits), _block_backward(n, d, v, 1), 8 * n * v / 3 + 4 * v * d)


def ours_frozen(n: int, d: int, v: int, chip: Chip) -> Count:
    """Exponentials a block at a time, times the head's rows, into float32; the backward multiplies by its upstream."""
    columns = max(128, min(v, WORKSPACE // (2 * n)))
    partials = 3 * 8 * n * math.ceil(v / choose("exponentials", chip.target, Demand()).block_n)
    exponentials = _ours("exponentials", n, d, v, chip, 2 * n * v + partials)
    by_hidden = Phase(1, 2 * n * v + 2 * v * d + 8 * n * d * math.ceil(v / columns))
    return Count([exponentials, by_hidden, Phase(0, 10 * n * d)], [Phase(0, 6 * n * d)], 2 * n * columns)


def ours_values(n: int, d: int, v: int, chip: Chip) -> Count:
    """By the library and a pass over its products where states are wide, else by one kernel."""
    if d < LEAST_WIDTH:
        return Count([_ours("head_stats", n, d, v, chip, _partials("head_stats", n, v, chip))])
    visits = math.ceil(4 * n * v / WORKSPACE)
    of_library = Phase(1, 4 * n * v + visits * 2 * v * d + 2 * n * d)
    return Count([of_library, Phase(0, 4 * n * v)], sums=min(WORKSPACE, 4 * n * v))


def ours_sparse(n: int, d: int, v: int, chip: Chip) -> Count:
    """Marks in the forward, behind the dense columns' sums; then the exact gradient of these columns, and for the other
    entries kept rows of the head and of the states gathered, a column at a time."""
    dense = min(DENSE_COLUMNS, v // DENSE_SHARE)
    bound = _ours("head_stats", n, d, dense, chip)
    marks = _ours("selection_bits", n, d, v, chip, n * v / 8 + _partials("selection_bits", n, v, chip))
    entries = n * ENTRIES * (1 - _held(dense / v))
    lists = Phase(0, n * v / 8 + 12 * entries)
    share = dense / v
    exact = [Phase(share, 2 * n * dense, "dlogits"), Phase(2 * share, 4 * n * dense + 8 * n * d + 4 * dense * d)]
    gathers = [Phase(0, 2 * d * entries + 8 * entries + 4 * n * d), Phase(0, 2 * d * entries + 8 * entries + 4 * v * d)]
    forward = [replace(bound, products=share), marks, lists]
    return Count(forward, [*exact, *gathers], n * v / 8 + 12 * entries + 2 * n * dense)


def _held(share: float) -> float:
    """`HELD` at a share, by straight lines of its logarithm."""
    (first, least), *_, (last, most) = HELD
    if not first < share < last:
        return least if share <= first else most
    (low, below), (high, above) = next(pair for pair in pairwise(HELD) if pair[0][0] <= share < pair[1][0])
    return below + (above - below) * math.log(share / low) / math.log(high / low)


def eager(n: int, d: int, v: int, chip: Chip) -> Count:
    """16-bit logits, upcast, log_softmax, gather; backward through each, and two products."""
    operands, logits = 2 * (n * d + v * d), n * v
    forward = [Phase(1, operands + 2 * logits), Phase(0, 6 * logits), Phase(0, 12 * logits)]
    backward = [Phase(0, 4 * logits), Phase(0, 12 * logits), Phase(0, 6 * logits)]
    return Count(forward, [*backward, *2 * [Phase(1, operands + 2 * logits)]], 10 * logits)


def eager_frozen(n: int, d: int, v: int, chip: Chip) -> Count:
    whole = eager(n, d, v, chip)
    return Count(whole.forward, whole.backward[:-1], whole.sums)


def compiled(n: int, d: int, v: int, chip: Chip) -> Count:
    """torch.compile of the eager head: 16-bit logits, read once for their sums and once for the gradient by them."""
    operands, logits = 2 * (n * d + v * d), n * v
    forward = [Phase(1, operands + 2 * logits), Phase(0, 2 * logits)]
    return Count(forward, [Phase(0, 4 * logits), *2 * [Phase(1, operands + 2 * logits)]], 4 * logits)


def liger(n: int, d: int, v: int, chip: Chip) -> Count:
    """Fused linear cross-entropy with reduction="none": chunks forward, recomputed backward for per-token gradients."""
    operands, logits = 2 * (n * d + v * d), n * v
    product = Phase(1, operands + 2 * logits)
    return Count([product, Phase(0, 2 * logits)], [product, Phase(0, 6 * logits), product, product], 2 * logits / 8)


def quack(n: int, d: int, v: int, chip: Chip) -> Count:
    """Chunks of a mean or a sum, whose gradient is made in the forward; dW summed in its own dtype a chunk."""
    operands, logits, chunks = 2 * (n * d + v * d), n * v, math.ceil(n / 4096)
    by_weight = Phase(1, operands + 2 * logits + 4 * v * d * chunks)
    made = [Phase(1, operands + 2 * logits), Phase(0, 4 * logits), Phase(1, operands + 2 * logits), by_weight]
    return Count(made, sums=2 * logits / chunks)


def cce(kept: float) -> Algorithm:
    """Tiles of 128 × 128: recompute, then two products of the share of tiles that its filter keeps, summed in place."""

    def count(n: int, d: int, v: int, chip: Chip) -> Count:
        operands = 2 * (n * d + v * d)
        added = 2 * 2 * d * kept * (v * math.ceil(n / 128) + n * math.ceil(v / 128))
        return Count(
            [Phase(1, operands, "head_stats")], [Phase(1, operands, "dlogits"), Phase(2 * kept, added, "product")]
        )

    return count


ALGORITHMS: dict[str, Algorithm] = {
    "tvkd_fast, loss known": ours_known(WORKSPACE_MB["triton"] * 2**20),
    "tvkd_fast, loss known, 4 GiB": ours_known(2**32),
    "tvkd_fast, exact": ours,
    "tvkd_fast, exact, exponentials kept": ours_kept,
    "tvkd_fast, sparse 2^-14": ours_sparse,
    "eager": eager,
    "torch.compile": compiled,
    "Liger, per-token gradients": liger,
    "QuACK, mean or sum": quack,
    "CCE, no tile skipped": cce(1.0),
    "CCE, nine tiles in ten skipped": cce(0.1),
    "tvkd_fast, frozen head": ours_frozen,
    "eager, frozen head": eager_frozen,
    "tvkd_fast, values": ours_values,
}

ASSUMPTIONS = (
    "limits: A100 312 TFLOP/s and 2.04 TB/s, H100 989 and 3.35, H200 989 and 4.8 (dense bf16, SXM, NVIDIA's data "
    "sheets)",
    f"a product of the library's takes {LIBRARY:.0%} of that rate, the main loop of one of ours {KERNEL:.0%} of the "
    "library's, CCE's kernels as ours",
    "behind each of our tiles the instructions that the census counted, at four a cycle and multiprocessor, hidden by "
    "nothing where one program fills it",
    "ours: weight comes from memory once per group of row tiles, hidden once per launch, dlogits are written once and "
    f"read twice in blocks of {WORKSPACE // 2**20} MiB; float32 sums are read and written once per block",
    "a loss that is known: float32 logits written once and read twice, the gradient by them written once, float32 sums "
    "of dW read and written once per block of rows",
    f"values by the library's products from D = {LEAST_WIDTH:,} on: float32 logits written once and read once",
    f"sparse: {ENTRIES} entries per token; dense columns hold of them what they held of one model's, at the same share "
    "of the vocabulary; the rest is gathered at the memory's full rate",
    "eager, torch.compile, Liger and QuACK: operands once per product, logits as often as their steps read and write "
    "them, in 16 bits; their chunks are assumed to cost nothing else",
    "CCE: both gradients are read and written for every tile kept, as memory traffic, though L2 holds much of it",
    "no launches, latency, partial waves or clock limits: a lower bound, for comparing algorithms",
)


@dataclass(frozen=True)
class Estimate:
    chip: str
    shape: tuple[int, int, int]
    algorithm: str
    products: float
    forward_ms: float
    backward_ms: float
    over_product: float
    """Whole over one product of the library's."""
    held_mib: float


def estimate(chip: Chip, shape: tuple[int, int, int], name: str, epilogues: Mapping[tuple[str, str], int]) -> Estimate:
    """`epilogues`: instructions behind a tile's product by kernel and target."""
    n, d, v = shape
    unit = 2 * n * d * v / (chip.flops * LIBRARY)

    def seconds(phase: Phase) -> float:
        of_products = phase.products * unit
        if phase.kernel is not None:
            tiles = choose(phase.kernel, chip.target, Demand())
            count = math.ceil(n / tiles.block_m) * math.ceil(v / tiles.block_n) * phase.products
            behind = issue_cycles(epilogues.get((phase.kernel, chip.target), 0), tiles.warps)
            of_products = of_products / KERNEL + count * behind / (chip.processors * chip.clock)
        return max(of_products, phase.bytes / chip.bandwidth)

    counted = ALGORITHMS[name](n, d, v, chip)
    before, after = (1e3 * sum(map(seconds, phases)) for phases in (counted.forward, counted.backward))
    return Estimate(
        chip=chip.name,
        shape=shape,
        algorithm=name,
        products=sum(phase.products for phase in (*counted.forward, *counted.backward)),
        forward_ms=before,
        backward_ms=after,
        over_product=(before + after) / (1e3 * unit),
        held_mib=counted.sums / 2**20,
    )


def estimates(epilogues: Mapping[tuple[str, str], int]) -> list[Estimate]:
    return [estimate(chip, shape, name, epilogues) for shape in SHAPES for chip in CHIPS for name in ALGORITHMS]
