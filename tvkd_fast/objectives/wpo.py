"""WPO: DPO whose pairs weigh as the policy would have sampled them (arXiv 2406.11827).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import on_policy_weights, sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("wpo", source="arXiv 2406.11827")
@dataclass(kw_only=True)
class WPO(Objective):
    """−sg(w) log σ(βΔρ), w = min(1, Π_y exp(mean_t log p_y − log Σp²)).

    No gradient flows through w.
    """

    beta: float = number(0.01, POSITIVE)
    """β > 0: strength of the KL term."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE, Need.COLLISIONS})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert policy.log_collisions is not None
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        weights = on_policy_weights(policy.logps, policy.log_collisions, policy.lengths)
        return ObjectiveOutput.of(weights * sigmoid_losses(chosen - rejected), chosen, rejected)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta)
