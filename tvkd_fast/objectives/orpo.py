"""ORPO: Odds Ratio Preference Optimization, without a reference (arXiv 2403.07691).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import log_odds, sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("orpo", source="arXiv 2403.07691")
@dataclass(kw_only=True)
class ORPO(Objective):
    """−w log p_w − β log σ(Δ log odds), log p = log π/|y|, odds = p/(1−p).

    Rewards that are shown are β log odds.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: weight of the odds ratio; its authors call it λ."""
    likelihood_weight: float = number(1.0, NOT_NEGATIVE)
    """w ≥ 0: weight of the chosen response's negative log-likelihood per token."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        likelihood, _ = policy.means.chunk(2)
        chosen, rejected = log_odds(policy.means).chunk(2)
        losses = self.beta * sigmoid_losses(chosen - rejected) - self.likelihood_weight * likelihood
        return ObjectiveOutput.of(losses, self.beta * chosen, self.beta * rejected)
