"""Tile sizes: a table of one row per kernel, target and shape of a demand, which `python -m bench.census` compiles.

Each row has the largest tile that spills no register: a tile of M × N reads (M + N)/(M·N) operand entries per
multiply-add. docs/kernels.md shows what each row compiles to, and the larger tiles that did not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from tvkd_fast.kernels.releases import RELEASE, Release

Kernel = Literal[
    "head_stats", "selection_bits", "exponentials", "dlogits", "product", "joint_stats", "joint_values", "joint_dlogits"
]


# Passed with every launch and in the census: the default changes between releases (Triton 3.9 fuses and warns that 3.10
# will not), so an upgrade would silently change last digits and registers. Fused, a product is added unrounded: one
# rounding less, and one instruction.
FP_FUSION = {"enable_fp_fusion": True}

UNTILED = {"num_warps": 4}
"""The compiler's options for kernels without a product."""


@dataclass(frozen=True)
class TileConfig:
    """A kernel's output tile, block_m × block_n, and its step of the inner dimension, block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    bulk: bool = False
    """Operands are loaded through tensor descriptors (TMA), not by pointer (cp.async, or plain loads)."""
    group: int = 8
    """Rows of tiles that are taken column by column together, so that they share operands in L2."""
    split_tiles: int = 4
    """head_stats: column tiles that one program reduces before it writes its partial sums."""

    @property
    def switches(self) -> dict[str, Any]:
        """The compile-time arguments that all kernels with a product share."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "BULK": self.bulk,
        }

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, except those that all launches share (`FP_FUSION`)."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Demand:
    """The properties of a launch that its tiles depend on."""

    wide: bool = False
    """float32 operands: twice the bytes, three products each."""
    heavy: bool = False
    """The epilogue holds a second number for each of the tile's: softcap's derivative, or entropy's product."""
    bias: bool = False
    aligned: bool = True
    """Alignment by `launch.aligned`: copies of 16 bytes, and bulk ones, can be compiled."""

    @property
    def names(self) -> set[str]:
        """Return the properties that a shape of the table may name."""
        asked = {"unaligned": not self.aligned, "wide": self.wide, "heavy": self.heavy, "bias": self.bias}
        return {name for name, wanted in asked.items() if wanted}


TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
"""Families of devices that share a row; sm_86 stands for those with 99 KiB of shared memory (8.6, 8.9, 12.0)."""

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""Shared memory (LDS) that one program may hold."""

BULK_TARGETS = ("sm_90", "sm_100")

INTERPRETED = TileConfig(32, 64, 32, warps=4, stages=1, group=2, split_tiles=2)
"""Under Triton's interpreter: small, so that small shapes have many tiles, whole ones and partial ones."""

Shape = Literal[
    "unaligned wide", "unaligned", "wide heavy bias", "wide heavy", "wide", "heavy bias", "heavy", "bias", "plain"
]
SHAPES: tuple[Shape, ...] = get_args(Shape)
"""Classes of demands by what they name, in the order in which a demand looks for its row."""


class Row(NamedTuple):
    """The tiles of a kernel on a target for demands of a shape, and the census of the binaries that take them.

    The census is bench/results/census.json, over all dtypes and architectures of the row; no binary spills.
    """

    kernel: Kernel
    target: str
    shape: Shape
    tiles: TileConfig
    registers: int | None
    """Most registers per thread (vector registers on gfx942); None where no op launches the kernel so."""
    shared_kib: int | None
    """Most shared memory per program."""


# fmt: off
TABLE = (
    # head_stats. What would not fit: 128×256×64 spills 25 times on sm_100 with softcap and entropy; 128×128×32 13 times
    # on sm_80 with a bias and a softcap.
    Row("head_stats", "sm_80", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 228, 12),
    Row("head_stats", "sm_80", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 179, 8),
    Row("head_stats", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 218, 36),
    Row("head_stats", "sm_80", "heavy bias", TileConfig(128, 64, 64, warps=8, stages=3), 200, 48),
    Row("head_stats", "sm_80", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("head_stats", "sm_80", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 237, 48),
    Row("head_stats", "sm_80", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 254, 64),
    Row("head_stats", "sm_86", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 235, 12),
    Row("head_stats", "sm_86", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 128, 6),
    Row("head_stats", "sm_86", "wide heavy bias", TileConfig(64, 128, 16, warps=8, stages=4), 218, 36),
    Row("head_stats", "sm_86", "wide heavy", TileConfig(64, 64, 32, warps=8, stages=2), 255, 16),
    Row("head_stats", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 172, 36),
    Row("head_stats", "sm_86", "heavy bias", TileConfig(128, 64, 64, warps=8, stages=3), 200, 48),
    Row("head_stats", "sm_86", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("head_stats", "sm_86", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 237, 48),
    Row("head_stats", "sm_86", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 254, 64),
    Row("head_stats", "sm_90", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 176, 20),
    Row("head_stats", "sm_90", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 145, 8),
    Row("head_stats", "sm_90", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 255, 97),
    Row("head_stats", "sm_90", "bias", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 179, 129),
    Row("head_stats", "sm_90", "plain", TileConfig(128, 256, 64, warps=8, stages=4, bulk=True), 255, 193),
    Row("head_stats", "sm_100", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 141, 21),
    Row("head_stats", "sm_100", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 169, 17),
    Row("head_stats", "sm_100", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 255, 97),
    Row("head_stats", "sm_100", "heavy", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 209, 129),
    Row("head_stats", "sm_100", "bias", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 208, 129),
    Row("head_stats", "sm_100", "plain", TileConfig(128, 256, 64, warps=8, stages=4, bulk=True), 255, 193),
    Row("head_stats", "gfx942", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 142, 12),
    Row("head_stats", "gfx942", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 130, 4),
    Row("head_stats", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 114, 8),
    Row("head_stats", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 194, 32),
    # selection_bits. It holds a second sum and bits beside what head_stats holds, so heavy demands take half a tile.
    Row("selection_bits", "sm_80", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 239, 12),
    Row("selection_bits", "sm_80", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 188, 8),
    Row("selection_bits", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 238, 36),
    Row("selection_bits", "sm_80", "heavy", TileConfig(128, 64, 64, warps=8, stages=3), 240, 48),
    Row("selection_bits", "sm_80", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("selection_bits", "sm_80", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 255, 64),
    Row("selection_bits", "sm_86", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 241, 12),
    Row("selection_bits", "sm_86", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 191, 8),
    Row("selection_bits", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 240, 36),
    Row("selection_bits", "sm_86", "heavy", TileConfig(128, 64, 64, warps=8, stages=3), 254, 48),
    Row("selection_bits", "sm_86", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("selection_bits", "sm_86", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 244, 64),
    Row("selection_bits", "sm_90", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 184, 20),
    Row("selection_bits", "sm_90", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 165, 8),
    Row("selection_bits", "sm_90", "wide heavy", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 191, 89),
    Row("selection_bits", "sm_90", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 232, 97),
    Row("selection_bits", "sm_90", "heavy", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 186, 97),
    Row("selection_bits", "sm_90", "bias", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 179, 129),
    Row("selection_bits", "sm_90", "plain", TileConfig(128, 256, 64, warps=8, stages=3, bulk=True), 254, 145),
    Row("selection_bits", "sm_100", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 157, 21),
    Row("selection_bits", "sm_100", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 202, 17),
    Row("selection_bits", "sm_100", "wide heavy", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 207, 89),
    Row("selection_bits", "sm_100", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 232, 97),
    Row("selection_bits", "sm_100", "heavy", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 221, 97),
    Row("selection_bits", "sm_100", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 234, 129),
    Row("selection_bits", "gfx942", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 174, 12),
    Row("selection_bits", "gfx942", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 167, 4),
    Row("selection_bits", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 167, 8),
    Row("selection_bits", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 255, 32),
    # exponentials.
    Row("exponentials", "sm_80", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 184, 12),
    Row("exponentials", "sm_80", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 127, 8),
    Row("exponentials", "sm_80", "wide heavy bias", TileConfig(128, 64, 16, warps=8, stages=4), 128, 36),
    Row("exponentials", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 142, 36),
    Row("exponentials", "sm_80", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 250, 48),
    Row("exponentials", "sm_80", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 209, 48),
    Row("exponentials", "sm_80", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 220, 64),
    Row("exponentials", "sm_86", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 185, 12),
    Row("exponentials", "sm_86", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 127, 8),
    Row("exponentials", "sm_86", "wide heavy bias", TileConfig(64, 64, 32, warps=8, stages=2), 247, 16),
    Row("exponentials", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 165, 36),
    Row("exponentials", "sm_86", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 253, 48),
    Row("exponentials", "sm_86", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 210, 48),
    Row("exponentials", "sm_86", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 220, 64),
    Row("exponentials", "sm_90", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 131, 20),
    Row("exponentials", "sm_90", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 109, 8),
    Row("exponentials", "sm_90", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 255, 97),
    Row("exponentials", "sm_90", "heavy", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 223, 129),
    Row("exponentials", "sm_90", "plain", TileConfig(256, 128, 64, warps=8, stages=4, bulk=True), 255, 193),
    Row("exponentials", "sm_100", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 99, 21),
    Row("exponentials", "sm_100", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 128, 17),
    Row("exponentials", "sm_100", "wide heavy bias", TileConfig(64, 64, 32, warps=8, stages=4, bulk=True), 80, 65),
    Row("exponentials", "sm_100", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 242, 97),
    Row("exponentials", "sm_100", "heavy bias", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 127, 97),
    Row("exponentials", "sm_100", "heavy", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 210, 129),
    Row("exponentials", "sm_100", "bias", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 193, 129),
    Row("exponentials", "sm_100", "plain", TileConfig(256, 128, 64, warps=8, stages=3, bulk=True), 255, 145),
    Row("exponentials", "gfx942", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 96, 12),
    Row("exponentials", "gfx942", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 84, 4),
    Row("exponentials", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 80, 8),
    Row("exponentials", "gfx942", "plain", TileConfig(64, 128, 64, warps=8, stages=2), 90, 24),
    # dlogits. What would not fit: 128×256×64 spills 342 times with a softcap on sm_90, and 163 times without one on
    # sm_100.
    Row("dlogits", "sm_80", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 176, 12),
    Row("dlogits", "sm_80", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 113, 8),
    Row("dlogits", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 128, 36),
    Row("dlogits", "sm_80", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("dlogits", "sm_80", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 187, 48),
    Row("dlogits", "sm_80", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 196, 64),
    Row("dlogits", "sm_86", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 178, 12),
    Row("dlogits", "sm_86", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 80, 8),
    Row("dlogits", "sm_86", "wide heavy bias", TileConfig(64, 64, 32, warps=8, stages=2), 243, 16),
    Row("dlogits", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 128, 36),
    Row("dlogits", "sm_86", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("dlogits", "sm_86", "bias", TileConfig(128, 128, 32, warps=8, stages=4), 228, 48),
    Row("dlogits", "sm_86", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 204, 64),
    Row("dlogits", "sm_90", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 112, 20),
    Row("dlogits", "sm_90", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 80, 8),
    Row("dlogits", "sm_90", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 254, 97),
    Row("dlogits", "sm_90", "heavy", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 247, 129),
    Row("dlogits", "sm_90", "plain", TileConfig(128, 256, 64, warps=8, stages=4, bulk=True), 255, 193),
    Row("dlogits", "sm_100", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 73, 21),
    Row("dlogits", "sm_100", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 101, 17),
    Row("dlogits", "sm_100", "wide heavy bias", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 122, 89),
    Row("dlogits", "sm_100", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 247, 97),
    Row("dlogits", "sm_100", "heavy", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 255, 129),
    Row("dlogits", "sm_100", "bias", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 210, 129),
    Row("dlogits", "sm_100", "plain", TileConfig(256, 128, 64, warps=8, stages=3, bulk=True), 252, 145),
    Row("dlogits", "gfx942", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 88, 12),
    Row("dlogits", "gfx942", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 86, 4),
    Row("dlogits", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 90, 8),
    Row("dlogits", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 136, 32),
    # product. What would not fit: 128×256 spills 54 times on sm_80 and sm_90 and 46 times on sm_100; five stages take
    # more than 99 KiB on 8.6. No op launches it as heavy or with a bias, so the census has no binary of those rows.
    Row("product", "sm_80", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 173, 12),
    Row("product", "sm_80", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 128, 16),
    Row("product", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 147, 36),
    Row("product", "sm_80", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), None, None),
    Row("product", "sm_80", "bias", TileConfig(128, 128, 32, warps=8, stages=4), None, None),
    Row("product", "sm_80", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 210, 64),
    Row("product", "sm_86", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 173, 12),
    Row("product", "sm_86", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 128, 16),
    Row("product", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 164, 36),
    Row("product", "sm_86", "heavy", TileConfig(128, 128, 32, warps=8, stages=4), None, None),
    Row("product", "sm_86", "bias", TileConfig(128, 128, 32, warps=8, stages=4), None, None),
    Row("product", "sm_86", "plain", TileConfig(128, 128, 64, warps=8, stages=3), 210, 64),
    Row("product", "sm_90", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 114, 20),
    Row("product", "sm_90", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 115, 16),
    Row("product", "sm_90", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 218, 97),
    Row("product", "sm_90", "plain", TileConfig(256, 128, 64, warps=8, stages=4, bulk=True), 247, 193),
    Row("product", "sm_100", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 79, 21),
    Row("product", "sm_100", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 80, 17),
    Row("product", "sm_100", "wide", TileConfig(128, 128, 32, warps=8, stages=3, bulk=True), 202, 97),
    Row("product", "sm_100", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 170, 129),
    Row("product", "gfx942", "unaligned wide", TileConfig(64, 32, 32, warps=8, stages=2), 92, 12),
    Row("product", "gfx942", "unaligned", TileConfig(64, 64, 32, warps=8, stages=2), 54, 16),
    Row("product", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 64, 16),
    Row("product", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 130, 32),
    # joint_stats. With labels 128×128×64 spills 33 times on sm_90; a second stage spills scalar registers on gfx942.
    Row("joint_stats", "sm_80", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 235, 6),
    Row("joint_stats", "sm_80", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 255, 12),
    Row("joint_stats", "sm_80", "wide", TileConfig(64, 64, 16, warps=8, stages=4), 172, 24),
    Row("joint_stats", "sm_80", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 217, 32),
    Row("joint_stats", "sm_80", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 234, 48),
    Row("joint_stats", "sm_86", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 239, 6),
    Row("joint_stats", "sm_86", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 255, 12),
    Row("joint_stats", "sm_86", "wide", TileConfig(64, 64, 16, warps=8, stages=4), 172, 24),
    Row("joint_stats", "sm_86", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 234, 32),
    Row("joint_stats", "sm_86", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 246, 48),
    Row("joint_stats", "sm_90", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 198, 12),
    Row("joint_stats", "sm_90", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 237, 89),
    Row("joint_stats", "sm_90", "heavy", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 233, 97),
    Row("joint_stats", "sm_90", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 255, 129),
    Row("joint_stats", "sm_100", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 151, 11),
    Row("joint_stats", "sm_100", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 254, 89),
    Row("joint_stats", "sm_100", "plain", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 255, 97),
    Row("joint_stats", "gfx942", "unaligned", TileConfig(64, 32, 16, warps=8, stages=1), 166, 4),
    Row("joint_stats", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 186, 8),
    Row("joint_stats", "gfx942", "heavy", TileConfig(128, 64, 64, warps=8, stages=1), 186, 16),
    Row("joint_stats", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 238, 32),
    # joint_values. What would not fit: 128×64×64 spills 95 times on sm_90 where all sums are asked for.
    Row("joint_values", "sm_80", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 238, 6),
    Row("joint_values", "sm_80", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 255, 12),
    Row("joint_values", "sm_80", "wide", TileConfig(64, 64, 16, warps=8, stages=4), 255, 24),
    Row("joint_values", "sm_80", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 243, 32),
    Row("joint_values", "sm_80", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 255, 48),
    Row("joint_values", "sm_86", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 220, 6),
    Row("joint_values", "sm_86", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 225, 12),
    Row("joint_values", "sm_86", "wide", TileConfig(64, 64, 16, warps=8, stages=4), 243, 24),
    Row("joint_values", "sm_86", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 245, 32),
    Row("joint_values", "sm_86", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 255, 48),
    Row("joint_values", "sm_90", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 204, 12),
    Row("joint_values", "sm_90", "wide heavy", TileConfig(64, 64, 32, warps=8, stages=4, bulk=True), 211, 65),
    Row("joint_values", "sm_90", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 243, 89),
    Row("joint_values", "sm_90", "heavy", TileConfig(64, 64, 64, warps=8, stages=4, bulk=True), 191, 65),
    Row("joint_values", "sm_90", "plain", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 205, 97),
    Row("joint_values", "sm_100", "unaligned", TileConfig(64, 32, 16, warps=8, stages=2), 128, 11),
    Row("joint_values", "sm_100", "wide heavy", TileConfig(64, 64, 32, warps=8, stages=3, bulk=True), 148, 49),
    Row("joint_values", "sm_100", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 194, 89),
    Row("joint_values", "sm_100", "heavy", TileConfig(64, 64, 64, warps=8, stages=4, bulk=True), 148, 65),
    Row("joint_values", "sm_100", "plain", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 198, 97),
    Row("joint_values", "gfx942", "unaligned", TileConfig(64, 32, 16, warps=8, stages=1), 172, 4),
    Row("joint_values", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=1), 166, 4),
    Row("joint_values", "gfx942", "heavy", TileConfig(128, 64, 64, warps=8, stages=1), 196, 16),
    Row("joint_values", "gfx942", "plain", TileConfig(128, 64, 64, warps=8, stages=1), 166, 16),
    # joint_dlogits. What would not fit: 128×128×32 spills 6 times on sm_80 with logarithms and biases.
    Row("joint_dlogits", "sm_80", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 251, 12),
    Row("joint_dlogits", "sm_80", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 229, 12),
    Row("joint_dlogits", "sm_80", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 185, 36),
    Row("joint_dlogits", "sm_80", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 146, 32),
    Row("joint_dlogits", "sm_80", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 190, 48),
    Row("joint_dlogits", "sm_86", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 251, 12),
    Row("joint_dlogits", "sm_86", "wide heavy", TileConfig(64, 32, 32, warps=8, stages=2), 229, 12),
    Row("joint_dlogits", "sm_86", "wide", TileConfig(64, 128, 16, warps=8, stages=4), 192, 36),
    Row("joint_dlogits", "sm_86", "heavy", TileConfig(64, 64, 64, warps=8, stages=3), 150, 32),
    Row("joint_dlogits", "sm_86", "plain", TileConfig(128, 64, 64, warps=8, stages=3), 210, 48),
    Row("joint_dlogits", "sm_90", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 142, 20),
    Row("joint_dlogits", "sm_90", "wide heavy", TileConfig(64, 64, 32, warps=8, stages=4, bulk=True), 187, 65),
    Row("joint_dlogits", "sm_90", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 213, 89),
    Row("joint_dlogits", "sm_90", "heavy", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 191, 97),
    Row("joint_dlogits", "sm_90", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 254, 129),
    Row("joint_dlogits", "sm_100", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 121, 21),
    Row("joint_dlogits", "sm_100", "wide heavy", TileConfig(64, 64, 32, warps=8, stages=3, bulk=True), 136, 49),
    Row("joint_dlogits", "sm_100", "wide", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 175, 89),
    Row("joint_dlogits", "sm_100", "heavy", TileConfig(128, 64, 64, warps=8, stages=4, bulk=True), 245, 97),
    Row("joint_dlogits", "sm_100", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 247, 129),
    Row("joint_dlogits", "gfx942", "unaligned", TileConfig(64, 32, 32, warps=8, stages=2), 198, 12),
    Row("joint_dlogits", "gfx942", "wide heavy", TileConfig(64, 32, 16, warps=4, stages=2), 200, 6),
    Row("joint_dlogits", "gfx942", "wide", TileConfig(64, 64, 16, warps=4, stages=2), 132, 8),
    Row("joint_dlogits", "gfx942", "heavy", TileConfig(128, 64, 64, warps=8, stages=2), 198, 24),
    Row("joint_dlogits", "gfx942", "plain", TileConfig(128, 128, 64, warps=8, stages=2), 198, 32),
)
# fmt: on

# fmt: off
# selection_bits of the table spill 42 times on sm_90 under 3.6 and 58 under 3.7, 2 to 13 in float32, and 6 on 12.0.
_OLDER_SELECTION = (
    Row("selection_bits", "sm_80", "wide heavy", TileConfig(128, 64, 16, warps=8, stages=4), 235, 36),
    Row("selection_bits", "sm_86", "wide heavy", TileConfig(128, 64, 16, warps=8, stages=4), 240, 36),
    Row("selection_bits", "sm_86", "plain", TileConfig(128, 128, 32, warps=8, stages=4), 255, 48),
    Row("selection_bits", "sm_90", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 203, 129),
)
OLDER: dict[Release, tuple[Row, ...]] = {
    (3, 6): _OLDER_SELECTION,
    (3, 7): _OLDER_SELECTION,
    # Those of the table spill 2 to 18 times; under 3.6 and 3.7 they do not, and some of these would.
    (3, 8): (
        *_OLDER_SELECTION,
        Row("head_stats", "sm_86", "wide heavy", TileConfig(64, 64, 16, warps=8, stages=4), 170, 32),
        Row("head_stats", "sm_100", "wide heavy", TileConfig(128, 64, 32, warps=8, stages=4, bulk=True), 188, 89),
        Row("head_stats", "sm_100", "plain", TileConfig(128, 128, 64, warps=8, stages=3, bulk=True), 180, 97),
        Row("exponentials", "sm_100", "plain", TileConfig(128, 128, 64, warps=8, stages=4, bulk=True), 166, 129),
        Row("joint_stats", "sm_80", "wide heavy", TileConfig(32, 64, 32, warps=8, stages=2), 255, 24),
        Row("joint_stats", "sm_86", "wide heavy", TileConfig(64, 32, 16, warps=4, stages=4), 243, 24),
        Row("joint_stats", "sm_100", "heavy", TileConfig(64, 64, 64, warps=8, stages=4, bulk=True), 170, 65),
        Row("joint_values", "sm_80", "wide heavy", TileConfig(64, 32, 16, warps=4, stages=4), 241, 24),
        Row("joint_values", "sm_80", "wide", TileConfig(64, 32, 32, warps=8, stages=2), 255, 24),
    ),
}
# fmt: on
"""Rows in place of TABLE's, or beside them, by release of Triton: another compiler holds less."""


@cache
def _rows(release: Release) -> dict[tuple[Kernel, str, Shape], Row]:
    return {(row.kernel, row.target, row.shape): row for row in (*TABLE, *OLDER.get(release, ()))}


def row_of(kernel: Kernel, target: str, demand: Demand, release: Release = RELEASE) -> Row:
    """The first row in the order of SHAPES that lists the kernel and target and names nothing beyond the demand."""
    rows = _rows(release)
    fitting = (shape for shape in SHAPES if shape == "plain" or demand.names.issuperset(shape.split()))
    return next(rows[kernel, target, shape] for shape in fitting if (kernel, target, shape) in rows)


def choose(kernel: Kernel, target: str, demand: Demand, release: Release = RELEASE) -> TileConfig:
    """The shipped tiles of a kernel on a target, under a release of Triton."""
    return INTERPRETED if target == "interpreter" else row_of(kernel, target, demand, release).tiles


def precision(dtype: torch.dtype, target: str) -> str:
    """tl.dot's input_precision. Triton's default for float32 is plain TF32: 10 bits of mantissa.

    Three TF32 products keep 21; CDNA's matrix cores multiply float32 itself. 16-bit operands are exact in either.
    """
    return "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"
