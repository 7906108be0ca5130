"""Tiles for a launch: those timed on this machine for similar shapes, else the table's.

    python -m tvkd_fast.kernels.autotune 4096x2048x128256 --dtype bfloat16

times every candidate of every kernel once and keeps the fastest on disk; training never times anything.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import TritonError

from tvkd_fast.kernels.configs import BULK_TARGETS, Demand, Kernel, TileConfig, choose
from tvkd_fast.kernels.launch import aligned, say_unaligned, target_of
from tvkd_fast.kernels.records import Head, SelectionRule

CANDIDATES = tuple(
    TileConfig(m, n, k, warps, stages, bulk)
    for m, n in ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64))
    for k in (32, 64)
    for warps, stages in ((4, 3), (8, 3), (8, 4))
    for bulk in (True, False)
)
"""The tiles that are timed, among them tiles that some devices cannot hold."""

TILE_MAX = 256
BLOCK_COLUMNS = 4096


def tiles(
    kernel: Kernel, left: Tensor, right: Tensor, rows: int, *, heavy: bool = False, bias: bool = False
) -> TileConfig:
    """The tiles of a launch over `rows` rows of left [·, D] and right [V, D]."""
    demand = Demand(left.dtype == torch.float32, heavy, bias, aligned(left, right))
    return _chosen(kernel, left, right, demand, (rows, right.shape[1], right.shape[0]))


def joint_tiles(
    kernel: Kernel, states: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], *, heavy: bool, bias: bool
) -> TileConfig:
    """The tiles of a launch over two heads: weights [V, D] and [V, D'], states [N, D] and [N, D']."""
    demand = Demand(states[0].dtype == torch.float32, heavy, bias, aligned(*states, *weights))
    unaligned = next((side for side in (0, 1) if not aligned(states[side], weights[side])), 0)
    width = sum(state.shape[1] for state in states)
    return _chosen(kernel, states[unaligned], weights[unaligned], demand, (len(states[0]), width, len(weights[0])))


def _chosen(kernel: Kernel, left: Tensor, right: Tensor, demand: Demand, shape: tuple[int, int, int]) -> TileConfig:
    target = target_of(left)
    if target == "interpreter":
        return choose(kernel, target, demand)
    if not demand.aligned:
        say_unaligned(tuple(left.shape[1:]), tuple(right.shape))
    tuned = _tuned(cache_file()).get(key(kernel, left, demand, shape))
    return tuned or choose(kernel, target, demand)


def cache_file() -> Path:
    """Return the file of tuned tiles: $TVKD_FAST_TUNING, or tvkd_fast/tuning.json in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TVKD_FAST_TUNING") or Path(home) / "tvkd_fast" / "tuning.json")


def key(kernel: Kernel, on: Tensor, demand: Demand, shape: tuple[int, int, int]) -> str:
    """Return an entry's key: kernel, device, Triton version, demand, and sizes rounded up to powers of 2."""
    device = torch.cuda.get_device_name(on.device) if on.is_cuda else "none"
    bucket = "x".join(str(triton.next_power_of_2(size)) for size in shape)
    wants = " ".join(name for name, wanted in asdict(demand).items() if wanted)
    return f"{kernel}|{device}|triton {triton.__version__}|{wants}|{bucket}"


@lru_cache
def _tuned(file: Path) -> dict[str, TileConfig]:
    if not file.exists():
        return {}
    try:
        return {name: TileConfig(**entry) for name, entry in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is no tuning file of this version and is passed over ({error}): delete it", stacklevel=2)
        return {}


def remember(entries: dict[str, TileConfig], file: Path) -> None:
    """Add entries to the file, atomically: a concurrent reader sees the old file or the new one."""
    kept = _tuned(file) | entries
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps({name: asdict(config) for name, config in sorted(kept.items())}, indent=1) + "\n")
    partial.replace(file)
    _tuned.cache_clear()


def fastest(candidates: Sequence[TileConfig], seconds: Callable[[TileConfig], float]) -> TileConfig:
    """The candidate of the fewest seconds, among those that the device can hold."""
    timed: list[tuple[float, int]] = []
    for index, config in enumerate(candidates):
        try:
            timed.append((seconds(config), index))
        except (TritonError, triton.CompilationError, RuntimeError):
            continue
    if not timed:
        raise ValueError("no candidate runs on this device: report its name, and take impl='torch' meanwhile")
    return candidates[min(timed)[1]]


def tune(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, TileConfig]:
    """The fastest tiles of each kernel at hidden [N, D] and weight [V, D]; `seconds` times a call."""
    # Imported here because the launchers import this module for their tiles.
    from tvkd_fast.kernels.dlogits import dlogits
    from tvkd_fast.kernels.head_dhidden import head_dlogp_dhidden
    from tvkd_fast.kernels.head_selection import select_entries
    from tvkd_fast.kernels.head_stats import head_sums
    from tvkd_fast.kernels.joint_dlogits import Factors, joint_dlogits
    from tvkd_fast.kernels.joint_stats import joint_sums
    from tvkd_fast.kernels.joint_values import joint_values
    from tvkd_fast.kernels.products import product

    n, d, v = shape
    width = min(v, BLOCK_COLUMNS)
    hidden = torch.randn(n, d, device=device).to(dtype)
    weight = (torch.randn(v, d, device=device) / d**0.5).to(dtype)
    labels = torch.randint(v, (n,), device=device)
    head = Head(weight)
    sums = head_sums(hidden, head, labels=labels)
    ones, whole = torch.ones(n, device=device), TILE_MAX
    buffer = hidden.new_zeros(triton.cdiv(n, whole) * whole, triton.cdiv(width, whole) * whole)
    out = hidden.new_empty((n, d), dtype=torch.float32)

    def stats(config: TileConfig) -> object:
        return head_sums(hidden, head, labels=labels, config=config)

    def dhidden(config: TileConfig) -> object:
        return head_dlogp_dhidden(hidden, head, labels, config=config)

    def selection(config: TileConfig) -> object:
        return select_entries(hidden, head, labels, SelectionRule(2.0**-14, row_cap=v), config=config)

    def gradient(config: TileConfig) -> object:
        block = (hidden, head.columns(0, width), labels, sums, ones, ones[:1], buffer, config)
        return dlogits(*block, first_column=0, ignore_index=-100, want_bias=False)

    def multiply(config: TileConfig) -> object:
        product(buffer, weight[:width], out, config, scale=ones[:1], alpha=1.0, last=True)
        return out

    # The other side is as wide, as a teacher of the student's size is, and another model.
    two_heads = (hidden, head, hidden.flip(0), head)
    joint = joint_sums(*two_heads)
    factors = Factors(ones, -ones)

    def joint_gradient(config: TileConfig) -> object:
        block = (hidden, head.columns(0, width), two_heads[2], head.columns(0, width), None, joint)
        of_factors = (factors.stacked(), factors.flags, buffer, config)
        return joint_dlogits(
            *block, *of_factors, beta=None, alpha=None, first_column=0, ignore_index=-100, want_bias=False
        )

    target = target_of(hidden)
    demand = Demand(wide=dtype == torch.float32, aligned=aligned(hidden, weight))
    candidates = [x for x in CANDIDATES if not x.bulk or (target in BULK_TARGETS and demand.aligned)]
    runs: dict[Kernel, Callable[[TileConfig], object]] = {
        "head_stats": stats,
        "selection_bits": selection,
        "exponentials": dhidden,
        "dlogits": gradient,
        "product": multiply,
        "joint_stats": lambda config: joint_sums(*two_heads, config=config),
        "joint_values": lambda config: joint_values(*two_heads, joint, beta=0.5, config=config),
        "joint_dlogits": joint_gradient,
    }
    widths = {kernel: 2 * d if kernel.startswith("joint") else d for kernel in runs}
    return {
        key(kernel, hidden, demand, (n, widths[kernel], v)): fastest(
            candidates,
            lambda config, run=run: seconds(lambda: run(config)),  # type: ignore[misc]
        )
        for kernel, run in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="tokens x hidden x vocabulary, such as 4096x2048x128256")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tiles are timed on a GPU, and there is none here")
    n, d, v = (int(size) for size in arguments.shape.split("x"))
    found = tune((n, d, v), getattr(torch, arguments.dtype), "cuda", lambda run: triton.testing.do_bench(run))
    remember(found, cache_file())
    for name, config in found.items():
        print(name, config)


if __name__ == "__main__":
    main()
