"""e-DPO: d-DPO over an ensemble of rewards, by the member whose margin is nearest (arXiv 2405.19316).

Letters: P pairs, 2P responses, chosen first; K members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import distillation_errors
from tvkd_fast.objectives.contract import ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.objectives.rewards.d_dpo import DistilledDPO
from tvkd_fast.scoring.layout import Scores


@objective("e_dpo", source="arXiv 2405.19316")
@dataclass(kw_only=True)
class EnsembleDPO(DistilledDPO):
    """min_i (Δr_i − βΔρ)², r_i columns of the data.

    The minimum is taken pair by pair.
    """

    several_rewards: ClassVar[bool] = True

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert batch.rewards is not None
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        losses = distillation_errors(chosen - rejected, batch.rewards).amin(0)
        return ObjectiveOutput.of(losses, chosen, rejected)
