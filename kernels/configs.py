"""Tile sizes for each kernel, target and dtype, which `python -m bench.census` compiles and holds to its gates.

The largest tile that spills no register is taken: a tile of M × N reads (M + N)/(M·N) operand entries a multiply-add.
docs/kernels.md shows what each row compiles to, and the larger tiles that did not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Kernel = Literal["head_stats", "head_marks", "exponentials", "dlogits", "product"]


# Said with every launch and in the census. Left unsaid it is the release's choice: Triton 3.9 fuses and warns that 3.10
# will not, so an upgrade would move last digits and registers in silence. Fused, a product is added unrounded: one
# rounding less, and one instruction.
FP_FUSION = {"enable_fp_fusion": True}

UNTILED = {"num_warps": 4}
"""The compiler's options of kernels that walk no tiles of a product."""


@dataclass(frozen=True)
class TileConfig:
    """How a kernel walks: an output tile of block_m × block_n, block_k of the inner dimension a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    bulk: bool = False
    """Operands come through tensor descriptors (TMA) and not by pointer (cp.async, or plain loads)."""
    group: int = 8
    """Rows of tiles that go down a column together, so that they meet in L2."""
    split_tiles: int = 4
    """head_stats: column tiles that one program reduces before it writes its partial sums."""

    @property
    def switches(self) -> dict[str, Any]:
        """The compile-time arguments that all three kernels share."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "BULK": self.bulk,
        }

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, but for those that every launch has in common (`FP_FUSION`)."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Demand:
    """What a launch asks for, as far as its tiles depend on it."""

    wide: bool = False
    """float32 operands: twice the bytes, three products each."""
    heavy: bool = False
    """The epilogue holds a second number for each of the tile's: softcap's derivative, or entropy's product."""
    bias: bool = False
    aligned: bool = True
    """As `launch.aligned` has it: copies of 16 bytes, and bulk ones, can be compiled."""


TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
"""Families of devices that share a row; sm_86 stands for those with 99 KiB of shared memory (8.6, 8.9, 12.0)."""

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""Shared memory (LDS) that one program may hold."""

BULK_TARGETS = ("sm_90", "sm_100")

INTERPRETED = TileConfig(32, 64, 32, warps=4, stages=1, group=2, split_tiles=2)
"""Under Triton's interpreter: small, so that small shapes have many tiles, whole ones and partial ones."""

_AMPERE = TileConfig(128, 128, 64, warps=8, stages=3)
_AMPERE_SHORT = TileConfig(128, 128, 32, warps=8, stages=4)
_AMPERE_NARROW = TileConfig(128, 64, 64, warps=8, stages=3)
_AMPERE_WIDE = TileConfig(64, 128, 16, warps=8, stages=4)
_LONG = TileConfig(128, 256, 64, warps=8, stages=3, bulk=True)
_TALL = TileConfig(256, 128, 64, warps=8, stages=4, bulk=True)
_SQUARE = TileConfig(128, 128, 64, warps=8, stages=4, bulk=True)
_SQUARE_WIDE = TileConfig(128, 128, 32, warps=8, stages=3, bulk=True)
_NARROW = TileConfig(128, 64, 64, warps=8, stages=4, bulk=True)
_NARROW_WIDE = TileConfig(128, 64, 32, warps=8, stages=4, bulk=True)
_CDNA = TileConfig(128, 128, 64, warps=8, stages=2)
_CDNA_NARROW = TileConfig(64, 128, 64, warps=8, stages=2)
_CDNA_WIDE = TileConfig(64, 64, 16, warps=4, stages=2)
_UNALIGNED = TileConfig(64, 64, 32, warps=8, stages=2)
_UNALIGNED_WIDE = TileConfig(64, 32, 32, warps=8, stages=2)


_CROWDED = (("head_stats", "sm_86"), ("exponentials", "sm_100"), ("dlogits", "sm_100"))
"""Where a bias and a heavy epilogue together do not fit in the tile that either fits in."""


def choose(kernel: Kernel, target: str, demand: Demand) -> TileConfig:
    """The shipped tiles of a kernel on a target."""
    if target == "interpreter":
        return INTERPRETED
    if not demand.aligned:
        return _UNALIGNED_WIDE if demand.wide else _UNALIGNED
    if target == "gfx942":
        if demand.wide:
            return _CDNA_WIDE
        return _CDNA_NARROW if kernel == "exponentials" else _CDNA
    crowded = demand.heavy and (kernel == "head_marks" or (demand.bias and (kernel, target) in _CROWDED))
    if target not in BULK_TARGETS:
        if demand.wide:
            return _AMPERE_WIDE
        if crowded:
            return _AMPERE_NARROW
        return _AMPERE_SHORT if demand.bias or demand.heavy else _AMPERE
    if demand.wide:
        return _NARROW_WIDE if crowded else _SQUARE_WIDE
    if crowded:
        return _NARROW
    if kernel == "product" or (kernel == "head_marks" and not demand.bias):
        return _TALL if target == "sm_90" else _SQUARE
    if demand.bias or (demand.heavy and not (kernel == "head_stats" and target == "sm_90")):
        return _SQUARE
    if kernel == "exponentials":
        return _TALL if target == "sm_90" else _LONG
    # The deeper pipeline where it fits beside what the epilogue holds.
    return _LONG if (kernel, target) in (("head_stats", "sm_90"), ("dlogits", "sm_100")) else replace(_LONG, stages=4)


CANDIDATES = tuple(
    TileConfig(m, n, k, warps, stages, bulk)
    for m, n in ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64))
    for k in (32, 64)
    for warps, stages in ((4, 3), (8, 3), (8, 4))
    for bulk in (True, False)
)
"""What `kernels/autotune.py` times; those that a device cannot hold fall out there."""


def precision(dtype: torch.dtype, target: str) -> str:
    """tl.dot's input_precision. Triton's default for float32 is plain TF32: 10 bits of mantissa.

    Three TF32 products keep 21; CDNA's matrix cores multiply float32 itself. 16-bit operands are exact in either.
    """
    return "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"
