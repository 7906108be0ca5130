"""Robust DPO: an unbiased estimate of DPO's loss where a known share of the preferences is flipped (arXiv 2403.00409).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import robust_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("robust", source="arXiv 2403.00409")
@dataclass(kw_only=True)
class Robust(Objective):
    """[−(1−λ) log σ(m) + λ log σ(−m)] / (1−2λ), m = βΔρ.

    Not bounded below where λ > 0.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong; 0 is DPO, its authors use 0.1."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        losses = robust_losses(chosen - rejected, label_smoothing=self.label_smoothing)
        return ObjectiveOutput.of(losses, chosen, rejected)
