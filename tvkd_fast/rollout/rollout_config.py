"""How a training run samples what it learns from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from tvkd_fast.ranges import SHARE, at_least, number
from tvkd_fast.rollout.model_sampler import TOKENS_AT_ONCE
from tvkd_fast.rollout.sampling import Sampling


@dataclass(kw_only=True)
class RolloutConfig(Sampling):
    """Sampling in training, of the policy that is trained."""

    share: float | None = number(None, SHARE)
    """Share of steps over samples of the policy; the other steps are over the data's chosen responses. Where not given
    1 for objectives over the policy's samples, and 0 for others."""
    every: int = number(1, at_least(1))
    """Sample for so many steps at once: the last of them learns from samples of a policy every − 1 steps older."""
    any_law: bool = False
    """Let temperature, top_p and top_k bend the law of the samples also for an objective that is over the policy's own
    law, and is biased then."""
    tokens_at_once: int = number(TOKENS_AT_ONCE, at_least(1))
    """Most tokens of a batch that is sampled, prompts and room for responses: the cache holds as many."""

    group: ClassVar[str] = "rollout"

    def samples(self, share: float, seed: int, step: int) -> bool:
        """Whether a step is over samples: a function of (seed, step) that is true of about `share` of the steps."""
        digest = hashlib.sha256(f"on policy:{seed}:{step}".encode()).digest()
        return int.from_bytes(digest[:6]) < share * 2**48
