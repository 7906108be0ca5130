"""Every kernel that ships, compiled ahead of time for every target, and checked against gates.

    python -m bench.census                     print the table
    python -m bench.census --check             and exit 1 where a gate does not hold
    python -m bench.census --json FILE         and keep it (bench.tables adds it to docs/kernels.md)

Results for unchanged sources are kept in out/census. No GPU is needed, and nothing here is a timing. A row is a binary:
registers, stack, spills, shared memory and instructions are read from it with the tools that Triton's wheel carries.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.census.epilogue import TENSOR, epilogue
from bench.census.kept import kept
from bench.harness.machine import made_by, write_report
from tvkd_fast.kernels import block_divergences
from tvkd_fast.kernels.block_softmax import BLOCK, SCALE, SLACK, WARPS, block_exponentials_kernel
from tvkd_fast.kernels.configs import (
    FP_FUSION,
    SHARED_KIB,
    UNTILED,
    Demand,
    Kernel,
    TileConfig,
    choose,
    precision,
)
from tvkd_fast.kernels.dlogits import dlogits_kernel
from tvkd_fast.kernels.gathers import GatherConfig
from tvkd_fast.kernels.head_dhidden import (
    DHIDDEN_COLUMNS,
    DHIDDEN_ROWS,
    RESCALE_ROWS,
    dlogp_dhidden_kernel,
    exponentials_kernel,
    rescale_kernel,
)
from tvkd_fast.kernels.head_stats import MERGE_AT_ONCE, MERGE_ROWS, head_stats_kernel, merge_splits_kernel
from tvkd_fast.kernels.joint_dlogits import joint_dlogits_kernel
from tvkd_fast.kernels.joint_stats import joint_merge_kernel, joint_stats_kernel
from tvkd_fast.kernels.joint_values import joint_values_kernel
from tvkd_fast.kernels.logit_sums import BLOCK as SUMS_BLOCK
from tvkd_fast.kernels.logit_sums import WARPS as SUMS_WARPS
from tvkd_fast.kernels.logit_sums import logit_sums_kernel
from tvkd_fast.kernels.preference_epilogue import TERMINALS, preference_epilogue_kernel
from tvkd_fast.kernels.products import product_kernel
from tvkd_fast.kernels.selected_lists import COUNT_WORDS, LIST_WORDS, count_kernel, list_kernel
from tvkd_fast.kernels.selection_bits import selection_bits_kernel
from tvkd_fast.kernels.sparse_columns import sparse_columns_kernel
from tvkd_fast.kernels.sparse_rows import sparse_rows_kernel, wide_rows_kernel

TARGETS = {
    "sm_80": ("sm_80", GPUTarget("cuda", 80, 32)),
    "sm_86": ("sm_86", GPUTarget("cuda", 86, 32)),
    "sm_89": ("sm_86", GPUTarget("cuda", 89, 32)),
    "sm_90": ("sm_90", GPUTarget("cuda", 90, 32)),
    "sm_100": ("sm_100", GPUTarget("cuda", 100, 32)),
    "sm_120": ("sm_86", GPUTarget("cuda", 120, 32)),
    "gfx942": ("gfx942", GPUTarget("hip", "gfx942", 64)),
}
"""Architecture: the row of the configuration table that it takes, and Triton's name of it."""

HEAD_SIZES = (576, 2048, 4096)
"""Hidden sizes that share the binaries over the vocabulary: multiples of 16 and of every step of the inner dimension.
576 is not whole tiles wide: where products read by pointer, its own are those for an odd D."""
WIDE_SIZES = (8192, 16384)
"""Further sizes of the gathers, whose binaries are of one size each: the widest whole rows, and rows in tiles."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "head_stats": head_stats_kernel,
    "merge_splits": merge_splits_kernel,
    "selection_bits": selection_bits_kernel,
    "count": count_kernel,
    "list": list_kernel,
    "sparse_rows": sparse_rows_kernel,
    "wide_rows": wide_rows_kernel,
    "sparse_columns": sparse_columns_kernel,
    "dlogits": dlogits_kernel,
    "product": product_kernel,
    "exponentials": exponentials_kernel,
    "rescale": rescale_kernel,
    "dlogp_dhidden": dlogp_dhidden_kernel,
    "block_exponentials": block_exponentials_kernel,
    "logit_sums": logit_sums_kernel,
    "block_moments": block_divergences.block_moments_kernel,
    "block_gradient": block_divergences.block_gradient_kernel,
    "preference_epilogue": preference_epilogue_kernel,
    "joint_stats": joint_stats_kernel,
    "joint_merge": joint_merge_kernel,
    "joint_values": joint_values_kernel,
    "joint_dlogits": joint_dlogits_kernel,
}
JOINT = ("joint_stats", "joint_values", "joint_dlogits")
PRODUCTS = ("head_stats", "selection_bits", "dlogits", "product", "exponentials", *JOINT)
"""Kernels with a matrix product in them; the others have no main loop of loads and no tensor cores to use."""

_INTEGERS = {"ended": "i1", "is_sparse": "i8"}
_INTEGERS |= dict.fromkeys(("labels", "cu_seqlens", "cu_states", "starts", "counts", "order", "edges"), "i64")
_INTEGERS |= dict.fromkeys(
    ("words", "sparse_words", "columns", "rows", "row_hashes", "column_hashes", "spread_over"), "i32"
)
_MATRICES = ("hidden", "weight", "left", "right", "other_hidden", "other_weight")
_OPERANDS = (*_MATRICES, "bias", "other_bias", "dlogits", "exponentials", "grad_hidden", "grad_weight", "grad_bias")
_BLOCK_SUMS = ("shift", "total", "target")
_EPILOGUE_FLOATS = ("beta", "alpha", "gamma", "label_smoothing")
_ASKED = {
    "logps": ("HAS_LABELS",),
    "lse": (),
    "both sums": ("HAS_KAPPA",),
    "entropy": ("HAS_ENTROPY",),
    "logps and both sums": ("HAS_LABELS", "HAS_KAPPA"),
    "all sums": ("HAS_LABELS", "HAS_KAPPA", "HAS_ENTROPY"),
}
_ROWS = {"": (True, True), "odd D": (True, False), "unaligned": (False, False)}
"""Whether rows are aligned, as `launch.aligned` has it, and whether D is whole steps (tiles) and no load is masked."""
_JOINT_ASKED: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "joint_stats": {
        "light": {"divergences": ()},
        "heavy": {"all": ("LABELS", "ENTROPY", "SQUARES", "BIAS", "SOFTCAP")},
    },
    "joint_values": {
        "light": {"mixture, biases": ("LABELS", "MIXTURE", "BIAS")},
        "heavy": {"all": ("LABELS", "MIXTURE", "VARIATION", "POWER", "BIAS", "SOFTCAP")},
    },
    "joint_dlogits": {
        "light": {"differences": (), "logs, biases": ("LABELS", "LOGS", "BIAS", "COLUMN_SUMS")},
        "heavy": {"all": ("LABELS", "LOGS", "MIXTURE", "VARIATION", "POWER", "BIAS", "SOFTCAP", "COLUMN_SUMS")},
    },
}
"""Of a kernel over two heads, by its demand: the switches of the most code, and of the plainest walk the least."""
_JOINT_SWITCHES = {
    "joint_stats": ("LABELS", "ENTROPY", "SQUARES"),
    "joint_values": ("LABELS", "MIXTURE", "VARIATION", "POWER"),
    "joint_dlogits": ("LABELS", "LOGS", "MIXTURE", "VARIATION", "POWER", "COLUMN_SUMS"),
}
_OF_EITHER_HEAD = ("BIAS", "SOFTCAP")
_OF_BLOCKS = ("LABELS", "LOGS", "MIXTURE", "VARIATION", "POWER")
_FLOATS = ("logit_scale", "softcap", "kappa", "alpha", "eps")
_FLOATS += ("other_logit_scale", "other_softcap", "beta", "log_beta", "log_rest")
_SIZES = ("N", "V", "D", "M", "K", "R", "C", "W", "splits", "tiles", "vocab_start", "ignore_index", "first_column")
_SIZES += ("OTHER_D",)
_NUMBERS_PER_ROW = ("partials_stride", "factors_stride", "numbers_stride")
"""Strides of rows by rows, which are of any number."""


@dataclass(frozen=True)
class Build:
    """One binary: a kernel with its compile-time switches, for an architecture."""

    kernel: str
    target: str
    dtype: str
    variant: str
    switches: dict[str, Any]
    config: TileConfig | None = None
    out: str = "fp32"
    aligned: bool = True
    warps: int = UNTILED["num_warps"]
    """Warps of a kernel without a product."""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant} {self.dtype} {self.target}"

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, as `launch` passes them."""
        return ({"num_warps": self.warps} if self.config is None else self.config.options) | FP_FUSION


@dataclass(frozen=True)
class Facts:
    """The figures read from a build's binary."""

    registers: int
    stack: int
    spills: int
    """Instructions that store to or load from local memory (registers spilled, on AMD)."""
    shared: int
    """Bytes per program."""
    programs: int
    """Programs that a multiprocessor holds at once, as registers, shared memory and threads allow."""
    tensor: dict[str, int]
    """Matrix instructions by opcode."""
    bulk_loads: int
    wide_loads: int
    """Asynchronous copies of 16 bytes (global loads of 16 bytes on AMD)."""
    narrow_loads: int
    """Asynchronous copies of less."""
    exps: int
    length: int
    """Instructions."""
    epilogue: int
    """Instructions of a warp behind a tile's product (`bench/census/epilogue.py`); 0 where they were not counted."""


def builds(targets: tuple[str, ...] = tuple(TARGETS), dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[Build]:
    """All builds that ship, by target, dtype and set of switches.

    Where D is whole steps, each set of switches that an op can ask for is built. Where loads are masked, or narrow, the
    heaviest sets stand for the others: tests/kernels/test_census.py says why they may, and that they do. Of the kernels
    over two heads, whose sets are hundreds, the lightest and the heaviest are built at every tile.
    """
    for target, dtype in product(targets, dtypes):
        yield from _head_stats(target, dtype)
        yield from _dlogits(target, dtype)
        yield from _products(target, dtype)
        yield from _frozen_head(target, dtype)
        yield from _selection_bits(target, dtype)
        yield from _gathers(target, dtype)
        yield from _block_softmax(target, dtype)
        yield from _logit_sums(target, dtype)
        yield from _block_divergences(target, dtype)
        yield from _two_heads(target, dtype)
    for target in targets:
        yield from _merges(target)
        yield Build("count", target, "fp32", "plain", {"BLOCK": COUNT_WORDS})
        yield Build("list", target, "fp32", "plain", {"BLOCK": LIST_WORDS})
        yield from _epilogues(target)


def rejected() -> Iterator[Build]:
    """Larger tiles, or other settings, that were tried and break a gate: why the table is what it is."""
    long = TileConfig(128, 256, 64, warps=8, stages=4, bulk=True)
    square = TileConfig(128, 128, 64, warps=8, stages=3)
    tried = (
        ("head_stats", "logps", "bf16", "sm_90", replace(long, warps=4, stages=3)),
        ("head_stats", "entropy, softcap", "bf16", "sm_100", long),
        ("head_stats", "logps", "bf16", "sm_100", replace(square, bulk=True, warps=4, stages=4)),
        ("head_stats", "logps, unaligned", "bf16", "sm_90", square),
        ("head_stats", "logps, unaligned", "fp32", "sm_80", TileConfig(64, 64, 32, warps=8, stages=2)),
        ("head_stats", "logps, bias, softcap", "bf16", "sm_80", replace(square, block_k=32, stages=4)),
        ("head_stats", "lse, bias, softcap", "fp32", "sm_86", TileConfig(64, 64, 16, warps=8, stages=4)),
        ("head_stats", "all sums, softcap", "fp32", "sm_80", TileConfig(64, 128, 32, warps=8, stages=3)),
        ("selection_bits", "plain", "bf16", "sm_90", replace(long, block_m=256, block_n=128)),
        ("exponentials", "plain", "bf16", "sm_100", replace(long, stages=3)),
        ("dlogits", "plain", "bf16", "sm_100", replace(long, stages=3)),
        ("dlogits", "softcap", "bf16", "sm_90", long),
        ("product", "dW, last", "bf16", "sm_90", long),
        ("product", "dW, sum", "bf16", "sm_100", replace(long, stages=3)),
        ("product", "dW, sum", "bf16", "sm_80", TileConfig(128, 256, 32, warps=8, stages=3)),
        ("product", "dW, sum", "bf16", "sm_86", replace(square, stages=5)),
        ("joint_stats", "divergences", "bf16", "sm_100", replace(square, bulk=True, stages=4)),
        ("joint_stats", "all", "bf16", "sm_90", replace(square, bulk=True, stages=4)),
        ("joint_values", "all", "bf16", "sm_90", replace(square, block_n=64, bulk=True, stages=4)),
        ("joint_dlogits", "logs, biases", "bf16", "sm_80", replace(square, block_k=32, stages=4)),
    )
    for kernel, variant, dtype, target, config in tried:
        named = (x for x in builds((target,)) if (x.kernel, x.variant, x.dtype) == (kernel, variant, dtype))
        yield replace(next(named), config=config)


def _head_stats(target: str, dtype: str) -> Iterator[Build]:
    cases = [(asked, *head, "") for asked in ("logps", "lse", "both sums", "entropy") for head in _flags(2)]
    # The most that a light and a heavy epilogue can hold: no op asks for it, and a caller of the kernels may.
    for bias, rows in product((False, True), ("", "odd D")):
        cases += [("logps and both sums", bias, False, rows), ("all sums", bias, True, rows)]
    cases += [("logps", False, False, "unaligned"), ("all sums", True, True, "unaligned")]
    for asked, bias, softcap, rows in cases:
        heavy = softcap or "HAS_ENTROPY" in _ASKED[asked]
        config = _config("head_stats", target, dtype, rows, heavy=heavy, bias=bias)
        switches = {name: name in _ASKED[asked] for name in ("HAS_LABELS", "HAS_KAPPA", "HAS_ENTROPY")}
        switches |= {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "SPLIT_TILES": config.split_tiles}
        variant = _named(asked, "bias" * bias, "softcap" * softcap, rows)
        yield from _tiled("head_stats", target, dtype, variant, switches, config, rows)


def _dlogits(target: str, dtype: str) -> Iterator[Build]:
    cases = [(bias, softcap, "") for bias in ("", "frozen bias", "bias") for softcap in (False, True)]
    cases += [(bias, softcap, "odd D") for bias in ("", "bias") for softcap in (False, True)]
    cases += [("", False, "unaligned"), ("bias", True, "unaligned")]
    for bias, softcap, rows in cases:
        config = _config("dlogits", target, dtype, rows, heavy=softcap, bias=bool(bias))
        switches = {"HAS_BIAS": bool(bias), "HAS_SOFTCAP": softcap, "HAS_COLUMN_SUMS": bias == "bias"}
        variant = _named(bias, "softcap" * softcap, rows) or "plain"
        yield from _tiled("dlogits", target, dtype, variant, switches, config, rows)


def _products(target: str, dtype: str) -> Iterator[Build]:
    steps = {"first": (False, False), "sum": (True, False), "last": (True, True), "only": (False, True)}
    cases = [(step, "") for step in steps]
    cases += [(step, rows) for rows in ("odd D", "unaligned") for step in ("sum", "last")]
    for side, (step, rows) in product(("dH", "dW"), cases):
        previous, last = steps[step]
        config = _config("product", target, dtype, rows)
        switches = {"TRANSPOSED": side == "dW", "HAS_PREVIOUS": previous, "LAST": last}
        variant = _named(side, step, rows)
        yield from _tiled("product", target, dtype, variant, switches, config, rows, out=dtype if last else "fp32")


def _frozen_head(target: str, dtype: str) -> Iterator[Build]:
    cases = [(*head, rows) for rows in ("", "odd D") for head in _flags(2)]
    cases += [(False, False, "unaligned"), (True, True, "unaligned")]
    steps = {"STEP": 8, "SCALE": 2.0**11} if dtype == "fp16" else {"STEP": 16, "SCALE": 1.0}
    widths = set()
    for bias, softcap, rows in cases:
        config = _config("exponentials", target, dtype, rows, heavy=softcap, bias=bias)
        widths.add((config.block_n, _ROWS[rows][0]))
        switches = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, **steps}
        variant = _named("bias" * bias, "softcap" * softcap, rows) or "plain"
        yield from _tiled("exponentials", target, dtype, variant, switches, config, rows)
    for (width, aligned), held in product(sorted(widths), (False, True)):
        switches = {"HAS_HELD": held, "TILE": width, "BLOCK_M": RESCALE_ROWS}
        variant = _named("sum" if held else "first", f"{width} columns", "unaligned" * (not aligned))
        yield Build("rescale", target, dtype, variant, switches, aligned=aligned)
    for aligned, softcap in _flags(2):
        switches = {
            "HAS_SOFTCAP": softcap,
            "SCALE": steps["SCALE"],
            "BLOCK_M": DHIDDEN_ROWS,
            "BLOCK_N": DHIDDEN_COLUMNS,
        }
        variant = _named("softcap" * softcap, "unaligned" * (not aligned)) or "plain"
        yield Build("dlogp_dhidden", target, dtype, variant, switches, aligned=aligned)


def _selection_bits(target: str, dtype: str) -> Iterator[Build]:
    cases = [(*head, unbiased, "") for head in _flags(2) for unbiased in (False, True)]
    cases += [(bias, bias, bias, rows) for bias in (False, True) for rows in ("odd D", "unaligned")]
    cases.append((True, False, False, "odd D"))
    for bias, softcap, unbiased, rows in cases:
        config = _config("selection_bits", target, dtype, rows, heavy=softcap or unbiased, bias=bias)
        switches = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "UNBIASED": unbiased, "SPLIT_TILES": config.split_tiles}
        variant = _named("bias" * bias, "softcap" * softcap, "unbiased" * unbiased, rows) or "plain"
        yield from _tiled("selection_bits", target, dtype, variant, switches, config, rows)


def _two_heads(target: str, dtype: str) -> Iterator[Build]:
    for kernel, demand, rows in product(JOINT, ("light", "heavy"), _ROWS):
        sets = _JOINT_ASKED[kernel][demand]
        if rows:
            # Unaligned rows have one tile for either demand.
            sets = {} if rows == "unaligned" and demand == "light" else dict([list(sets.items())[-1]])
        for asked, on in sets.items():
            config = _config(kernel, target, dtype, rows, heavy=demand == "heavy", bias="BIAS" in on)
            switches: dict[str, Any] = {f"HAS_{name}": name in on for name in _JOINT_SWITCHES[kernel]}
            for name in _OF_EITHER_HEAD:
                switches |= {f"HAS_{name}": name in on, f"HAS_OTHER_{name}": name in on}
            if kernel != "joint_dlogits":
                switches["SPLIT_TILES"] = config.split_tiles
            yield from _tiled(kernel, target, dtype, _named(asked, rows), switches, config, rows)


def _block_softmax(target: str, dtype: str) -> Iterator[Build]:
    of = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for bias, softcap, aligned in _flags(3):
        switches = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "BLOCK": BLOCK, "SLACK": SLACK[of], "SCALE": SCALE[of]}
        variant = _named("bias" * bias, "softcap" * softcap, "unaligned" * (not aligned)) or "plain"
        yield Build("block_exponentials", target, dtype, variant, switches, aligned=aligned, warps=WARPS)


def _logit_sums(target: str, dtype: str) -> Iterator[Build]:
    """Of float32 products, whichever dtype the bias has; none for float32 states, of which the library makes none."""
    for bias, softcap, aligned in _flags(3) if dtype != "fp32" else ():
        switches = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "BLOCK": SUMS_BLOCK}
        variant = _named("bias" * bias, "softcap" * softcap, "unaligned" * (not aligned)) or "plain"
        yield Build("logit_sums", target, dtype, variant, switches, aligned=aligned, warps=SUMS_WARPS)


def _block_divergences(target: str, dtype: str) -> Iterator[Build]:
    """Yield the lightest set of switches and the heaviest, and the heaviest for rows that are not aligned."""
    heads = tuple(f"HAS_{other}{name}" for other in ("", "OTHER_") for name in _OF_EITHER_HEAD)
    names = (*heads, *(f"HAS_{name}" for name in _OF_BLOCKS))
    for kernel, (asked, aligned) in product(
        ("block_moments", "block_gradient"), (("divergences", True), ("all", True), ("all", False))
    ):
        switches: dict[str, Any] = dict.fromkeys(names, asked == "all")
        switches["BLOCK"] = block_divergences.BLOCK
        variant = _named(asked, "unaligned" * (not aligned))
        yield Build(kernel, target, dtype, variant, switches, aligned=aligned, warps=block_divergences.WARPS)


def _gathers(target: str, dtype: str) -> Iterator[Build]:
    """Yield one build per D, since a program holds whole rows; at one D for every head and side."""
    everything = [dict(zip(("HAS_BIAS", "HAS_SOFTCAP", "UNBIASED"), on, strict=True)) for on in _flags(3)]
    for size in (*HEAD_SIZES, *WIDE_SIZES):
        config = GatherConfig.of(size)
        whole, wide = size == HEAD_SIZES[1], config.tiles > 1
        heads = [(x, not wide, True) for x in (everything if whole else (everything[0], everything[-1]))]
        heads += [(everything[0], True, False), (everything[0], False, False)] * whole
        for head, grad, start in heads:
            names = [name.removeprefix("HAS_").lower() for name in head if head[name]]
            variant = _named(f"D = {size}", *names, "" if grad else "no dH", "sum" * start)
            switches = config.switches | head | {"HAS_GRAD": grad, "HAS_START": start}
            yield Build("sparse_rows", target, dtype, variant, switches, warps=config.warps)
        for start in (False, True) if wide else ():
            switches = config.switches | {"HAS_START": start}
            variant = _named(f"D = {size}", "sum" * start)
            yield Build("wide_rows", target, dtype, variant, switches, warps=config.warps)
        sides = [(grad, bias, start) for grad, bias, start in _flags(3) if grad or bias]
        for grad, bias, start in sides if whole else ((True, False, True), (True, True, True)):
            variant = _named(f"D = {size}", "bias" * bias, "" if grad else "no dW", "sum" * start)
            switches = config.switches | {"HAS_GRAD": grad, "HAS_BIAS": bias, "HAS_START": start}
            yield Build("sparse_columns", target, dtype, variant, switches, warps=config.warps)


def _flags(count: int) -> Iterator[tuple[bool, ...]]:
    yield from product((False, True), repeat=count)


def _named(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _config(
    kernel: Kernel, target: str, dtype: str, rows: str, *, heavy: bool = False, bias: bool = False
) -> TileConfig:
    return choose(kernel, TARGETS[target][0], Demand(dtype == "fp32", heavy, bias, aligned=_ROWS[rows][0]))


def _tiled(
    kernel: str,
    target: str,
    dtype: str,
    variant: str,
    switches: dict[str, Any],
    config: TileConfig,
    rows: str,
    out: str = "fp32",
) -> Iterator[Build]:
    """Yield one build, or none where no launch would use it: bulk copies mask nothing, and 16 divides an aligned D."""
    aligned, even = _ROWS[rows]
    name, step = ("EVEN_N", config.block_n) if kernel == "product" else ("EVEN_K", config.block_k)
    if even or not (config.bulk or (aligned and 16 % step == 0)):
        yield Build(kernel, target, dtype, variant, {name: even, **switches}, config, out, aligned)


def _merges(target: str) -> Iterator[Build]:
    for on in product((False, True), repeat=3):
        asked = dict(zip(("HAS_LABELS", "HAS_KAPPA", "HAS_ENTROPY"), on, strict=True))
        variant = _named(*(name.removeprefix("HAS_").lower() for name in asked if asked[name])) or "plain"
        yield Build("merge_splits", target, "fp32", variant, {"ROWS": MERGE_ROWS, "AT_ONCE": MERGE_AT_ONCE} | asked)
    for on in product((False, True), repeat=3):
        asked = dict(zip(("HAS_LABELS", "HAS_ENTROPY", "HAS_SQUARES"), on, strict=True))
        variant = _named(*(name.removeprefix("HAS_").lower() for name in asked if asked[name])) or "plain"
        yield Build("joint_merge", target, "fp32", variant, {"ROWS": MERGE_ROWS, "AT_ONCE": MERGE_AT_ONCE} | asked)


def _epilogues(target: str) -> Iterator[Build]:
    """Ψ's source: values by each terminal (only the last content state asks what ended), a ready Ψ, or none, DPO."""
    ended = {"HAS_VALUES": True, "HAS_PSI": False, "HAS_ENDED": True, "TERMINAL": TERMINALS[0]}
    sources = {"values, ended": ended}
    sources |= {f"values, {terminal}": ended | {"HAS_ENDED": False, "TERMINAL": terminal} for terminal in TERMINALS}
    sources["psi"] = ended | {"HAS_VALUES": False, "HAS_PSI": True, "HAS_ENDED": False}
    sources["DPO"] = sources["psi"] | {"HAS_PSI": False}
    for (variant, switches), per_token in product(sources.items(), (False, True)):
        switches = switches | {"REF_PER_TOKEN": per_token, "BLOCK": 1024}
        yield Build("preference_epilogue", target, "fp32", _named(variant, "ref tokens" * per_token), switches)


def compiled(build: Build) -> Facts:
    """Compile, and read the binary."""
    threads = build.options["num_warps"] * TARGETS[build.target][1].warp_size
    made = binary(build)
    return _nvidia(made, build.target, threads) if "cubin" in made.asm else _amd(made, threads)


def binary(build: Build) -> Any:
    """Triton's record of the compiled kernel."""
    kernel, config, switches = KERNELS[build.kernel], build.config, build.switches
    if config is not None:
        switches = config.switches | {"PRECISION": precision(DTYPES[build.dtype], TARGETS[build.target][0])} | switches
    signature = {name: "constexpr" if name in switches else _type(name, build) for name in kernel.arg_names}
    multiples = ("D", "N") if build.kernel == "product" else ("D", "OTHER_D")
    multiples += tuple(name for name in kernel.arg_names if name.endswith("_stride") and name not in _NUMBERS_PER_ROW)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if build.aligned and (signature[name].startswith("*") or name in multiples)
    }
    source = ASTSource(kernel, signature, switches, aligned)
    return triton.compile(source, target=TARGETS[build.target][1], options=build.options)


def _type(name: str, build: Build) -> str:
    """Triton's name of the type that a launch hands to the parameter."""
    if name.endswith("_ptr"):
        return _pointer(name.removesuffix("_ptr"), build)
    if build.kernel == "preference_epilogue" and name in _EPILOGUE_FLOATS:
        return "fp64"
    if name in _FLOATS:
        return "fp32"
    assert name in _SIZES or name.endswith("_stride"), f"{build.kernel}: no type is known for {name}"
    return "i32"


def _pointer(name: str, build: Build) -> str:
    if build.config is not None and build.config.bulk and name in _MATRICES:
        return f"tensordesc<{build.dtype}[{_block(name, build.config, build)}]>"
    if name in _INTEGERS:
        return f"*{_INTEGERS[name]}"
    if build.kernel == "block_exponentials" and name in _BLOCK_SUMS:
        return "*fp64"
    if name in _OPERANDS:
        return f"*{build.dtype}"
    return f"*{build.out if name == 'out' else 'fp32'}"


def _block(name: str, config: TileConfig, build: Build) -> str:
    sides = {
        "hidden": (config.block_m, config.block_k),
        "weight": (config.block_n, config.block_k),
        "other_hidden": (config.block_m, config.block_k),
        "other_weight": (config.block_n, config.block_k),
        "left": (config.block_m, config.block_k),
        "right": (config.block_k, config.block_n),
    }
    rows, columns = sides[name]
    if name == "left" and build.switches["TRANSPOSED"]:
        rows, columns = columns, rows
    return f"{rows},{columns}"


def _nvidia(binary: Any, target: str, threads: int) -> Facts:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    assert found is not None, sass[:1000]
    registers, stack = int(found[1]), int(found[2])
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    count = Counter(opcode.split(".")[0] for opcode in opcodes)
    copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
    wide = sum(".128" in opcode for opcode in copies)
    return Facts(
        registers=registers,
        stack=stack,
        spills=count["STL"] + count["LDL"],
        shared=binary.metadata.shared,
        programs=_programs(registers, threads, binary.metadata.shared, SHARED_KIB[TARGETS[target][0]]),
        tensor={name: count[name] for name in TENSOR if count[name]},
        bulk_loads=count["UTMALDG"],
        wide_loads=wide,
        narrow_loads=len(copies) - wide,
        exps=sum(opcode.startswith("MUFU.EX2") for opcode in opcodes),
        length=len(opcodes),
        epilogue=epilogue(sass),
    )


def _programs(registers: int, threads: int, shared: int, limit_kib: int) -> int:
    """64 Ki registers, allotted to a warp by 256; 2,048 threads; what shared memory a multiprocessor has."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * (threads // 32))
    by_shared = (limit_kib + 1) * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 2048 // threads)


def _amd(binary: Any, threads: int) -> Facts:
    text = binary.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    opcodes = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    count = Counter(opcodes)
    matrix = {name: number for name, number in count.items() if name.startswith("v_mfma")}
    loads = Counter(opcode for opcode in opcodes if re.match(r"(global|buffer)_load_\w*(dword|short|ubyte)", opcode))
    wide = sum(number for name, number in loads.items() if "dwordx4" in name)
    registers, shared = number("vgpr_count"), binary.metadata.shared
    waves = 512 // (-(-registers // 8) * 8) * 4 // (threads // 64)
    return Facts(
        registers=registers,
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared=shared,
        programs=min(waves, 64 * 1024 // max(shared, 1)),
        tensor={"MFMA": sum(matrix.values())} if matrix else {},
        bulk_loads=0,
        wide_loads=wide,
        narrow_loads=0,
        exps=count["v_exp_f32_e32"] + count["v_exp_f32_e64"],
        length=len(opcodes),
        epilogue=0,
    )


def broken_gates(build: Build, facts: Facts) -> list[str]:
    """The gates that a build breaks; empty if it may ship."""
    found = []
    limit = SHARED_KIB[TARGETS[build.target][0]]
    if facts.stack:
        found.append(f"{facts.stack} bytes of stack")
    if facts.spills:
        found.append(f"{facts.spills} spills")
    if facts.shared > limit * 1024:
        found.append(f"{facts.shared / 1024:.0f} KiB of shared memory, over {limit}")
    if build.kernel in PRODUCTS:
        if not facts.tensor:
            found.append("a product without tensor cores")
        # Rows that begin at odd addresses cannot be copied 16 bytes at a time.
        if build.aligned and not facts.bulk_loads and (not facts.wide_loads or facts.narrow_loads):
            found.append(f"{facts.narrow_loads} narrow and {facts.wide_loads} 16-byte loads in the main loop")
    return found


@dataclass(frozen=True)
class Row:
    build: Build
    facts: Facts
    broken: list[str] = field(default_factory=list)


def row(build: Build) -> Row:
    facts = kept(build, KERNELS[build.kernel], compiled, Facts)
    return Row(build, facts, broken_gates(build, facts))


def table(rows: list[Row]) -> str:
    head = f"{'kernel':<20}{'variant':<36}{'dtype':<6}{'target':<8}{'tile':<22}{'regs':>5}{'stack':>6}{'spill':>6}"
    head += f"{'KiB':>5}{'fit':>4}  {'matrix':<14}{'bulk':>5}{'16B':>5}{'exp':>5}{'instr':>7}{'behind':>7}"
    lines = [head]
    for x in rows:
        facts, build = x.facts, x.build
        matrix = " ".join(f"{name} {number}" for name, number in facts.tensor.items()) or "–"
        lines.append(
            f"{build.kernel:<20}{build.variant:<36}{build.dtype:<6}{build.target:<8}{tile(build.config):<22}"
            f"{facts.registers:>5}{facts.stack:>6}{facts.spills:>6}{facts.shared / 1024:>5.0f}{facts.programs:>4}  "
            f"{matrix:<14}{facts.bulk_loads:>5}{facts.wide_loads:>5}{facts.exps:>5}{facts.length:>7}{facts.epilogue:>7}"
            + "".join(f"  BROKEN: {gate}" for gate in x.broken)
        )
    return "\n".join(lines)


def tile(config: TileConfig | None) -> str:
    if config is None:
        return "–"
    return f"{config.block_m}x{config.block_n}x{config.block_k} {config.warps}w/{config.stages}s" + (
        " bulk" if config.bulk else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a gate does not hold")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only these")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only these")
    arguments = parser.parse_args()
    if not isinstance(head_stats_kernel, triton.JITFunction):
        raise SystemExit("TRITON_INTERPRET is set: the census compiles, so unset it")
    targets, dtypes = tuple(arguments.target or TARGETS), tuple(arguments.dtype or DTYPES)
    everything = (targets, dtypes) == (tuple(TARGETS), tuple(DTYPES))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row, builds(targets, dtypes), chunksize=4))
        unfit = list(pool.map(row, rejected())) if everything else []
    print(table(rows))
    if unfit:
        print(f"\nTried, and not shipped:\n{table(unfit)}\n")
    sizes = ", ".join(map(str, HEAD_SIZES))
    print(f"D of {sizes} share the binaries over the vocabulary: multiples of every step of the inner dimension")
    broken = [x for x in rows if x.broken]
    print(f"\n{len(rows)} binaries, {len(broken)} with a broken gate")
    report = {
        "rows": [asdict(x) for x in rows],
        "rejected": [asdict(x) for x in unfit],
        "made_by": made_by() | {"triton": triton.__version__},
    }
    write_report(report, arguments.json)
    if arguments.check and (broken or not all(x.broken for x in unfit)):
        raise SystemExit("a gate does not hold" if broken else "what was rejected would hold every gate: ship it")


if __name__ == "__main__":
    main()
