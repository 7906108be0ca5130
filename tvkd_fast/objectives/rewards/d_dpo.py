"""d-DPO: distillation of a reward model's margins into the policy's (arXiv 2405.19316).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import distillation_errors
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("d_dpo", source="arXiv 2405.19316")
@dataclass(kw_only=True)
class DistilledDPO(Objective):
    """(Δr − βΔρ)², r a column of the data.

    Its optimum is π_ref · e^{r/β}, normalised.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term; the margin of log-ratios that is asked for is Δr/β."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE, Need.REWARDS})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert batch.rewards is not None
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        losses = distillation_errors(chosen - rejected, batch.rewards[:1]).squeeze(0)
        return ObjectiveOutput.of(losses, chosen, rejected)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta)
