"""What the steps of a run learn from: pairs of a dataset, as one process's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvkd_fast.data.batch import PairBatch
from tvkd_fast.data.packing import MicroBatching
from tvkd_fast.data.tokenization import TokenizedPair


@dataclass(frozen=True)
class StepPairs:
    """A dataset's pairs, step by step, divided among `size` processes. They have no state."""

    dataset: Sequence[TokenizedPair]
    batching: MicroBatching
    pairs: Callable[[int], list[int]]
    """The dataset's pairs that a step takes, over all processes."""
    chosen_only: bool = False
    rank: int = 0
    size: int = 1

    def batches(self, step: int) -> list[PairBatch]:
        """This process's micro-batches of a step."""
        return self.share(self.dataset, self.pairs(step))

    def share(self, pairs: Sequence[TokenizedPair], indices: Sequence[int]) -> list[PairBatch]:
        """This process's micro-batches of any pairs."""
        return self.batching.share(pairs, indices, rank=self.rank, size=self.size, chosen_only=self.chosen_only)

    def samples(self, step: int) -> list[tuple[int, list[int]]]:
        """The pairs whose prompts the step has sampled for, and the token ids of each response."""
        return []

    def metrics(self, busy: float) -> dict[str, float]:
        """What is to be shown of the steps since the last call, which took `busy` seconds."""
        return {}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps has to keep."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
