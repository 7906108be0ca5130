"""The parts of a step's time on a CPU: an optimizer step of DPO under torch.profiler, after one that is no part of it.

    python -m bench.step.profile --data PAIRS.jsonl.gz --json FILE

The step is profiled twice, as it is and with its blocks compiled, and some steps of both are timed in turn without a
profiler. Each event's own time goes to the part that it happens in: the head, attention, packing the pairs, the
optimizer; else to matrix products, or to what is left. The head's passes are largely compiled or done in place and are
not taken apart. Products are set against the machine's speed for the largest of them alone.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness.machine import made_by, seconds, versions, write_report
from bench.step.comparison import make_task
from bench.step.contenders import BETA, CLIP, LR, KnownScores, StepTask
from tvkd_fast.commands.models import load_policy
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.training.optim import OptimConfig, make_optimizer
from tvkd_fast.training.step import train_step

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
DATA = "packing"
PARTS: dict[str, Callable[[str], bool]] = {
    "head": lambda name: name.startswith("tvkd_fast::"),
    "attention": lambda name: "scaled_dot_product" in name or "flash_attention" in name,
    "packing the pairs": lambda name: name == DATA,
    "optimizer": lambda name: name.startswith("Optimizer."),
    "backbone's products": lambda name: name in PRODUCTS,
}
REST = "backbone, elementwise and the rest"


def part_of(event: Any) -> str:
    """Return the part named by the outermost of the event and those around it: the head's products are the head's."""
    found = REST
    while event is not None:
        found = next((part for part, belongs in PARTS.items() if belongs(event.name)), found)
        event = event.cpu_parent
    return found


def shares(events: Any) -> dict[str, float]:
    taken: dict[str, float] = defaultdict(float)
    for event in events:
        taken[part_of(event)] += event.self_cpu_time_total
    whole = sum(taken.values())
    return {part: taken[part] / whole for part in (*PARTS, REST)}


def product_speed(events: Any) -> tuple[float, list[int]]:
    """GFLOP/s of the backbone's products, and the shape of the largest."""
    flops = time = largest = 0.0
    shape: list[int] = []
    for event in events:
        if event.name not in PRODUCTS or part_of(event) != "backbone's products" or not event.flops:
            continue
        flops += event.flops
        time += event.self_cpu_time_total
        if event.flops > largest:
            rows, cols = event.input_shapes[-2:]
            largest, shape = event.flops, [rows[0], rows[1], cols[1]]
    return flops / time / 1e3, shape


def alone(shape: list[int]) -> float:
    """GFLOP/s of one product of this shape."""
    m, k, n = shape
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    taken = median(seconds(partial(torch.mm, a, b, out=out)) for _ in range(9))
    return 2 * m * k * n / taken / 1e9


class Steps:
    """A policy that takes the task's second step again and again, having taken the first."""

    def __init__(self, task: StepTask, compile: bool) -> None:
        self.task = task
        self.policy = load_policy(task.start, ModelConfig(packing=task.batching.packing, compile=compile))
        self.optimizer = make_optimizer(self.policy, OptimConfig(lr=LR, clip_norm=CLIP))
        self.policy.train()
        self.step(0)

    def step(self, number: int = 1) -> None:
        task = self.task
        with record_function(DATA):
            batches = list(task.batching.batches(task.pairs, task.of_step(number)))
        scorer = KnownScores(task.ref_logps)
        train_step(self.policy, scorer, batches, self.optimizer, DPO(beta=BETA), clip_norm=CLIP)

    def profiled(self) -> Any:
        """Return the events of a step."""
        options: dict[str, Any] = {"record_shapes": True, "with_flops": True}
        with profile(activities=[ProfilerActivity.CPU], **options) as profiler, record_function("step"):
            self.step()
        return profiler.events()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="of a pruned student; all where not given")
    parser.add_argument("--pairs_per_step", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are skipped")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps, plain and compiled in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.pairs, arguments.made_length = 2 * arguments.pairs_per_step, None
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        task = make_task(arguments, Path(folder))
        plain, compiled = (Steps(task, compile) for compile in (False, True))
    events = plain.profiled()
    reached, shape = product_speed(events)
    pairs = [(seconds(plain.step), seconds(compiled.step)) for _ in range(arguments.rounds)]
    report = {
        "shares": shares(events),
        "compiled": {
            "shares": shares(compiled.profiled()),
            "over_plain": median(b / a for a, b in pairs),
            "rounds": pairs,
        },
        "gflops": reached,
        "largest_product": shape,
        "gflops_alone": alone(shape),
        "model": arguments.model if arguments.layers is None else f"{arguments.model}, {arguments.layers} layers",
        "pairs": arguments.pairs_per_step,
        "tokens": sum(batch.num_tokens for batch in task.batching.batches(task.pairs, task.of_step(1))),
        "data": Path(arguments.data).name,
        "made_by": made_by() | {"threads": arguments.threads, "peers": versions("numba")},
    }
    for part, share in report["shares"].items():
        print(f"{share:6.1%}  {report['compiled']['shares'][part]:6.1%}  {part}")
    print(f"compiled: {report['compiled']['over_plain']:.3f} of the plain step's time")
    print(f"products at {reached:.0f} GFLOP/s, {report['gflops_alone']:.0f} for {shape} alone")
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
