"""Length-normalised DPO: DPO over log-ratios per token (Tülu 3, arXiv 2411.15124; TRL's `sigmoid_norm`).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("dpo_norm", source="arXiv 2411.15124")
@dataclass(kw_only=True)
class DPONorm(Objective):
    """−(1−λ) log σ(m) − λ log σ(−m), m = βΔr, r = ρ/|y|."""

    beta: float = number(5.0, POSITIVE)
    """β > 0: scale of the log-ratio per token; far larger than DPO's, whose log-ratio is a sum."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.log_ratios(scores) / policy.lengths).chunk(2)
        losses = sigmoid_losses(chosen - rejected, label_smoothing=self.label_smoothing)
        return ObjectiveOutput.of(losses, chosen, rejected)
