"""The vocabulary head, forward and backward: ours beside eager torch and the bare product, time and memory.

    python -m bench.head --json docs/results/head.json

Time: all in one process, interleaved, medians, after the gradients were compared; the product is the fastest of six
tilings. A frozen head's weight wants no gradient. Memory: each in a process of its own, the peak of resident memory
(VmHWM, reset before) beyond inputs, result and gradients. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.machine import made_by
from tvkd_fast import linear_logps

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


TILINGS = ((512, 4096), (1024, 2048), (1024, 8192), (2048, 4096), (4096, 4096), (4096, 49152))
"""Rows and columns of the forward product's blocks that the floor is the fastest of."""


def product(hidden: Tensor, weight: Tensor, tiling: tuple[int, int]) -> None:
    """The floor: one forward product and nothing else, block by block into one buffer."""
    with torch.no_grad():
        buffer = hidden.new_empty(min(tiling[0], len(hidden)) * min(tiling[1], len(weight)))
        for h in hidden.split(tiling[0]):
            for w in weight.split(tiling[1]):
                torch.mm(h, w.T, out=buffer[: len(h) * len(w)].view(len(h), len(w)))


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_logps(hidden, weight, labels)


def frozen(run: Run) -> Run:
    return lambda hidden, weight, labels: run(hidden, weight.detach(), labels)


RUNS: dict[str, Run] = {
    "eager": eager,
    "tvkd_fast": ours,
    "eager, frozen head": frozen(eager),
    "tvkd_fast, frozen head": frozen(ours),
}


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) / d**0.5).requires_grad_()
    return hidden, weight, torch.randint(v, (n,))


def once(run: Run, args: tuple[Tensor, Tensor, Tensor]) -> float:
    for tensor in args[:2]:
        tensor.grad = None
    since = time.perf_counter()
    run(*args).sum().backward()
    return time.perf_counter() - since


def floor(args: tuple[Tensor, Tensor, Tensor], tiling: tuple[int, int]) -> float:
    since = time.perf_counter()
    product(args[0], args[1], tiling)
    return time.perf_counter() - since


def check(args: tuple[Tensor, Tensor, Tensor]) -> None:
    """A speed means nothing before the result is right."""
    once(eager, args)
    exact = [t.grad.clone() for t in args[:2] if t.grad is not None]
    for name, run in RUNS.items():
        once(run, args)
        grads = [t.grad for t in args[:2] if t.grad is not None]
        for got, wanted in zip(grads, exact, strict="frozen" not in name):
            error = float((got - wanted).norm() / wanted.norm())
            if not error < 1e-5:
                raise SystemExit(f"{name}: gradients differ from eager's by {error:.1e} (relative)")


def seconds(shape: tuple[int, int, int], rounds: int) -> tuple[dict[str, float], tuple[int, int]]:
    """Median seconds of each, and the tiling that the product was fastest in."""
    args = inputs(shape)
    check(args)
    tiling = min(TILINGS, key=lambda t: min(floor(args, t) for _ in range(2)))
    taken: dict[str, list[float]] = {name: [] for name in ("product", *RUNS)}
    for _ in range(rounds):
        taken["product"].append(floor(args, tiling))
        for name, run in RUNS.items():
            taken[name].append(once(run, args))
    return {name: median(values) for name, values in taken.items()}, tiling


def peak_megabytes(name: str, shape: tuple[int, int, int]) -> float:
    """Measured in this very process: call it in one of its own."""
    args = inputs(shape)
    # Threads' stacks and the product's packing buffers are made before, by a small call.
    once(RUNS[name], inputs((8, shape[1], 512)))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    once(RUNS[name], args)
    held = sum(t.grad.numel() * t.grad.element_size() for t in args[:2] if t.grad is not None)
    return (_status("VmHWM") - before) / 1024 - held / 2**20


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x576x49152", help="tokens x hidden x vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    n, d, v = (int(x) for x in arguments.shape.split("x"))
    shape = (n, d, v)
    if arguments.peak:
        print(peak_megabytes(arguments.peak, shape))
        return
    if platform.system() != "Linux":
        raise SystemExit("peak memory is read from /proc: run this on Linux")
    taken, tiling = seconds(shape, arguments.rounds)
    results = [{"name": "product", "seconds": taken["product"], "over_product": 1.0, "tiling": tiling}]
    for name in RUNS:
        command = [sys.executable, "-m", "bench.head", "--shape", arguments.shape, "--peak", name]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        results.append(
            {"name": name, "seconds": taken[name], "over_product": taken[name] / taken["product"], "peak_mb": peak}
        )
    report = {"shape": arguments.shape, "dtype": "float32", "results": results, "made_by": made_by()}
    for row in results:
        peak = f"{row['peak_mb']:8,.0f} MB beyond inputs and gradients" if "peak_mb" in row else f"tiling {tiling}"
        print(f"{row['name']:<22} {row['over_product']:6.2f} x the product   {peak}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
