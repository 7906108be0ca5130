"""A contest of heads on a CPU: each in a process of its own, held to float64, then timed in rounds beside the product.

In its first run a contender's results are judged and its peak memory is read (VmHWM, reset before, beyond inputs,
result and gradients); what is wrong is not timed further. The product, which all is measured against, is the fastest of
seven tilings; it is timed before each run of a contender, since a shared machine is not as fast from one second to the
next, and the figure is the median of the ratios. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.harness.inputs import PAIRS, Head
from bench.harness.machine import made_by, seconds, versions, write_report
from bench.harness.processes import Runner
from bench.harness.reference import Truth, errors, load_truth
from bench.harness.states import States, load_states
from tvkd_fast import HeadStats, linear_logps

TILINGS = ((512, 4096), (1024, 2048), (1024, 8192), (2048, 1024), (2048, 4096), (4096, 1024), (4096, 49152))
"""Rows and columns of the forward product's blocks that the floor is the fastest of."""
FOLDER = Path("out/bench")
PACKAGED = (576, 49152)
EXACT = 1e-4
"""A contender whose relative error by float64 is beyond its limit is wrong, and not timed."""
NATS = 1e-3
"""The same of a value or a log-probability, absolute."""


@dataclass(frozen=True)
class Contender:
    run: Head
    limit: float = EXACT
    frozen: bool = False
    """Its weight wants no gradient."""
    reuse: bool = False
    """Its gradients' memory was touched before."""
    needs: str | None = None
    """A module, or a program, without which it is left out."""
    preference: bool = False
    """Goes backward from its own DPO loss over four pairs, without a reference, and not from given coefficients."""
    forward: bool = False
    """Teacher values: no gradient."""
    compiles: bool = False
    """For a shape: its first call is not its own time nor memory."""
    by_name: bool = False
    """Takes part only where its whole name is asked for."""


def product(hidden: Tensor, weight: Tensor, tiling: tuple[int, ...]) -> None:
    """The floor: one forward product and nothing else, block by block into one buffer."""
    with torch.no_grad():
        buffer = hidden.new_empty(min(tiling[0], len(hidden)) * min(tiling[1], len(weight)))
        for h in hidden.split(tiling[0]):
            for w in weight.split(tiling[1]):
                torch.mm(h, w.T, out=buffer[: len(h) * len(w)].view(len(h), len(w)))


def there(contender: Contender) -> bool:
    """Whether what it needs can be had: g++ is a program, all else a module, of which a program alone is no sign."""
    needs = contender.needs
    if needs == "g++":
        return shutil.which(needs) is not None
    return needs is None or importlib.util.find_spec(needs) is not None


def job(contender: Contender, states: States) -> Callable[[], Any]:
    """Forward and backward: log-probabilities and gradients, in a process of its own."""
    hidden = states.hidden.clone().requires_grad_(not contender.forward)
    weight = states.weight.detach() if contender.frozen or contender.forward else states.weight.requires_grad_()

    def go(hidden: Tensor, weight: Tensor, labels: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        out = contender.run(hidden, weight, labels)
        if not leaves:
            return (out,)
        loss = out if contender.preference else (out * coefficients).sum()
        return (out.detach(), *torch.autograd.grad(loss, leaves))

    # The libraries' threads and buffers, and what they compile, are made before: they are nobody's memory.
    few = slice(0, 2 * PAIRS * 8)
    small = (hidden[few], weight[:4096], states.labels[few].clamp(max=4095), states.coefficients[few])
    if contender.compiles:
        small = (hidden, weight, states.labels, states.coefficients)
    go(*small)
    # The inputs' pages, shared with the parent, count once they have been touched.
    weight.detach().sum()
    return partial(go, hidden, weight, states.labels, states.coefficients)


def fastest_tiling(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    product(hidden, weight, TILINGS[0])
    taken = {tiling: seconds(partial(product, hidden, weight, tiling)) for tiling in TILINGS}
    return min(taken, key=taken.__getitem__)


def measure(
    states: States,
    truth: Truth,
    chosen: dict[str, Contender],
    rounds: int,
    threads: int,
    tiling: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    search = partial(fastest_tiling, states.hidden, states.weight)
    floor = Runner(lambda: search, lambda found: found, threads=threads, reuse=False)
    runners, rows = {}, {}
    for name, contender in chosen.items():
        makes = partial(job, contender, states)
        judge = partial(errors, truth, states, forward=contender.forward, preference=contender.preference)
        runners[name] = Runner(makes, judge, threads=threads, reuse=contender.reuse)
    if tiling is None:
        tiling, _, _ = floor.check()
    floor.close()
    bare = Runner(lambda: partial(product, states.hidden, states.weight, tiling), id, threads=threads, reuse=False)
    taken: dict[str, list[float]] = {}
    floors: list[float] = []
    before: dict[str, list[float]] = {}
    for name, runner in list(runners.items()):
        contender, row = chosen[name], {"name": name}
        rows[name] = row
        try:
            floors.append(bare.seconds())
            found, peak, first = runner.check()
            taken[name], before[name] = [first], floors[-1:]
            row |= found | {"peak_mb": (peak - _held(contender, states)) / 2**20}
        except RuntimeError as error:
            row["refused"] = str(error).splitlines()[0][:200]
        else:
            limits = {"rel_err_dh": contender.limit, "rel_err_dw": contender.limit, "err_nats": NATS}
            wrong = [f"{key} beyond {limit:g}" for key, limit in limits.items() if not row.get(key, 0.0) <= limit]
            if wrong:
                row["wrong"] = ", ".join(wrong)
        if "refused" in row or "wrong" in row:
            runners.pop(name).close()
    for _ in range(1, rounds):
        for name, runner in runners.items():
            floors.append(bare.seconds())
            taken[name].append(runner.seconds())
            before[name].append(floors[-1])
    for name in runners:
        rows[name] |= {"seconds": median(taken[name]), "rounds": taken[name], "products": before[name]}
        rows[name]["over_floor"] = median(x / floor for x, floor in zip(taken[name], before[name], strict=True))
    for runner in (*runners.values(), bare):
        runner.close()
    product_row = {"name": "product", "seconds": median(floors), "over_floor": 1.0, "rounds": floors, "tiling": tiling}
    return {"results": [product_row, *rows.values()], "entries": entries(states)}


def _held(contender: Contender, states: States) -> int:
    """Bytes of the result and of the gradients, which any implementation has to hold."""
    held = 4 * states.hidden.shape[0]
    if not contender.forward:
        held += 4 * states.hidden.numel()
    if not contender.forward and not contender.frozen:
        held += 4 * states.weight.numel()
    return held


def entries(states: States) -> dict[str, dict[str, float]]:
    """What sparse gradients keep of these states, by ε."""
    found = {}
    hidden = states.hidden.clone().requires_grad_()
    for log_eps in (12, 14, 16, 18):
        stats = HeadStats()
        linear_logps(hidden, states.weight.detach(), states.labels, grad_mode="sparse", eps=2.0**-log_eps, stats=stats)
        found[f"2^-{log_eps}"] = stats.read()
    return found


def prepared(shape: tuple[int, int, int], arguments: argparse.Namespace, *, truth: bool = True) -> tuple[Path, Path]:
    """Files of the states and of what float64 says of them, made by processes of their own where they are not there."""
    n, d, v = shape
    if (d, v) == PACKAGED:
        options = ["--model", arguments.model, "--tokens", str(n), "--data", arguments.data]
    else:
        options = ["--shape", f"{n}x{d}x{v}", "--entries", str(arguments.entries)]
    file = FOLDER / f"states-{sha256(' '.join(options).encode()).hexdigest()[:12]}.safetensors"
    judged = file.with_name(file.name.replace("states", "truth"))
    if not file.exists():
        subprocess.run([sys.executable, "-m", "bench.harness.states", str(file), *options], check=True)
    if truth and not judged.exists():
        subprocess.run([sys.executable, "-m", "bench.harness.reference", str(file), str(judged)], check=True)
    return file, judged


def selected(everyone: dict[str, Contender], wanted: list[str] | None) -> dict[str, Contender]:
    """Those that are there, and of these the wanted: by their whole name, "tvkd_fast" apart, or by a part of it."""
    names = {name.removeprefix("tvkd_fast, "): name for name in everyone}
    chosen = set()
    for word in wanted or [""]:
        parts = {name for name, x in everyone.items() if word in name and not x.by_name}
        chosen |= {names[word]} if word in names else parts
    return {name: x for name, x in everyone.items() if name in chosen and there(x)}


def contest(description: str | None, contenders: dict[str, Contender]) -> None:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x576x49152", help="tokens x hidden x vocabulary")
    parser.add_argument("--tiling", help="rows x columns of the product, where the fastest is known already")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each, the checked one among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train", help="preference data to take real states from")
    parser.add_argument("--model", default="smollm2-135m", help="a model of the packaged one's shape")
    parser.add_argument("--entries", type=float, default=300.0, help="of made states, entries a token above 2^-14")
    parser.add_argument("--only", action="append", help="a contender's name, or a part of names; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("peak memory is read from /proc: run this on Linux")
    n, d, v = (int(x) for x in arguments.shape.split("x"))
    files = prepared((n, d, v), arguments)
    torch.set_num_threads(1)
    states, truth = load_states(files[0]), load_truth(files[1])
    chosen = selected(contenders, arguments.only)
    report = {"shape": arguments.shape, "dtype": "float32", "states": states.source, "threads": arguments.threads}
    tiling = None if arguments.tiling is None else tuple(int(x) for x in arguments.tiling.split("x"))
    report |= measure(states, truth, chosen, arguments.rounds, arguments.threads, tiling)
    report["checked"] = truth.extent
    peers = versions("trl", "liger-kernel", "cut-cross-entropy", "numba")
    report["made_by"] = made_by(arguments.threads) | {"peers": peers, "threads": arguments.threads}
    print(f"{arguments.shape}, {states.source}")
    for row in report["results"]:
        if "seconds" not in row:
            print(f"{row['name']:<42} {row.get('wrong') or row.get('refused')}")
            continue
        text = f"{row['name']:<42} {row['over_floor']:6.2f} x the product"
        if "peak_mb" in row:
            errs = "  ".join(f"{key[8:]} {row[key]:.1e}" for key in ("rel_err_dh", "rel_err_dw") if key in row)
            text += f" {row['peak_mb']:8,.0f} MB  {errs}"
        print(text)
    write_report(report, arguments.json)
