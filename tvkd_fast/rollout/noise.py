"""The noise of sampling: a function of what is sampled, and of nothing that happens beside it.

The draw of token y at a state is the smallest E_y/p_y, where the E_y are independent standard exponentials (the
Gumbel-max trick, written as a race). Each E is a hash of (seed, step, prompt, sample, position, y), so that neither
the batch, its order, nor the number of processes changes a draw. An inverse of the cumulated probabilities would need
one number per draw, but a rounding error of 1e-6 there moves a boundary past many tokens of a vocabulary's tail; here
a draw changes only where the two first of the race are as near to each other as the error.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from tvkd_fast.kernels.hash_uniform import hashed, hashed_rows

_WORD = 2**64 - 1


def noise_key(seed: int, step: int, prompt_ids: Sequence[int], index: int) -> int:
    """64 bits of what one sample is a function of: seed, step, the prompt's token ids, and the sample's number."""
    digest = blake2b(digest_size=8)
    for number in (seed, step, index, *prompt_ids):
        digest.update(number.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


class RaceNoise:
    """Independent standard exponentials, one for each (key, position, token id)."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.columns = hashed(torch.arange(vocab_size, device=device), 0)

    def exponentials(self, keys: Sequence[int], position: int) -> Tensor:
        """[R, V] float32 in (2⁻³³, 17), of rows with these `noise_key`s at this position of their responses."""
        words = [_mixed(key, position) for key in keys]
        halves = torch.tensor([[word & 0xFFFFFFFF, word >> 32 | 1] for word in words], device=self.columns.device)
        xors, factors = (halves - 2**32 * (halves >= 2**31)).int().unbind(1)
        # The sign aside, an int32 near 0 keeps all of its bits as float32: small exponentials, which win, are exact.
        u = hashed_rows(self.columns, xors, factors).float().abs_().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        return u.neg_().log1p_().neg_()


def _mixed(key: int, position: int) -> int:
    """64 well-mixed bits of both (Steele, Lea and Flood's SplitMix64)."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & _WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ x >> shift) * factor) & _WORD
    return x ^ x >> 31
