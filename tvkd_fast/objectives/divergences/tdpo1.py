"""TDPO1: DPO whose margin counts how far the policy strays from the reference, token by token (arXiv 2404.11999).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import REFERENCE, Joint
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("tdpo1", source="arXiv 2404.11999")
@dataclass(kw_only=True)
class TDPO1(Objective):
    """−log σ(β(Δρ + ΔD)), D = Σ_t KL(π_ref‖π).

    Rewards that are shown are β(ρ + D).
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""

    drift: ClassVar[Joint] = Joint("forward_kl", of=REFERENCE)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE, Need.REFERENCE_STATES})

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.drift,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        ratios, drifts = policy.log_ratios(scores), policy.summed(self.drift, batch)
        chosen, rejected = (self.beta * (ratios + drifts)).chunk(2)
        losses = sigmoid_losses(self.margins(ratios, drifts))
        return ObjectiveOutput.of(losses, chosen, rejected)

    def margins(self, ratios: Tensor, drifts: Tensor) -> Tensor:
        """(P,) what the sigmoid is of, from ρ and D (2P,)."""
        chosen, rejected = (ratios + drifts).chunk(2)
        return self.beta * (chosen - rejected)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta)
