"""MixKD: distillation on mixtures of two responses' embeddings, each model mixing its own (arXiv 2011.00593).

Letters: P pairs, 2P responses, chosen first; N response tokens, L tokens of a row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from typing import Literal

import torch

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, SHARE, number
from tvkd_fast.scoring.layout import Scores


@objective("mixkd", source="arXiv 2011.00593")
@dataclass(kw_only=True)
class MixKD(TokenDivergence):
    """Σ_t KL(q‖p) on sx_i + (1−s)x_j, s ~ Beta(a, a), divided by tokens and not by pairs.

    x_i and x_j are the embeddings of a pair's two responses, token by token from their beginnings. Held-out losses are
    of responses as they are. Rewards that are shown are mean log-probabilities.
    """

    responses: Literal["chosen", "both"] = "both"
    """Whose tokens are compared: the chosen responses', or the rejected ones' as well."""
    concentration: float = number(0.4, POSITIVE)
    """a > 0 of Beta(a, a): the smaller, the nearer s to 0 or 1."""
    own_share: float | None = number(None, SHARE)
    """s itself, of every pair, in place of a draw; 1 mixes nothing."""

    kind = "forward_kl"
    linear = True
    changes_input = True

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {Need.REJECTED}

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        losses = super().loss(policy, scores, batch).losses
        return ObjectiveOutput.of(losses, *policy.means.chunk(2))

    def changed(self, batch: PairBatch, seed: int, step: int) -> PairBatch:
        """The pair's s is a function of (seed, step, pair), whatever micro-batch it is in."""
        places = batch.input_ids.numel()
        partners, shares = torch.arange(places), torch.ones(places)
        starts = [0, *accumulate(length + 1 for length in batch.response_lengths)]
        for i, pair in enumerate(batch.pairs.tolist()):
            both = (i, batch.num_pairs + i)
            common = min(batch.response_lengths[response] for response in both)
            # States after s_0 stand where the response's tokens do.
            chosen, rejected = (batch.states[starts[one] + 1 :][:common] for one in both)
            partners[chosen], partners[rejected] = rejected, chosen
            own = drawn_share(self.concentration, seed, step, pair) if self.own_share is None else self.own_share
            shares[chosen], shares[rejected] = own, own
        return replace(batch, partners=partners, shares=shares)


def drawn_share(concentration: float, seed: int, step: int, pair: int) -> float:
    """A draw of Beta(a, a), the same whoever makes it."""
    digest = sha256(f"mixed share:{seed}:{step}:{pair}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big")).betavariate(concentration, concentration)
