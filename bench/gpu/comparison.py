"""The vocabulary head on a GPU: ours beside its peers and the bare product, time and memory.

    python -m bench.gpu --json out/bench/gpu.json

The task: log-probabilities of N labels, summed under random coefficients (a preference loss sends such back), and the
gradients by hidden and weight; then forward alone, of inputs that want no gradient. Rows named DPO compute that whole
loss, the reference policy's forward included, of four pairs. In rows of a frozen head the weight wants no gradient and
is asked for none; their forward alone would be that of the rows above, and is not timed again.

Each contender is first checked against float64; one that is wrong, is not installed or refuses the shape is a row that
says so. The rest are timed by CUDA events, interleaved, and their memory is the allocator's peak beyond inputs, values
and gradients, in a pass of its own. The unit is the forward product (cuBLAS). The inputs are random and the softmax is
flat, the best case of a contender that skips small gradients (CCE): hence its error beside it, and a row of it that
skips none.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from bench.gpu.rounding import RoundingChecker
from bench.harness.checker import relative
from bench.harness.contenders import reason
from bench.harness.inputs import Inputs, both, forward, make_inputs
from bench.harness.machine import made_by, write_report
from bench.harness.meters import GpuMeter, Job, Meter, interleaved
from bench.head.contenders import Contender, on_gpu

SHAPES = ("4096x2048x128256", "8192x4096x128256", "4096x576x49152", "2048x4096x151936")
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl")


def tried(name: str, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the attempt's row, or one that gives the reason why there is none."""
    try:
        return {"name": name} | attempt()
    except Exception as refusal:
        # Whatever a peer raises, an assertion or a compiler's error, is its answer to the shape.
        row = {"name": name, "refused": reason(refusal)}
    if torch.cuda.is_available():
        _check_device(name)
    return row


def _check_device(name: str) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise SystemExit(f"{name} left the device unusable ({broken}): run again with --without '{name}'") from broken


def timed(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile in milliseconds, of jobs taken in turns."""
    for job in jobs.values():
        job.warm_up()
    taken = interleaved({name: job.seconds for name, job in jobs.items()}, rounds)
    return {name: quantiles([1e3 * own for _, own in times], n=4, method="inclusive") for name, times in taken.items()}


def whole(result: Any) -> Any:
    return result


def measure(
    inputs: Inputs,
    contenders: Mapping[str, Contender],
    meter: Meter,
    *,
    rounds: int,
    without: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Rows of all contenders for one shape."""
    checker = RoundingChecker(inputs)
    detached = inputs.detached()
    # Each shape is compiled afresh: past eight of them torch.compile falls back to eager.
    torch.compiler.reset()
    jobs: dict[str, Job] = {
        "product": meter.start(lambda: partial(torch.mm, detached.hidden, detached.weight.T), whole)
    }
    rows: list[dict[str, Any]] = []
    for name, contender in contenders.items():
        if refusal := "left out by --without" if name in without else contender.refusal:
            rows.append({"name": name, "refused": refusal})
            continue
        started = start(contender, inputs, meter)
        rows.append(tried(name, partial(checker.row, contender, started)))
        if not rows[-1].keys() & {"refused", "wrong"}:
            jobs |= {f"{name} {what}": job for what, job in started.items()}
    del checker
    # Forward and backward of all, then forward of all.
    jobs = {name: jobs[name] for name in sorted(jobs, key=lambda name: name.endswith(" forward"))}
    taken = timed(jobs, rounds)
    unit = taken["product"][1]
    for row in rows:
        for what in ("both", "forward"):
            if (name := f"{row['name']} {what}") in jobs:
                row |= {f"{what}_ms": taken[name], f"{what}_over_product": taken[name][1] / unit}
                row[f"{what}_peak_mb"] = jobs[name].peak_bytes() / 2**20
    return {"product_ms": taken["product"], "rows": rows, "products": block_products(detached, meter, rounds)}


def start(contender: Contender, inputs: Inputs, meter: Meter) -> dict[str, Job]:
    """Forward and backward, and forward alone where the head is not frozen; of a frozen one it is no other."""
    jobs: dict[str, Job] = {
        "both": meter.start(lambda: partial(both, contender.run, contender.given(inputs)), whole),
    }
    if not contender.frozen:
        jobs["forward"] = meter.start(lambda: partial(forward, contender.run, inputs.detached()), whole)
    return jobs


def block_products(detached: Inputs, meter: Meter, rounds: int) -> list[dict[str, Any]]:
    """The backward's two products of one block of up to 4,096 rows and columns: our kernel's beside cuBLAS."""
    rows, columns = (min(len(x), 4096) // 256 * 256 for x in (detached.hidden, detached.weight))
    hidden, weight = detached.hidden[:rows], detached.weight[:columns]
    dlogits = torch.randn(rows, columns, dtype=hidden.dtype, device=hidden.device)

    def one(left: Tensor, right: Tensor, transposed: bool) -> dict[str, Any]:
        if not rows or not columns:
            raise ValueError("a block takes 256 rows and columns at least")
        cublas = partial(torch.mm, left.T if transposed else left, right)
        ours = partial(_our_product, detached, left, right, transposed)
        want = (left.T if transposed else left).double() @ right.double()
        errors = {"tvkd_fast": relative(ours(), want), "cuBLAS": relative(cublas(), want)}
        if not errors["tvkd_fast"] <= 2 * errors["cuBLAS"] + 1e-5:
            return {"errors": errors, "wrong": "off by more than twice cuBLAS's own error"}
        jobs = {
            name: meter.start(partial(whole, run), whole) for name, run in (("tvkd_fast", ours), ("cuBLAS", cublas))
        }
        taken = timed(jobs, rounds)
        return {"errors": errors, "ms": taken, "over_cublas": taken["tvkd_fast"][1] / taken["cuBLAS"][1]}

    return [
        tried("dH, a block", partial(one, dlogits, weight, False)),
        tried("dW, a block", partial(one, dlogits, hidden, True)),
    ]


def _our_product(detached: Inputs, left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    from tvkd_fast.kernels.autotune import tiles
    from tvkd_fast.kernels.products import product

    out = right.new_empty(left.shape[1 if transposed else 0], right.shape[1])
    config = tiles("product", detached.hidden, detached.weight, len(detached.hidden))
    one = torch.ones(1, device=left.device)
    product(left, right, out, config, transposed=transposed, scale=one, alpha=1.0, last=True)
    return out


def device_facts() -> dict[str, Any]:
    """Device, driver and versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "toolkit": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(measured: dict[str, Any]) -> str:
    """Return one shape's rows, one line each."""
    lines = [f"{measured['shape']} {measured['dtype']}"]
    for row in measured.get("rows", []) + measured.get("products", []):
        errors = ", ".join(f"{name} {e:.1e}" for name, e in row.get("errors", {}).items())
        if why := row.get("refused") or row.get("wrong"):
            shown = ("wrong: " if "wrong" in row else "") + why
        elif "over_cublas" in row:
            shown = f"{row['over_cublas']:6.2f} x cuBLAS"
        else:
            alone = f"{row['forward_over_product']:.2f}" if "forward_over_product" in row else "–"
            shown = f"{row['both_over_product']:6.2f} x the product, forward {alone:>6}, {row['both_peak_mb']:8,.0f} MB"
        lines.append(f"  {row['name']:<26} {shown}" + (f"   errors: {errors}" if errors else ""))
    return "\n".join([*lines, *([f"  {measured['refused']}"] if "refused" in measured else [])])


def ours_failed(report: dict[str, Any]) -> list[str]:
    """A peer may refuse a shape; where ours did or was wrong, the command fails."""
    return [
        f"{measured['shape']}: {row['name']}: {row.get('refused') or row['wrong']}"
        for measured in report["shapes"]
        for row in [*measured.get("rows", []), *measured.get("products", [])]
        if row["name"].startswith(("tvkd_fast", "dH", "dW")) and row.keys() & {"refused", "wrong"}
    ]


def require_gpu() -> None:
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None and torch.version.hip is None:
        missing = f"torch {torch.__version__} is a build without CUDA or ROCm: install one that has it"
    else:
        missing = f"torch {torch.__version__} finds no CUDA or ROCm device: look at nvidia-smi or rocm-smi"
    raise SystemExit(f"bench.gpu needs a GPU, and {missing}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help=f"NxDxV, any number of times; otherwise {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without", action="append", default=[], choices=on_gpu(), help="leave a contender out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles take at least 2")
    require_gpu()
    report: dict[str, Any] = device_facts() | {"rounds": arguments.rounds, "shapes": []}
    for name in arguments.shape or SHAPES:
        n, d, v = (int(x) for x in name.split("x"))
        measured: dict[str, Any] = {"shape": name, "dtype": "bfloat16"}
        try:
            inputs = make_inputs((n, d, v), torch.bfloat16, "cuda")
            left_out = frozenset(arguments.without)
            measured |= measure(inputs, on_gpu(), GpuMeter(), rounds=arguments.rounds, without=left_out)
        except torch.OutOfMemoryError as refusal:
            measured["refused"] = reason(refusal)
        report["shapes"].append(measured)
        print(text(measured), flush=True)
        report["made_by"] = made_by()
        write_report(report, arguments.json)
    if failed := ours_failed(report):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
