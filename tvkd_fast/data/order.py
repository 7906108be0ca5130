"""Which pairs a step takes: a pure function of (seed, step), so that a loader has no state to save."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sized
from functools import lru_cache

import torch


def pairs_of_step(seed: int, step: int, *, num_pairs: int, pairs_per_step: int, total: int | None = None) -> list[int]:
    """Dataset indices of the pairs that step `step` (from 0) takes.

    Epochs are permutations laid end to end; a step takes the next `pairs_per_step` of them, across an epoch's end where
    it falls inside the step, and no more than `total` in all steps together, so that the last one may be short. Depends
    on nothing but the arguments.
    """
    start = step * pairs_per_step
    end = start + pairs_per_step
    places = range(start, end if total is None else min(end, total))
    return [_epoch_order(seed, place // num_pairs, num_pairs)[place % num_pairs] for place in places]


def pairs_of_epochs(epochs: float, num_pairs: int) -> int:
    """Return the number of pairs in so many passes; whole passes take every pair equally often."""
    # A product such as 0.1 · 30 lies above the whole number that it stands for.
    return max(1, math.ceil(epochs * num_pairs - 1e-9 * num_pairs))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_pairs: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(num_pairs, generator=generator).tolist()


def check_step(pairs_per_step: int, dataset: Sized, *, taken: int | None = None) -> None:
    """Raise ValueError where a step takes more pairs than there are, or `taken` of which it keeps `pairs_per_step`."""
    if taken is not None and pairs_per_step <= len(dataset) < taken:
        raise ValueError(
            f"a step takes {taken} pairs to keep {pairs_per_step} of them, and the data has {len(dataset)}, of which "
            "less than a step would be left; lower --data.select_ratio or --pairs_per_step, or give more data"
        )
    if pairs_per_step > len(dataset):
        raise ValueError(
            f"a step takes {pairs_per_step} pairs and the data has {len(dataset)}: it would repeat pairs; "
            "lower --pairs_per_step, or give more data"
        )
