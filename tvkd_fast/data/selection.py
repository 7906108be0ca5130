"""Which pairs of a super-batch a step keeps: a pure function of their scores, the seed and the step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

By = Literal["no", "learnability", "easy_reference"]
"""What is kept: every pair, or those of the highest learnability, or those that the teacher finds easiest."""


@dataclass(frozen=True)
class Selection:
    """The rule by which a step keeps some of the pairs that it takes."""

    by: By
    ratio: float
    """Share of the pairs that is left out, in [0, 1)."""
    temperature: float
    """0: the highest scores are kept; above it they are sampled by softmax(score/temperature)."""

    def taken(self, pairs_per_step: int) -> int:
        """Return how many pairs a step takes to keep `pairs_per_step` of them."""
        # 5 / (1 − 0.8) lies above 25, which it stands for.
        return math.ceil(pairs_per_step / (1 - self.ratio) - 1e-9 * pairs_per_step)

    def kept(self, scores: Sequence[float], count: int, *, seed: int, step: int) -> list[int]:
        """Return the places of the `count` scores that are kept, rising; a function of the arguments alone.

        A score that is NaN is kept before others, so that the step which it would spoil is reported.
        """
        keys = torch.tensor(scores, dtype=torch.float64)
        if self.temperature > 0:
            digest = hashlib.sha256(f"select:{seed}:{step}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            # Of scores with Gumbel noise the highest are a sample by softmax without replacement.
            noise = -torch.empty_like(keys).exponential_(generator=generator).log()
            keys = keys / self.temperature + noise
        places = sorted(range(len(keys)), key=keys.nan_to_num(nan=math.inf).neg().tolist().__getitem__)
        return sorted(places[:count])
