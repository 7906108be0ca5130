"""A whole optimizer step of DPO on a CPU, ours beside TRL's: pairs per second, peak memory, and the same losses.

    tvkd bench step --pairs 32 --max_length 512 --peers trl --data PAIRS.jsonl.gz --json FILE  (or python -m bench.step)

SmolLM2-135M in float32, or a student pruned to `--layers`, under AdamW, from one start over the same pairs in the same
order, none of them truncated, with the log-probabilities of a reference that differs from the policy at hand. Each
contender has a process of its own; its log-probabilities of the first pairs are checked against float64's before it is
timed. They take a step in turn, and the first step is no part of the figures. TRL is given our token ids, and of
micro-batches of 1, 2 and 4 pairs (`--trl_batches`) the fastest. Peak memory is the process's own (VmHWM, reset as the
first step begins). Linux only.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness.checker import checked, relative
from bench.harness.contenders import Contender
from bench.harness.machine import made_by, versions, write_report
from bench.harness.meters import interleaved
from bench.step.contenders import (
    COMPILED,
    OURS,
    TRL,
    Run,
    StepTask,
    Training,
    contenders,
    exact_logps_of,
    logps_of,
)
from tvkd_fast.data import MicroBatching, PairDataset, TokenizedPair, build_dataset
from tvkd_fast.data.packing import packed_length
from tvkd_fast.models import PolicyWithHead, load_model, load_tokenizer, prune_layers, save_model

LIMITS = {"logps": 1e-4}
"""The largest relative error of a contender's log-probabilities of responses."""


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="of a pruned student; all where not given")
    parser.add_argument("--pairs", type=int, default=32, help="of all steps together")
    parser.add_argument("--pairs_per_step", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are skipped")
    parser.add_argument("--made_length", type=int, help="pairs of one length, cut from the data's running text")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=2048, help="ours")
    parser.add_argument("--peers", nargs="*", choices=["trl"], default=[], help="who else takes part")
    parser.add_argument("--trl_batches", nargs="+", type=int, default=[1, 2, 4], help="pairs of TRL's micro-batches")
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile too")
    parser.add_argument("--variants", action="store_true", help="that, sparse gradients and the shortest rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("peak memory is read from /proc: run this on Linux")
    with TemporaryDirectory() as folder:
        task = make_task(arguments, Path(folder))
        report = compare(task, arguments)
    for row in report["results"]:
        print(text(row))
    write_report(report, arguments.json)


def text(row: dict[str, Any]) -> str:
    """Return one contender's line."""
    if refusal := row.get("refused") or row.get("wrong"):
        return f"{row['name']:<28} {refusal}"
    return (
        f"{row['name']:<28} {row['pairs_per_s']:.3f} pairs/s  {row['peak_mb']:8,.0f} MB  "
        f"worst loss off {row['loss_off']:.1e}"
    )


def make_task(arguments: argparse.Namespace, folder: Path) -> StepTask:
    """The start, the pairs, and their log-probabilities under a reference that is the start without its last block."""
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model)
    if arguments.layers is not None:
        model = prune_layers(model, arguments.layers)
    save_model(model, tokenizer, folder / "start")
    reference = PolicyWithHead(prune_layers(model, model.config.num_hidden_layers - 1), packing="shared").eval()
    dataset = build_dataset(arguments.data, tokenizer, max_length=2**20, bad_pairs="drop")
    limit = arguments.max_length
    pairs = [x for x in dataset if len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids)) <= limit]
    if arguments.made_length:
        pairs = made_pairs(dataset, arguments.made_length, arguments.pairs)
    if len(pairs) < arguments.pairs:
        raise SystemExit(f"{arguments.data} has {len(pairs)} pairs of at most {limit} tokens: ask for fewer --pairs")
    task = StepTask(
        start=str(folder / "start"),
        pairs=pairs[: arguments.pairs],
        ref_logps=torch.empty(0, 2),
        start_logps=torch.empty(0, 2),
        pairs_per_step=arguments.pairs_per_step,
        batching=MicroBatching(tokens=arguments.tokens_per_micro_batch),
        threads=arguments.threads,
        folder=str(folder),
    )
    task = replace(task, ref_logps=logps_of(reference, task, range(arguments.pairs)))
    start = PolicyWithHead(model, packing="shared").eval()
    return replace(task, start_logps=exact_logps_of(start, task, task.of_step(0)))


def made_pairs(dataset: PairDataset, length: int, count: int) -> list[TokenizedPair]:
    """Pairs of one length, half of it the prompt, cut from the data's text as it goes on; they mean nothing."""
    text = [token for pair in dataset for token in pair.prompt_ids + pair.chosen_ids + pair.rejected_ids]
    half = length // 2
    cuts = [text[start : start + half] for start in range(0, 3 * count * half, half)]
    if len(cuts[-1]) < half:
        raise SystemExit(f"the data has {len(text):,} tokens, too few for {count} pairs of {length}: give more --data")
    parts = zip(cuts[0::3], cuts[1::3], cuts[2::3], strict=True)
    return [TokenizedPair(*part, False, False, f"made pair {i}") for i, part in enumerate(parts)]


def compare(task: StepTask, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = [size for size in arguments.trl_batches if task.pairs_per_step % size == 0] or [1]
    of_batch = partial(contenders, arguments.max_length)
    tried: dict[int, float] = {}
    if TRL in arguments.peers and not of_batch(sizes[0])[TRL].refusal and len(sizes) > 1:
        tried = {size: _second_step_of(of_batch(size)[TRL], task) for size in sizes}
    runs = of_batch(min(tried, key=tried.__getitem__) if tried else sizes[0])
    chosen = {name: x for name, x in runs.items() if takes_part(name, task, arguments)}
    rows: dict[str, dict[str, Any]] = {}
    training: dict[str, Training] = {}
    for name, contender in chosen.items():
        rows[name] = {"name": name} | ({"refused": contender.refusal} if contender.refusal else {})
        if not contender.refusal:
            one = Training(contender, task)
            rows[name] |= check(one, task)
            if "wrong" in rows[name]:
                one.close()
            else:
                training[name] = one
    interleaved({name: one.step for name, one in training.items()}, task.steps)
    for one in training.values():
        one.close()
    yardstick = training.get(TRL) or training.get(OURS)
    for name, one in training.items():
        rows[name] |= _figures(one, yardstick or one, task)
    tokens = sum(packed_length(pair) for pair in task.pairs)
    return {
        "results": list(rows.values()),
        "trl_seconds_by_batch": tried,
        "model": arguments.model if arguments.layers is None else f"{arguments.model}, {arguments.layers} layers",
        "pairs": len(task.pairs),
        "pairs_per_step": task.pairs_per_step,
        "max_length": arguments.made_length or arguments.max_length,
        "tokens": tokens,
        "padded_tokens": sum(2 * (len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids))) for x in task.pairs),
        "response_tokens": sum(len(x.chosen_ids) + len(x.rejected_ids) for x in task.pairs),
        "data": Path(arguments.data).name,
        "made_by": made_by(arguments.threads)
        | {"threads": arguments.threads, "peers": versions("trl", "accelerate", "numba")},
    }


def takes_part(name: str, task: StepTask, arguments: argparse.Namespace) -> bool:
    """Ours always, its variants and peers where they are asked for, short rows where the task's own are longer."""
    if name == OURS or name in arguments.peers or (arguments.compiled and name == COMPILED):
        return True
    shorter = 2 * arguments.max_length < task.batching.tokens
    return arguments.variants and name != TRL and (shorter or ", rows of " not in name)


def check(one: Training, task: StepTask) -> dict[str, Any]:
    """A row's part: how far the start's log-probabilities are from float64's, and "wrong" where that is too far."""
    error = relative(one.logps, task.start_logps)
    found = checked({"logps": error}, LIMITS)
    return {"logps_error": error} | ({"wrong": found["wrong"]} if "wrong" in found else {})


def _second_step_of(contender: Contender[Run], task: StepTask) -> float:
    """Seconds of it: the first has the optimizer's state to make."""
    one = Training(contender, task)
    one.step()
    taken = one.step()
    one.close()
    return taken


def _figures(one: Training, yardstick: Training, task: StepTask) -> dict[str, Any]:
    """`..._off` is how far a contender is from the yardstick: absolute for losses, relative for the rest."""
    taken = [step["seconds"] for step in one.steps[1:]]
    pairs = list(zip(one.steps, yardstick.steps, strict=True))
    return {
        "pairs_per_s": task.pairs_per_step / median(taken),
        "speed_over_yardstick": median(b["seconds"] / a["seconds"] for a, b in pairs[1:]),
        "peak_mb": max(step["peak_mb"] for step in one.steps),
        "losses": [step["loss"] for step in one.steps],
        "grad_norms": [step["grad_norm"] for step in one.steps],
        "seconds": [step["seconds"] for step in one.steps],
        "logps_off": float((one.logps / yardstick.logps - 1).abs().max()),
        "loss_off": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "grad_norm_off": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
    }


if __name__ == "__main__":
    main()
