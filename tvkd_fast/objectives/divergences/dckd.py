"""DCKD: dual-constrained distillation, likelihood and the teacher's whole distributions on both responses
(arXiv 2502.17927).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("dckd", source="arXiv 2502.17927")
@dataclass(kw_only=True)
class DCKD(Objective):
    """−w log π(y_w)/|y_w| + a(D_w + D_l), D = mean_t KL(q‖p), q the teacher's and p the policy's.

    Rewards that are shown are mean log-probabilities.
    """

    likelihood_weight: float = number(1.0, NOT_NEGATIVE)
    """w ≥ 0: weight of the chosen response's negative log-likelihood per token."""
    divergence_weight: float = number(0.1, NOT_NEGATIVE)
    """a ≥ 0: weight of each response's divergence per token."""

    linear = True
    divergence: ClassVar[Joint] = Joint("forward_kl")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.TEACHER_STATES})

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.divergence,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = policy.means.chunk(2)
        of_chosen, of_rejected = (policy.summed(self.divergence, batch) / policy.lengths).chunk(2)
        losses = self.divergence_weight * (of_chosen + of_rejected) - self.likelihood_weight * chosen
        return ObjectiveOutput.of(losses, chosen, rejected)
