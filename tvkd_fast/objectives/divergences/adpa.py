"""ADPA: the expected advantage of a DPO-trained teacher over its reference, beside likelihood (arXiv 2502.17927).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import SCORE, Joint
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("adpa", source="arXiv 2502.17927")
@dataclass(kw_only=True)
class ADPA(Objective):
    """−w log π(y_w)/|y_w| − a mean_t E_p[A] on y_l, A = log q − log q₀, q the teacher's and q₀ its own reference's.

    The rejected responses are samples of the policy before training. Rewards that are shown are mean log-probabilities.
    """

    likelihood_weight: float = number(1.0, NOT_NEGATIVE)
    """w ≥ 0: weight of the chosen response's negative log-likelihood per token."""
    advantage_weight: float = number(1.6, NOT_NEGATIVE)
    """a ≥ 0: weight of the expected advantage per token; its authors call it γ."""
    clip: tuple[float, float] | None = None
    """Limits of every token's advantage A; (0, 1) is what the released code does, which drops the negative ones."""

    linear = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None:
            given = tuple(self.clip)
            if len(given) != 2 or not given[0] < given[1]:
                raise ValueError(f"clip must be two rising limits, got {list(given)}: set --loss.clip [0,1], or null")
            self.clip = (float(given[0]), float(given[1]))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.TEACHER_STATES, Need.BASE_STATES})

    @property
    def advantage(self) -> Joint:
        """E_p[A] of the rejected responses' tokens."""
        return Joint(SCORE, of=((1.0, "teacher"), (-1.0, "base")), responses="rejected", clip=self.clip)

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.advantage,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = policy.means.chunk(2)
        _, advantages = (policy.summed(self.advantage, batch) / policy.lengths).chunk(2)
        losses = -self.likelihood_weight * chosen - self.advantage_weight * advantages
        return ObjectiveOutput.of(losses, chosen, rejected)
