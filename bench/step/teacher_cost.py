"""The cost of the teacher on a CPU: scoring once, and training on the kept scores.

    python -m bench.step.teacher_cost --data PAIRS.jsonl.gz --json FILE

Scoring: `score_to_disk` over pairs of the data by a model as reference and as teacher, shards written and read back,
beside what it cannot do without: that model's backbone over the same packed rows, and one product over the states that
reach the head, each twice. The two take turns. Training: steps of a tiny model by TVKD on cached values and by DPO on a
cached reference, two copies that take the same pairs in turn, the one that goes first changing from step to step. The
interval is of the median of paired differences, by order statistics.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness.machine import made_by, seconds, versions, write_report
from bench.harness.meters import interleaved
from bench.head.comparison import fastest_tiling, product
from tvkd_fast.data import MicroBatching, PairDataset, build_dataset, pairs_of_step
from tvkd_fast.distributed import World
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, load_model, load_tokenizer
from tvkd_fast.objectives import Objective
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.manifest import ScoreManifest
from tvkd_fast.scoring.score_passes import score_dataset, score_to_disk
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer
from tvkd_fast.training.optim import OptimConfig, make_optimizer
from tvkd_fast.training.step import train_step

PAIRS_PER_SHARD = 16
CPU = torch.device("cpu")


def manifest(dataset: PairDataset, scorer: OnlineScorer) -> ScoreManifest:
    """A manifest of scores that only this benchmark reads."""
    return ScoreManifest(
        dataset=dataset.fingerprint,
        tokenizer="",
        teacher=None,
        reference="",
        precision="float32",
        kappa=1.0,
        pairs=len(dataset),
        states=scorer.layout(dataset).num_states,
        versions={},
    )


@torch.no_grad()
def backbone_and_product(
    policy: PolicyWithHead, dataset: PairDataset, batching: MicroBatching, tiling: tuple[int, ...]
) -> None:
    """Run the products that scoring by two models cannot do without."""
    for batch in batching.batches(dataset, range(len(dataset))):
        for positions in (batch.predicting, batch.states):
            product(policy.hidden(batch, positions), policy.head.weight, tiling)


def scoring(dataset: PairDataset, arguments: argparse.Namespace) -> dict[str, Any]:
    model = load_model(arguments.model)
    reference = PolicyWithHead(model, packing="shared").eval().requires_grad_(False)
    scorer = OnlineScorer(reference, TeacherWithHead(load_model(arguments.model), packing="shared"))
    batching = MicroBatching(tokens=arguments.tokens_per_micro_batch)
    states = sum(batch.states.numel() for batch in batching.batches(dataset, range(len(dataset))))
    hidden = torch.randn(min(states, 2048), reference.head.in_features)
    weight = reference.head.weight.detach()
    tiling = fastest_tiling(hidden, weight)
    backbones = partial(backbone_and_product, reference, dataset, batching, tiling)

    def score() -> float:
        with TemporaryDirectory() as folder:
            made = manifest(dataset, scorer)
            options: dict[str, Any] = {"pairs_per_shard": PAIRS_PER_SHARD, "batching": batching, "world": World(CPU)}
            return seconds(partial(score_to_disk, dataset, scorer, made, f"{folder}/scores", **options))

    taken = interleaved({"ours": score}, arguments.rounds + 1, before=partial(seconds, backbones))
    # The first round wakes threads and fills caches.
    lower_bound, ours = zip(*taken["ours"][1:], strict=True)
    return {
        "model": arguments.model,
        "pairs": len(dataset),
        "states": states,
        "speed_over_floor": median(b / a for a, b in zip(ours, lower_bound, strict=True)),
        "seconds": list(ours),
        "floor_seconds": list(lower_bound),
    }


def tiny(vocabulary: int, seed: int) -> PolicyWithHead:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return PolicyWithHead(LlamaForCausalLM(config), packing="shared")


def training(dataset: PairDataset, arguments: argparse.Namespace) -> dict[str, Any]:
    vocabulary = dataset.vocab_size_needed
    batching = MicroBatching(tokens=arguments.tokens_per_micro_batch)
    reference = tiny(vocabulary, 0).eval()
    teacher = TeacherWithHead(tiny(vocabulary, 1).model, packing="shared")
    steps: dict[str, Callable[[int], Any]] = {}
    scorers: list[tuple[Objective, OnlineScorer]] = [
        (DPO(), OnlineScorer(reference, None)),
        (TVKD(gamma=0.9), OnlineScorer(reference, teacher)),
    ]
    for objective, scorer in scorers:
        cache = score_dataset(dataset, scorer, manifest(dataset, scorer), batching=batching, world=World(CPU))
        steps[objective.name] = take_steps(tiny(vocabulary, 0), cache, dataset, batching, objective)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in range(arguments.steps + 10):
        for name in sorted(steps, reverse=step % 2 == 1):
            taken[name].append(seconds(partial(steps[name], step)))
    dpo, tvkd = ([1e3 * x for x in taken[name][10:]] for name in ("dpo", "tvkd"))
    differences = [a - b for a, b in zip(tvkd, dpo, strict=True)]
    low, high = interval_of_median(differences)
    return {
        "steps": arguments.steps,
        "pairs_per_step": 8,
        "dpo_ms": median(dpo),
        "tvkd_ms": median(tvkd),
        "difference_ms": median(differences),
        "interval_ms": [low, high],
        "allowed_ms": 3 + 0.01 * median(dpo),
    }


def take_steps(
    policy: PolicyWithHead, cache: ScoreCache, dataset: PairDataset, batching: MicroBatching, objective: Objective
) -> Callable[[int], Any]:
    """Takes the step of a number, its pairs packed and its scores looked up."""
    optimizer = make_optimizer(policy, OptimConfig(lr=1e-6))
    scorer = CachedScorer(cache)

    def step(number: int) -> None:
        order = pairs_of_step(0, number, num_pairs=len(dataset), pairs_per_step=8)
        batches = list(batching.batches(dataset, order))
        train_step(policy, scorer, batches, optimizer, objective, clip_norm=1.0)

    return step


def interval_of_median(numbers: list[float]) -> tuple[float, float]:
    """A 95% interval that assumes no distribution: the order statistics n/2 ± 1.96·√n/2."""
    ordered, n = sorted(numbers), len(numbers)
    half = 0.98 * math.sqrt(n)
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--pairs", type=int, default=32, help="that are scored")
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are cut")
    parser.add_argument("--rounds", type=int, default=3, help="of scoring")
    parser.add_argument("--steps", type=int, default=240, help="of training, by either")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    dataset = build_dataset(
        arguments.data, tokenizer, limit=400, max_length=arguments.max_length, bad_pairs="drop", overlong="drop"
    )
    few = PairDataset(dataset[: arguments.pairs], replace(dataset.report, pairs=arguments.pairs))
    report: dict[str, Any] = {
        "training": training(dataset, arguments),
        "scoring": scoring(few, arguments),
        "data": Path(arguments.data).name,
        "made_by": made_by() | {"threads": torch.get_num_threads(), "peers": versions("numba")},
    }
    trained, scored = report["training"], report["scoring"]
    low, high = trained["interval_ms"]
    print(
        f"a step of DPO {trained['dpo_ms']:.1f} ms; TVKD {trained['difference_ms']:+.2f} ms ({low:+.2f} to {high:+.2f})"
    )
    print(f"scoring at {scored['speed_over_floor']:.2f} of the speed of backbone and product")
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
