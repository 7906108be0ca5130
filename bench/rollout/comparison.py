"""Sampling's tokens per second, beside transformers' own generate and beside what memory allows.

    tvkd bench rollout [--model MODEL] [--rows 16] [--new_tokens 64] [--json FILE]

One batch of rows: bundled prompts, one response each, the same noise for both. `generate` gets it from a logits
processor that adds it, so that its greedy choice is the same draw; both are asked for the first token alone too, which
is taken off: what is left are the steps over the cache. The share of equal responses is printed before any time. The
limits are counts (bytes of weights and of the live rows' caches; multiply-adds of linear layers) over rates measured in
the same run. Rows never stop with --endless: then every step has all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bench.harness.machine import made_by, seconds, write_report
from bench.harness.meters import interleaved
from bench.rollout.limits import least_seconds, measured_rates, traffic_of
from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.models import load_model, load_tokenizer, stop_ids_of
from tvkd_fast.rollout import ModelSampler, Sample, SamplePrompt, Sampling
from tvkd_fast.rollout.noise import RaceNoise, noise_key
from tvkd_fast.synthetic.bundled import preference_rows

SEED = 0


class AddNoise(LogitsProcessor):
    """Turns greedy choice into the sampler's draw: log π − log E of each row's noise."""

    def __init__(self, prompts: Sequence[SamplePrompt], width: int, vocab_size: int) -> None:
        self.keys = [noise_key(SEED, 0, prompt.ids, 0) for prompt in prompts]
        self.width, self.noise = width, RaceNoise(vocab_size, torch.device("cpu"))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = self.noise.exponentials(self.keys, input_ids.shape[1] - self.width)
        return scores.log_softmax(-1) - noise.log_()


@torch.no_grad()
def generate(model: Any, prompts: Sequence[SamplePrompt], stops: Sequence[int], new_tokens: int) -> list[list[int]]:
    """transformers' own loop over one batch, padded on the left."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=0
    )
    processors = LogitsProcessorList([AddNoise(prompts, width, model.get_output_embeddings().weight.shape[0])])
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    found = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    return found


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model).eval(), load_tokenizer(arguments.model)
    to_tokens = PairTokenizer(tokenizer, stop_ids=stop_ids_of(model))
    stops = [] if arguments.endless else to_tokens.ends.generation_stops
    prompts = [
        SamplePrompt(to_tokens.prompt_ids(row["prompt"], f"row {i}"), f"row {i}")
        for i, row in enumerate(preference_rows("eval", arguments.rows))
    ]
    sampler = ModelSampler(model, stops, tokens_at_once=10**9)

    def ours(new_tokens: int) -> list[Sample]:
        found = sampler.sample(prompts, Sampling(max_new_tokens=new_tokens), seed=SEED)
        return [sample for (sample,) in found]

    samples = ours(arguments.new_tokens)
    theirs = generate(model, prompts, stops, arguments.new_tokens)
    equal = sum(sample.ids == ids for sample, ids in zip(samples, theirs, strict=True)) / len(prompts)
    print(f"{equal:.0%} of {len(prompts)} responses are the same as generate's", flush=True)
    runs = {
        "tvkd_fast": lambda: ours(arguments.new_tokens),
        "tvkd_fast, first token": lambda: ours(1),
        "generate": lambda: generate(model, prompts, stops, arguments.new_tokens),
        "generate, first token": lambda: generate(model, prompts, stops, 1),
    }
    timers = {name: lambda run=run: seconds(run) for name, run in runs.items()}
    taken = {name: median(x for _, x in of_one) for name, of_one in interleaved(timers, arguments.rounds).items()}
    rates, traffic = measured_rates(model.dtype), traffic_of(model)
    memory, arithmetic = least_seconds(traffic, rates, [len(prompt.ids) for prompt in prompts], samples)
    tokens = sum(len(sample.ids) for sample in samples)
    behind = tokens - len(samples)
    speeds = {name: behind / (taken[name] - taken[f"{name}, first token"]) for name in ("tvkd_fast", "generate")}
    return {
        "model": arguments.model,
        "rows": len(prompts),
        "tokens": tokens,
        "equal": equal,
        "seconds": taken,
        "tokens_per_second": speeds,
        "whole_tokens_per_second": {name: tokens / taken[name] for name in speeds},
        "limits": {"memory": behind / memory, "arithmetic": behind / arithmetic},
        "rates": {"bytes_per_second": rates.bandwidth, "operations_per_second": rates.arithmetic},
        "traffic": {"weights": traffic.weights, "per_position": traffic.per_position, "products": traffic.products},
        "made_by": made_by(),
    }


def text(report: dict[str, Any]) -> str:
    lines = [f"{report['model']}, {report['rows']} rows, {report['tokens']:,} tokens; tokens per second"]
    for name, speed in report["tokens_per_second"].items():
        whole = report["whole_tokens_per_second"][name]
        lines.append(f"{name:<22}{speed:>8.1f} over the cache {whole:>8.1f} with the prompts")
    limits, rates = report["limits"], report["rates"]
    lines.append(f"{'memory bound':<22}{limits['memory']:>8.1f} at {rates['bytes_per_second'] / 1e9:.1f} GB/s")
    lines.append(
        f"{'arithmetic bound':<22}{limits['arithmetic']:>8.1f} at {rates['operations_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tvkd bench rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=16, help="prompts, and responses, of the one batch")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its choice")
    parser.add_argument("--endless", action="store_true", help="no stop ids: every row has all of its tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = compare(arguments)
    print(text(report))
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
