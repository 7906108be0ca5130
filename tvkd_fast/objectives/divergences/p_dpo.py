"""p-DPO: DPO that pays for forgetting the reference, token by token (arXiv 2405.19316).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import REFERENCE, Joint
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("p_dpo", source="arXiv 2405.19316")
@dataclass(kw_only=True)
class PDPO(Objective):
    """−log σ(βΔρ) + w(D_w + D_l), D = Σ_t KL(π_ref‖π)."""

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term inside the sigmoid."""
    kl_weight: float = number(0.01, NOT_NEGATIVE)
    """w ≥ 0: weight of the reference's forward KL, summed over tokens; its authors call it γ. 0 is DPO."""

    drift: ClassVar[Joint] = Joint("forward_kl", of=REFERENCE)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE, Need.REFERENCE_STATES})

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.drift,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        of_chosen, of_rejected = policy.summed(self.drift, batch).chunk(2)
        losses = sigmoid_losses(chosen - rejected) + self.kl_weight * (of_chosen + of_rejected)
        return ObjectiveOutput.of(losses, chosen, rejected)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta)
