"""The uncertainty of a figure over pairs: resampled intervals and a paired test, neither assuming a distribution.

Letters: P pairs, R repetitions (seeds), K draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 10_000
_BLOCK = 2**22


def bootstrap_interval(
    numbers: Tensor, *, groups: Sequence[Tensor] | None = None, weights: Sequence[float] = (), draws: int = DRAWS
) -> tuple[float, float]:
    """95% interval (percentiles) of the mean of (P,) numbers, or [R, P], where repetitions are drawn as pairs are.

    With `groups`, places of numbers each, it is that of Σ_g weights_g·mean_g, and pairs are drawn within their group.
    Efron, 1979. Deterministic: it draws from a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = numbers.double().view(-1, numbers.shape[-1])
    if groups is None:
        groups, weights = [torch.arange(numbers.shape[1])], [1.0]
    total = torch.zeros(draws, dtype=torch.float64)
    repetitions = torch.randint(numbers.shape[0], (draws, numbers.shape[0]), generator=generator)
    for places, weight in zip(groups, weights, strict=True):
        own = numbers[:, places]
        for start in range(0, draws, max(1, _BLOCK // own.numel())):
            block = repetitions[start : start + max(1, _BLOCK // own.numel())]
            drawn = torch.randint(own.shape[1], (block.shape[0], own.shape[1]), generator=generator)
            of_repetitions = own[block].mean(1)
            total[start : start + block.shape[0]] += weight * of_repetitions.gather(1, drawn).mean(1)
    low, high = total.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_p(differences: Tensor, *, draws: int = DRAWS) -> float:
    """Two-sided p of (P,) differences of two models, pair by pair, if their mean were 0: signs are flipped at random.

    The randomisation test of Fisher, 1935; of differences that are ±1 and 0, as of right and wrong, it is McNemar's.
    With K draws no p is below 1/(K+1). 1 where no pair differs, and NaN where a difference is.
    """
    if differences.isnan().any():
        return math.nan
    found = differences.double()[differences != 0]
    if found.numel() == 0:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    mean, extreme = found.sum().abs() * (1 - 1e-12), 0
    for start in range(0, draws, max(1, _BLOCK // found.numel())):
        count = min(draws - start, max(1, _BLOCK // found.numel()))
        signs = torch.randint(2, (count, found.numel()), generator=generator).double().mul_(2).sub_(1)
        extreme += int(((signs @ found).abs() >= mean).sum())
    return (extreme + 1) / (draws + 1)
