"""SimPO: Simple Preference Optimization with a reference-free reward (arXiv 2405.14734).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("simpo", source="arXiv 2405.14734")
@dataclass(kw_only=True)
class SimPO(Objective):
    """−log σ(β(Δr − γ/β)), r = log π/|y|."""

    beta: float = number(2.0, POSITIVE)
    """β > 0: scale of the reward; its authors use 2 to 2.5."""
    gamma_beta_ratio: float = number(0.5, NOT_NEGATIVE)
    """γ/β ≥ 0: the margin that mean log-probabilities should reach; its authors use 0.5 to 0.55."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.means).chunk(2)
        losses = sigmoid_losses(chosen - rejected - self.beta * self.gamma_beta_ratio)
        return ObjectiveOutput.of(losses, chosen, rejected)
