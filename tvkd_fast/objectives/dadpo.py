"""daDPO: distribution-aware DPO, towards a reference and a teacher at once (arXiv 2506.15717).

It is TVKD's loss under another return: Ψ = log π_φ(y) − log π_ref(y), β = β₁ + β₂ and α = β₂.

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import tvkd_loss
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("dadpo", source="arXiv 2506.15717")
@dataclass(kw_only=True)
class DaDPO(Objective):
    """−log σ((β₁+β₂)Δ log π − β₁Δ log π_ref − β₂Δ log π_φ).

    Rewards that are shown are (β₁+β₂)ρ, and what the teacher takes from their margin is the shaping.
    """

    beta_ref: float = number(0.05, POSITIVE)
    """β₁ > 0: pull towards the reference."""
    beta_teacher: float = number(0.05, NOT_NEGATIVE)
    """β₂ ≥ 0: pull towards the teacher φ; 0 is DPO."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE, Need.TEACHER_LOGPS})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert scores.ref_logps is not None
        assert scores.teacher_logps is not None
        ref_logps, teacher_logps = (x.to(policy.logps.dtype) for x in (scores.ref_logps, scores.teacher_logps))
        beta = self.beta_ref + self.beta_teacher
        out = tvkd_loss(policy.logps, ref_logps, teacher_logps - ref_logps, beta=beta, alpha=self.beta_teacher)
        return ObjectiveOutput(out.losses, out.margins, out.chosen_rewards, out.rejected_rewards, out.shaping_margins)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta_ref + self.beta_teacher)
