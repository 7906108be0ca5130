"""What a token cannot be sampled without: bytes of weights and cache, and the arithmetic of the products.

Counts, over rates that are measured on this machine in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tvkd_fast.rollout import Sample


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a stream, and floating-point operations per second of a product."""

    bandwidth: float
    arithmetic: float


def measured_rates(dtype: torch.dtype, *, megabytes: int = 1024, rounds: int = 5) -> Rates:
    """Reads of a tensor far larger than any cache, and of square products, on the threads of this process."""
    streamed = torch.ones(megabytes * 2**20 // dtype.itemsize, dtype=dtype)
    x = torch.ones(1024, 1024, dtype=dtype)
    bandwidth = streamed.nbytes / _seconds(streamed.sum, rounds)
    return Rates(bandwidth, 2 * 1024**3 / _seconds(lambda: x @ x, rounds))


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    run()
    taken = []
    for _ in range(rounds):
        since = time.perf_counter()
        run()
        taken.append(time.perf_counter() - since)
    return median(taken)


@dataclass(frozen=True)
class Traffic:
    """What a model reads per step and per position of a row."""

    weights: int
    """Bytes that every step reads: all but an embedding of its own, of which it reads a few rows."""
    per_position: int
    """Bytes of keys and values of a position."""
    products: int
    """Multiply-adds per token: the weights of linear layers."""


def traffic_of(model: Any) -> Traffic:
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters())
    read = parameters if embedding is head else parameters - embedding.numel()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = 2 * config.num_hidden_layers * config.num_key_value_heads * size
    return Traffic(read * head.element_size(), positions * head.element_size(), read)


def least_seconds(
    traffic: Traffic, rates: Rates, prompts: Sequence[int], samples: Sequence[Sample]
) -> tuple[float, float]:
    """Seconds of the bytes, and of the arithmetic, of all steps behind the first token, if the rows are one batch.

    The first token of a response comes with its prompt. `prompts` are the prompts' lengths, by sample.
    """
    bytes_read, operations = 0, 0
    for step in range(1, max(len(sample.ids) for sample in samples)):
        live = [length + step for length, sample in zip(prompts, samples, strict=True) if len(sample.ids) > step]
        bytes_read += traffic.weights + traffic.per_position * sum(live)
        operations += 2 * traffic.products * len(live)
    return bytes_read / rates.bandwidth, operations / rates.arithmetic
