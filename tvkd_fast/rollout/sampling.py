"""How responses are sampled, and the law that their tokens then follow.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tvkd_fast.ranges import NOT_NEGATIVE, Range, at_least, check_numbers, number


@dataclass(kw_only=True)
class Sampling:
    """How responses are sampled. The defaults are the policy's own law: temperature 1, the full vocabulary."""

    n: int = number(1, at_least(1))
    """Responses per prompt."""
    max_new_tokens: int = number(128, at_least(1))
    """Most tokens of a response, its end among them."""
    temperature: float = number(1.0, NOT_NEGATIVE)
    """Divides the logits; 0 is greedy."""
    top_p: float = number(1.0, Range(0, 1, without_low=True))
    """Keep the fewest likeliest tokens that have this probability together; 1 keeps all."""
    top_k: int = number(0, at_least(0))
    """Keep the k likeliest tokens; 0 keeps all."""

    group: ClassVar[str] = ""
    """The prefix of the options, such as "rollout"."""

    def __post_init__(self) -> None:
        check_numbers(self, self.group)
        if self.greedy and self.n > 1:
            option = f"--{self.group}.n" if self.group else "--n"
            raise ValueError(f"temperature 0 is greedy, and all {self.n} responses would be the same: set {option} 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def bent(self) -> tuple[str, ...]:
        """The settings under which tokens do not follow the policy's own law; none by default."""
        found = {
            f"temperature {self.temperature:g}": self.temperature != 1,
            f"top_p {self.top_p:g}": self.top_p < 1,
            f"top_k {self.top_k}": self.top_k > 0,
        }
        return tuple(name for name, bends in found.items() if bends)

    def check_law(self, whose: str) -> None:
        """Raise ValueError where `whose` estimate, of samples of the policy's own law, would be biased."""
        if self.bent:
            raise ValueError(
                f"{whose} needs samples of the policy's own law, and {' and '.join(self.bent)} would bend it: set "
                "temperature 1, top_p 1 and top_k 0"
            )

    def law(self, logps: Tensor) -> Tensor:
        """[R, V] log-probabilities of the law that is sampled, −inf where it has cut a token off.

        Args:
            logps: [R, V] the policy's own, at temperature 1 over the full vocabulary. Greedy and unbent they are the
                law's too.
        """
        if self.greedy or not self.bent:
            return logps
        kept = logps / self.temperature
        if 0 < self.top_k < kept.shape[1]:
            kept = _cut_off(kept, kept.topk(self.top_k).indices)
        if self.top_p < 1:
            ranked, order = kept.softmax(-1).sort(descending=True, stable=True)
            # A token stays while those before it have not the probability yet: the likeliest always does.
            stays = ranked.cumsum(-1) - ranked < self.top_p
            kept = kept.masked_fill(~torch.zeros_like(stays).scatter_(1, order, stays), -torch.inf)
        return kept.log_softmax(-1)


def _cut_off(logps: Tensor, kept: Tensor) -> Tensor:
    """The log-probabilities with −inf everywhere but at `kept` [R, k]."""
    return torch.full_like(logps, -torch.inf).scatter_(1, kept, logps.gather(1, kept))
