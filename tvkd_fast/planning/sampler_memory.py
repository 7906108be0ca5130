"""What a process holds to sample from its policy, beside what it trains with."""

from __future__ import annotations

from tvkd_fast.models import ModelShape
from tvkd_fast.training.train_config import TrainConfig


def whole_copy(config: TrainConfig, weights: float, processes: int) -> dict[str, float]:
    """Return the policy of so many bytes that each of several processes samples from, by name."""
    return {"policy, whole, to sample": weights} if config.sampled_share and processes > 1 else {}


def cache_bytes(config: TrainConfig, policy: ModelShape, prompt: float, rows: float, number: int) -> float:
    """Return the bytes of the keys and values of what is sampled at once, one row at least; logits and the copies that
    a batch makes as rows leave it are not counted.

    `prompt` is its mean tokens, `rows` are the responses of a step in this process, `number` the bytes of one number.
    """
    row = prompt + config.rollout.max_new_tokens
    asked = rows * config.rollout.every * row
    return max(row, min(config.rollout.tokens_at_once, asked)) * policy.cached * number
