"""What is asked of a sampler, what it returns, and counts of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvkd_fast.rollout.sampling import Sampling


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt's token ids, which no sampler makes anew."""

    ids: list[int]
    row: str
    """The name that messages call it by."""
    first: int = 0
    """The number of its first sample, where the prompt has been asked before: the samples so far."""


@dataclass(frozen=True)
class Sample:
    """One response, in the tokens that were drawn."""

    ids: list[int]
    """Up to and with the first stop id."""
    ended: bool
    """Whether the last id is a stop id; else the response was cut off by its length."""
    logps: list[float]
    """Each token's log-probability under the policy: temperature 1, full vocabulary, nats."""
    law_logps: list[float] | None = None
    """The same under the law that was sampled, where that is another; None where it is the policy's own or greedy."""

    @property
    def empty(self) -> bool:
        """Whether nothing stands before the end."""
        return self.ended and len(self.ids) == 1


Finished = Callable[[Sequence[Sample]], None]
"""Called with responses as they are finished, for progress."""


class Sampler(Protocol):
    """Whatever samples responses: a model in this process, or a server."""

    def sample(
        self, prompts: Sequence[SamplePrompt], sampling: Sampling, *, seed: int, step: int = 0, finished: Finished = ...
    ) -> list[list[Sample]]:
        """`sampling.n` responses to each prompt, in the prompts' order."""


@dataclass
class SampleCounts:
    """Counts of responses and their tokens."""

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    unfinished: int = 0
    """Responses that never stopped."""
    empty: int = 0
    """Responses that stopped at once."""

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self.samples += 1
            self.tokens += len(sample.ids)
            self.longest = max(self.longest, len(sample.ids))
            self.unfinished += not sample.ended
            self.empty += sample.empty

    def merge(self, other: SampleCounts) -> None:
        """Add what was counted elsewhere."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)
        self.unfinished += other.unfinished
        self.empty += other.empty

    @property
    def mean_length(self) -> float:
        """Tokens per response."""
        return self.tokens / max(1, self.samples)

    def __str__(self) -> str:
        share = f"{self.unfinished / max(1, self.samples):.1%}"
        return (
            f"{self.samples:,} responses of {self.mean_length:,.1f} tokens (at most {self.longest:,}); "
            f"{self.unfinished:,} never stopped ({share}), {self.empty:,} empty"
        )
