"""Every kernel that ships, compiled ahead of time for every target: what the compiler made of it, held to gates.

    python -m bench.census                     print the table
    python -m bench.census --check             and exit 1 where a gate does not hold
    python -m bench.census --json FILE         and keep it (docs/kernels.md shows docs/results/census.json)

No GPU is needed, and nothing here is a timing. A row is a binary: registers, stack, spills, shared memory and
instructions are read from it with the tools that Triton's wheel carries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine import made_by
from bench.roofline import ASSUMPTIONS, estimates, report_estimates
from tvkd_fast.kernels.configs import SHARED_KIB, Demand, TileConfig, choose, precision
from tvkd_fast.kernels.dlogits import dlogits_kernel
from tvkd_fast.kernels.head_stats import MERGE_ROWS, head_stats_kernel, merge_splits_kernel
from tvkd_fast.kernels.preference_epilogue import preference_epilogue_kernel
from tvkd_fast.kernels.products import product_kernel

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
"""Hidden sizes that share a binary: all are multiples of every step of the inner dimension, and of 16."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "head_stats": head_stats_kernel,
    "merge_splits": merge_splits_kernel,
    "dlogits": dlogits_kernel,
    "product": product_kernel,
    "preference_epilogue": preference_epilogue_kernel,
}
PRODUCTS = ("head_stats", "dlogits", "product")
"""Kernels with a matrix product in them; the others have no main loop of loads and no tensor cores to use."""

_INTEGERS = {"labels": "*i64", "cu_seqlens": "*i64", "cu_states": "*i64", "ended": "*i1"}
_OPERANDS = ("hidden", "weight", "bias", "left", "right", "dlogits")
_EPILOGUE_FLOATS = ("beta", "alpha", "gamma", "label_smoothing")
_FLOATS = ("logit_scale", "softcap", "kappa", "alpha")
_SIZES = ("N", "V", "D", "M", "K", "R", "C", "splits", "vocab_start", "ignore_index", "first_column")


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

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant} {self.dtype} {self.target}"


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a build."""

    registers: int
    stack: int
    spills: int
    """Instructions that store to or load from local memory (registers spilled, on AMD)."""
    shared: int
    """Bytes a program."""
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


def builds(targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Build]:
    """All that ships: by target, dtype, and what is asked of the kernel."""
    for target in targets:
        family = TARGETS[target][0]
        for dtype in DTYPES:
            demand = Demand(wide=dtype == "fp32")
            yield from _head_stats(target, family, dtype, demand)
            yield from _dlogits(target, family, dtype, demand)
            yield from _products(target, family, dtype, demand)
        yield Build(
            "merge_splits", target, "fp32", "all", {"BLOCK": MERGE_ROWS} | _asked(labels=True, kappa=True, entropy=True)
        )
        yield from _epilogues(target)


def rejected() -> Iterator[Build]:
    """Larger tiles, or other settings, that were tried and break a gate: why the table is what it is."""
    long = TileConfig(128, 256, 64, warps=8, stages=4, bulk=True)
    square = TileConfig(128, 128, 64, warps=8, stages=3)
    tried = (
        ("head_stats", "logps", "bf16", "sm_90", replace(long, warps=4, stages=3)),
        ("head_stats", "logps, softcap", "bf16", "sm_90", long),
        ("head_stats", "entropy", "bf16", "sm_90", long),
        ("head_stats", "entropy", "bf16", "sm_100", long),
        ("head_stats", "logps", "bf16", "sm_100", replace(square, bulk=True, warps=4, stages=4)),
        ("head_stats", "unaligned", "bf16", "sm_90", square),
        ("head_stats", "unaligned", "fp32", "sm_80", TileConfig(64, 64, 32, warps=8, stages=2)),
        ("dlogits", "softcap", "bf16", "sm_90", long),
        ("product", "dW, last", "bf16", "sm_90", long),
        ("product", "dW, sum", "bf16", "sm_100", replace(long, stages=3)),
        ("product", "dW, sum", "bf16", "sm_80", TileConfig(128, 256, 32, warps=8, stages=3)),
        ("product", "dW, sum", "bf16", "sm_86", replace(square, stages=5)),
    )
    for kernel, variant, dtype, target, config in tried:
        named = (x for x in builds((target,)) if (x.kernel, x.variant, x.dtype) == (kernel, variant, dtype))
        yield replace(next(named), config=config)


def _asked(*, labels: bool = True, kappa: bool = False, entropy: bool = False) -> dict[str, bool]:
    return {"HAS_LABELS": labels, "HAS_KAPPA": kappa, "HAS_ENTROPY": entropy}


def _head_stats(target: str, family: str, dtype: str, demand: Demand) -> Iterator[Build]:
    variants: dict[str, dict[str, bool]] = {
        "logps": {},
        "logps, softcap": {"softcap": True},
        "both sums": {"kappa": True},
        "both sums, softcap": {"softcap": True, "kappa": True},
        "entropy": {"entropy": True},
        "entropy, softcap": {"softcap": True, "entropy": True},
        "bias, softcap": {"bias": True, "softcap": True},
        "bias and all sums": {"bias": True, "entropy": True, "softcap": True, "kappa": True},
        "odd D": {"odd": True},
        "unaligned": {"unaligned": True},
    }
    for variant, wants in variants.items():
        heavy = wants.get("softcap", False) or wants.get("entropy", False)
        aligned = not wants.get("unaligned", False)
        bias = wants.get("bias", False)
        config = choose("head_stats", family, replace(demand, heavy=heavy, bias=bias, aligned=aligned))
        switches = {
            "SPLIT_TILES": config.split_tiles,
            "EVEN_K": aligned and not wants.get("odd", False),
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": wants.get("softcap", False),
            **_asked(kappa=wants.get("kappa", False), entropy=wants.get("entropy", False)),
        }
        yield Build("head_stats", target, dtype, variant, switches, config, aligned=aligned)


def _dlogits(target: str, family: str, dtype: str, demand: Demand) -> Iterator[Build]:
    for variant, softcap, bias, aligned in (
        ("plain", False, False, True),
        ("softcap", True, False, True),
        ("bias, softcap", True, True, True),
        ("unaligned", True, True, False),
    ):
        switches = {
            "EVEN_K": aligned,
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": softcap,
            "HAS_COLUMN_SUMS": bias,
        }
        config = choose("dlogits", family, replace(demand, heavy=softcap, bias=bias, aligned=aligned))
        yield Build("dlogits", target, dtype, variant, switches, config, aligned=aligned)


def _products(target: str, family: str, dtype: str, demand: Demand) -> Iterator[Build]:
    for side, transposed in (("dH", False), ("dW", True)):
        for step, last, aligned in (("sum", False, True), ("last", True, True), ("unaligned", True, False)):
            config = choose("product", family, replace(demand, aligned=aligned))
            switches = {"EVEN_N": aligned, "TRANSPOSED": transposed, "HAS_PREVIOUS": True, "LAST": last}
            out = dtype if last else "fp32"
            yield Build("product", target, dtype, f"{side}, {step}", switches, config, out=out, aligned=aligned)


def _epilogues(target: str) -> Iterator[Build]:
    values = {"REF_PER_TOKEN": True, "HAS_VALUES": True, "HAS_PSI": False, "HAS_ENDED": True, "BLOCK": 1024}
    ready = values | {"REF_PER_TOKEN": False, "HAS_VALUES": False, "HAS_PSI": True, "HAS_ENDED": False}
    dpo = ready | {"HAS_PSI": False}
    for variant, switches in (("values", values), ("psi", ready), ("DPO", dpo)):
        yield Build("preference_epilogue", target, "fp32", variant, switches | {"TERMINAL": "last_content"})


def compiled(build: Build) -> Facts:
    """Compile, and read the binary."""
    kernel, config = KERNELS[build.kernel], build.config
    switches = dict(build.switches)
    options = {"num_warps": 4}
    if config is not None:
        switches = config.switches | {"PRECISION": precision(DTYPES[build.dtype], TARGETS[build.target][0])} | switches
        options = config.options
    signature = {name: "constexpr" if name in switches else _type(name, build) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if build.aligned and (signature[name].startswith("*") or name == "D" or name.endswith("_stride"))
    }
    if build.kernel == "product" and build.aligned:
        aligned[(kernel.arg_names.index("N"),)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, switches, aligned)
    binary = triton.compile(source, target=TARGETS[build.target][1], options=options)
    threads = options["num_warps"] * TARGETS[build.target][1].warp_size
    if "cubin" in binary.asm:
        return _nvidia(binary, build.target, threads)
    return _amd(binary, threads)


def _type(name: str, build: Build) -> str:
    config = build.config
    if build.kernel == "preference_epilogue" and name in _EPILOGUE_FLOATS:
        return "fp64"
    if name in _INTEGERS:
        return _INTEGERS[name]
    if name in _FLOATS:
        return "fp32"
    if name in _SIZES or name.endswith("_stride"):
        return "i32"
    if name in _OPERANDS and not (name == "dlogits" and config is None):
        bulk = config is not None and config.bulk and name not in ("bias", "dlogits")
        return f"tensordesc<{build.dtype}[{_block(name, build)}]>" if bulk else f"*{build.dtype}"
    return f"*{build.out}" if name == "out" else "*fp32"


def _block(name: str, build: Build) -> str:
    config = build.config
    assert config is not None
    sides = {
        "hidden": (config.block_m, config.block_k),
        "weight": (config.block_n, config.block_k),
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
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
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
        tensor={name: count[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA") if count[name]},
        bulk_loads=count["UTMALDG"],
        wide_loads=wide,
        narrow_loads=len(copies) - wide,
        exps=sum(opcode.startswith("MUFU.EX2") for opcode in opcodes),
        length=len(opcodes),
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
    )


def broken_gates(build: Build, facts: Facts) -> list[str]:
    """What a build does that none that ships may do; empty where every gate holds."""
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
    facts = compiled(build)
    return Row(build, facts, broken_gates(build, facts))


def table(rows: list[Row]) -> str:
    head = f"{'kernel':<20}{'variant':<20}{'dtype':<6}{'target':<8}{'tile':<22}{'regs':>5}{'stack':>6}{'spill':>6}"
    head += f"{'KiB':>5}{'fit':>4}  {'matrix':<14}{'bulk':>5}{'16B':>5}{'exp':>5}{'instr':>7}"
    lines = [head]
    for x in rows:
        facts, build = x.facts, x.build
        matrix = " ".join(f"{name} {number}" for name, number in facts.tensor.items()) or "–"
        lines.append(
            f"{build.kernel:<20}{build.variant:<20}{build.dtype:<6}{build.target:<8}{tile(build.config):<22}"
            f"{facts.registers:>5}{facts.stack:>6}{facts.spills:>6}{facts.shared / 1024:>5.0f}{facts.programs:>4}  "
            f"{matrix:<14}{facts.bulk_loads:>5}{facts.wide_loads:>5}{facts.exps:>5}{facts.length:>7}"
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
    arguments = parser.parse_args()
    if not isinstance(head_stats_kernel, triton.JITFunction):
        raise SystemExit("TRITON_INTERPRET is set: the census compiles, so unset it")
    targets = tuple(arguments.target or TARGETS)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row, builds(targets), chunksize=4))
        unfit = list(pool.map(row, rejected())) if targets == tuple(TARGETS) else []
    print(table(rows))
    if unfit:
        print(f"\nTried, and not shipped:\n{table(unfit)}\n")
    sizes = ", ".join(map(str, HEAD_SIZES))
    print(f"D of {sizes} share a binary: they are multiples of every step of the inner dimension")
    print()
    print(report_estimates(estimates()))
    broken = [x for x in rows if x.broken]
    print(f"\n{len(rows)} binaries, {len(broken)} with a broken gate")
    if arguments.json:
        report = {
            "rows": [asdict(x) for x in rows],
            "rejected": [asdict(x) for x in unfit],
            "estimates": [asdict(x) for x in estimates()],
            "assumptions": ASSUMPTIONS,
            "made_by": made_by() | {"triton": triton.__version__},
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.check and (broken or not all(x.broken for x in unfit)):
        raise SystemExit("a gate does not hold" if broken else "what was rejected would hold every gate: ship it")


if __name__ == "__main__":
    main()
