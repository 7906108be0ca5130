"""Heads on a CPU: each in a process of its own, checked against float64, then timed in rounds beside the product.

In its first run a contender's results are checked and its peak memory is read (VmHWM, reset before, beyond inputs,
result and gradients); what is wrong is not timed further. The unit is the product, the fastest of seven tilings; it is
timed before each run of a contender, since a shared machine is not as fast from one second to the next, and the figure
is the median of the ratios. Linux only.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.harness.checker import checked
from bench.harness.contenders import selected
from bench.harness.inputs import PAIRS, Inputs, both, forward
from bench.harness.machine import made_by, seconds, versions, write_report
from bench.harness.meters import Call, CpuMeter, Job, interleaved
from bench.harness.reference import HeadReference, load_reference
from bench.harness.states import TENSORS, States, load_states
from bench.head.contenders import Contender
from tvkd_fast import HeadStats, linear_logps

TILINGS = ((512, 4096), (1024, 2048), (1024, 8192), (2048, 1024), (2048, 4096), (4096, 1024), (4096, 49152))
"""Rows and columns of the forward product's blocks that the unit is the fastest of."""
FOLDER = Path("out/bench")
PACKAGED = (576, 49152)
NATS = 1e-3
"""A contender whose values or log-probabilities are further off is wrong, and not timed."""
KEYS = {"hidden": "rel_err_dh", "weight": "rel_err_dw", "logps": "err_nats", "lse": "err_nats"}
"""A report's names of errors."""


def product(hidden: Tensor, weight: Tensor, tiling: tuple[int, ...]) -> None:
    """The unit: one forward product and nothing else, block by block into one buffer."""
    with torch.no_grad():
        buffer = hidden.new_empty(min(tiling[0], len(hidden)) * min(tiling[1], len(weight)))
        for h in hidden.split(tiling[0]):
            for w in weight.split(tiling[1]):
                torch.mm(h, w.T, out=buffer[: len(h) * len(w)].view(len(h), len(w)))


def call(contender: Contender, states: States) -> Call:
    """Forward and backward: log-probabilities and gradients, in a process of its own."""
    hidden = states.hidden.clone().requires_grad_(contender.task != "values")
    weight = states.weight.requires_grad_()
    inputs = Inputs(hidden, weight, states.labels, states.coefficients, cu_seqlens=states.cu_seqlens)
    inputs = contender.given(inputs)
    run = partial(forward if contender.task == "values" else both, contender.run)
    # The libraries' threads and buffers, and what they compile, are made before: they are not a contender's memory.
    few = slice(0, 2 * PAIRS * 8)
    labels = inputs.labels[few].clamp(max=4095)
    bounds = torch.arange(2 * PAIRS + 1) * 8
    small = Inputs(inputs.hidden[few], inputs.weight[:4096], labels, inputs.coefficients[few], cu_seqlens=bounds)
    run(inputs if contender.compiles else small)
    # The inputs' pages, shared with the parent, count once they have been touched.
    inputs.weight.detach().sum()
    return partial(run, inputs)


def check(contender: Contender, states: States, reference: HeadReference, got: tuple[Tensor, ...]) -> dict[str, Any]:
    """A row's part: errors under a report's names, and "wrong" where one is too large."""
    limits = {"logps": NATS, "lse": NATS, "hidden": contender.limit, "weight": contender.limit}
    numbers = dict(zip(contender.numbers, got, strict=True))
    found = checked(reference.of(contender.task, states).errors(numbers), limits)
    row: dict[str, Any] = {KEYS[name]: error for name, error in found["errors"].items()}
    return row | ({"wrong": found["wrong"]} if "wrong" in found else {})


def fastest_tiling(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    product(hidden, weight, TILINGS[0])
    taken = {tiling: seconds(partial(product, hidden, weight, tiling)) for tiling in TILINGS}
    return min(taken, key=taken.__getitem__)


def measure(
    states: States,
    reference: HeadReference,
    chosen: dict[str, Contender],
    rounds: int,
    threads: int,
    tiling: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    meter = CpuMeter(threads)
    search = meter.start(lambda: partial(fastest_tiling, states.hidden, states.weight), lambda found: found)
    rows: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Job] = {}
    for name, contender in chosen.items():
        rows[name] = {"name": name} | ({"refused": contender.refusal} if contender.refusal else {})
        if not contender.refusal:
            made, checks = partial(call, contender, states), partial(check, contender, states, reference)
            jobs[name] = CpuMeter(threads, reuse=contender.reuse).start(made, checks)
    if tiling is None:
        tiling = search.check()
    search.close()
    unit = meter.start(lambda: partial(product, states.hidden, states.weight, tiling), id)
    units: list[float] = []

    def of_unit() -> float:
        units.append(unit.seconds())
        return units[-1]

    taken: dict[str, list[tuple[float, float]]] = {}
    for name, job in list(jobs.items()):
        before = of_unit()
        rows[name] |= checked_row(job, _held(chosen[name], states))
        if rows[name].keys() & {"refused", "wrong"}:
            jobs.pop(name).close()
        else:
            taken[name] = [(before, job.seconds())]
    for name, timed in timed_rows(jobs, taken, rounds, of_unit).items():
        rows[name] |= timed
    unit.close()
    product_row = {"name": "product", "seconds": median(units), "over_floor": 1.0, "rounds": units, "tiling": tiling}
    return {"results": [product_row, *rows.values()], "entries": entries(states)}


def checked_row(job: Job, held: int) -> dict[str, Any]:
    """A row's part of the first run: what the check says of it, and its peak memory beyond `held` bytes."""
    try:
        found = job.check()
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0][:200]}
    return found | {"peak_mb": (job.peak_bytes() - held) / 2**20}


def timed_rows(
    jobs: dict[str, Job], taken: dict[str, list[tuple[float, float]]], rounds: int, of_unit: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Time the jobs for all rounds but the first, whose (unit, job) seconds were `taken`, and close them."""
    more = interleaved({name: job.seconds for name, job in jobs.items()}, rounds - 1, before=of_unit)
    rows: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        products, times = zip(*taken[name], *more[name], strict=True)
        rows[name] = {"seconds": median(times), "rounds": list(times), "products": list(products)}
        rows[name]["over_floor"] = median(x / y for x, y in zip(times, products, strict=True))
        job.close()
    return rows


def _held(contender: Contender, states: States) -> int:
    """Bytes of the result and of the gradients, which any implementation has to hold."""
    held = 4 * states.hidden.shape[0]
    if contender.task != "values" and not contender.frozen_backbone:
        held += 4 * states.hidden.numel()
    if contender.task != "values" and not contender.frozen:
        held += 4 * states.weight.numel()
    return held


def entries(states: States) -> dict[str, dict[str, float]]:
    """Return the entries that sparse gradients keep of these states, by ε."""
    found = {}
    hidden = states.hidden.clone().requires_grad_()
    for log_eps in (12, 14, 16, 18):
        stats = HeadStats()
        linear_logps(hidden, states.weight.detach(), states.labels, grad_mode="sparse", eps=2.0**-log_eps, stats=stats)
        found[f"2^-{log_eps}"] = stats.read()
    return found


def prepared_states(
    shape: tuple[int, int, int], *, model: str, data: str, entries: float = 300.0, layers: int | None = None
) -> Path:
    """A file of states, made by a process of its own where it does not exist yet; of so many of a model's layers."""
    n, d, v = shape
    options = ["--model", model, "--data", data]
    if (d, v) == PACKAGED:
        options += ["--tokens", str(n)]
        options += [] if layers is None else ["--layers", str(layers)]
    else:
        options += ["--shape", f"{n}x{d}x{v}", "--entries", str(entries)]
    file = FOLDER / f"states-{sha256(' '.join([*options, *TENSORS]).encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        subprocess.run([sys.executable, "-m", "bench.harness.states", str(file), *options], check=True)
    return file


def prepared_reference(states: Path) -> Path:
    """The file of these states' float64 numbers, likewise."""
    file = states.with_name(states.name.replace("states", "reference"))
    if not file.exists():
        subprocess.run([sys.executable, "-m", "bench.harness.reference", str(states), str(file)], check=True)
    return file


def command(name: str, description: str | None, contenders: dict[str, Contender]) -> None:
    """The command line of a benchmark of this name."""
    parser = argparse.ArgumentParser(
        f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x576x49152", help="tokens x hidden x vocabulary")
    parser.add_argument("--tiling", help="rows x columns of the product, where the fastest is known already")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each, the checked one among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train", help="pairs to take states from, of made ones lengths")
    parser.add_argument("--model", default="smollm2-135m", help="a model of the packaged one's shape")
    parser.add_argument("--entries", type=float, default=300.0, help="of made states, entries per token above 2^-14")
    parser.add_argument("--only", action="append", help="a contender's name, or a part of names; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("peak memory is read from /proc: run this on Linux")
    n, d, v = (int(x) for x in arguments.shape.split("x"))
    file = prepared_states((n, d, v), model=arguments.model, data=arguments.data, entries=arguments.entries)
    reference_file = prepared_reference(file)
    torch.set_num_threads(1)
    states, reference = load_states(file), load_reference(reference_file)
    chosen = selected(contenders, arguments.only)
    report = {"shape": arguments.shape, "dtype": "float32", "states": states.source, "threads": arguments.threads}
    tiling = None if arguments.tiling is None else tuple(int(x) for x in arguments.tiling.split("x"))
    report |= measure(states, reference, chosen, arguments.rounds, arguments.threads, tiling)
    report["checked"] = reference.extent
    peers = versions("trl", "liger-kernel", "cut-cross-entropy", "numba")
    report["made_by"] = made_by(arguments.threads) | {"peers": peers, "threads": arguments.threads}
    print(f"{arguments.shape}, {states.source}")
    for row in report["results"]:
        print(text(row))
    write_report(report, arguments.json)


def text(row: dict[str, Any]) -> str:
    """Return one contender's line."""
    if "seconds" not in row:
        return f"{row['name']:<42} {row.get('wrong') or row.get('refused')}"
    line = f"{row['name']:<42} {row['over_floor']:6.2f} x the product"
    if "peak_mb" in row:
        errs = "  ".join(f"{key[8:]} {row[key]:.1e}" for key in ("rel_err_dh", "rel_err_dw") if key in row)
        line += f" {row['peak_mb']:8,.0f} MB  {errs}"
    return line
