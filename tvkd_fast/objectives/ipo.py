"""IPO: Identity Preference Optimization (arXiv 2310.12036), over log-ratios per token as TRL computes it.

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, check_numbers, number
from tvkd_fast.scoring.layout import Scores


@objective("ipo")
@dataclass(kw_only=True)
class IPO(Objective):
    """(r_w − r_l − 1/(2β))², r = ρ(y)/|y|: the mean log-ratio per token. The paper sums and does not divide by |y|."""

    beta: float = number(0.1, POSITIVE)
    """β > 0: the smaller, the larger the margin that is asked for, 1/(2β)."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert scores.ref_logps is not None
        ratios = (policy.logps - scores.ref_logps.to(policy.logps.dtype)) / policy.lengths
        chosen, rejected = ratios.chunk(2)
        losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        rewards = self.beta * ratios.detach()
        return ObjectiveOutput(losses, self.beta * (chosen - rejected).detach(), *rewards.chunk(2))
