"""A whole step of preference training on a CPU, forward and backward, by each way to the head.

    tvkd bench step --json FILE [--data PAIRS.jsonl.gz --layers 4 --pairs 4 --max_length 192]  (or python -m bench.step)

DPO of SmolLM2-135M, or of a student pruned to `--layers`, with the reference's log-probabilities at hand. Each way has
a process of its own and is held to the eager one, by its loss and by every parameter's gradient, before it is timed;
the figures are medians over rounds. Linux only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.machine import made_by, write_report
from bench.policy_heads import EagerHead
from bench.runners import Runner
from tvkd_fast import HeadGradient, dpo_loss
from tvkd_fast.data import PairBatch, build_dataset, micro_batches
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead, load_model, load_tokenizer, prune_layers

EAGER = "eager log-softmax"


WAYS: dict[str, tuple[HeadGradient | None, float]] = {
    EAGER: (None, 0.0),
    "tvkd_fast, exact": (HeadGradient(), 1e-4),
    "tvkd_fast, exact, logits kept": (HeadGradient(workspace_mb=512), 1e-4),
    "tvkd_fast, sparse 2^-14": (HeadGradient(grad_mode="sparse", eps=2.0**-14), 5e-2),
    "tvkd_fast, sparse 2^-16": (HeadGradient(grad_mode="sparse", eps=2.0**-16), 2e-2),
}
"""By name, how the head is differentiated, and how far the whole gradient may be from the eager one, relatively."""


def job(policy: PolicyWithHead, batch: PairBatch, reference: Tensor, way: HeadGradient | None) -> Callable[[], Any]:
    if way is None:
        policy.head.__class__ = EagerHead
    else:
        policy.head.gradient = way

    def go() -> tuple[Tensor, list[Tensor]]:
        loss = dpo_loss(segment_sums(policy(batch), batch.cu_seqlens), reference).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(parameters(policy))))

    return go


def parameters(policy: PolicyWithHead) -> Iterator[Tensor]:
    return (x for x in policy.parameters() if x.requires_grad)


def keep(file: Path, result: tuple[Tensor, list[Tensor]]) -> None:
    loss, gradients = result
    save_file({"loss": loss, **{str(i): x.contiguous() for i, x in enumerate(gradients)}}, file)


def difference(want: dict[str, Tensor], got: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    """Of the loss in nats, and of all gradients together, relative."""
    pairs = [(x, want[str(i)]) for i, x in enumerate(got[1])]
    off = sum(float((x - y).double().square().sum()) for x, y in pairs)
    whole = sum(float(y.double().square().sum()) for _, y in pairs)
    return {"err_nats": abs(float(got[0] - want["loss"])), "rel_err": (off / whole) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="of a pruned student; all where not given")
    parser.add_argument("--pairs", type=int, default=4, help="of the step")
    parser.add_argument("--max_length", type=int, default=192, help="most tokens of prompt and response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    options: dict[str, Any] = {"max_length": arguments.max_length, "bad_pairs": "drop", "overlong": "drop"}
    dataset = build_dataset(arguments.data, tokenizer, limit=arguments.pairs + 8, **options)
    (batch,) = micro_batches(dataset, range(arguments.pairs), size=arguments.pairs)
    model = load_model(arguments.model)
    # The probe would compute here, and threads do not survive a fork.
    policy = PolicyWithHead(model if arguments.layers is None else prune_layers(model, arguments.layers), probe=False)
    reference = torch.zeros(2 * arguments.pairs)
    make = {name: partial(job, policy, batch, reference, way) for name, (way, _) in WAYS.items()}
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "eager.safetensors"
        yardstick = Runner(make[EAGER], partial(keep, file), threads=arguments.threads, reuse=False)
        yardstick.check()
        yardstick.close()
        want = load_file(file)
    runners = {
        name: Runner(make[name], partial(difference, want), threads=arguments.threads, reuse=False) for name in WAYS
    }
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for name, runner in runners.items():
        found, peak, _ = runner.check()
        rows[name] = {"name": name, **found, "peak_mb": peak / 2**20}
        if found["rel_err"] > WAYS[name][1] or found["err_nats"] > 1e-4:
            raise SystemExit(f"{name} is wrong: {found}")
    for _ in range(arguments.rounds):
        for name, runner in runners.items():
            taken[name].append(runner.seconds())
    for name, runner in runners.items():
        runner.close()
        seconds = median(taken[name])
        rows[name] |= {"seconds": seconds, "over_exact": seconds / median(taken["tvkd_fast, exact"])}
        rows[name]["rounds"] = taken[name]
    torch.set_num_threads(arguments.threads)
    report = {
        "results": list(rows.values()),
        "model": arguments.model if arguments.layers is None else f"{arguments.model}, {arguments.layers} layers",
        "pairs": arguments.pairs,
        "response_tokens": batch.labels.numel(),
        "tokens": batch.num_tokens,
        "data": Path(arguments.data).name,
        "made_by": made_by() | {"threads": arguments.threads},
    }
    for row in report["results"]:
        print(
            f"{row['name']:<32} {row['over_exact']:.3f} of the exact step {row['peak_mb']:8,.0f} MB"
            f"  gradient {row['rel_err']:.1e}"
        )
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
