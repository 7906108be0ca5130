"""DPO: Direct Preference Optimization (arXiv 2305.18290).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import dpo_loss
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("dpo", source="arXiv 2305.18290")
@dataclass(kw_only=True)
class DPO(Objective):
    """−(1−λ) log σ(m) − λ log σ(−m), m = βΔρ.

    With λ > 0 it is conservative DPO (cDPO).
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert scores.ref_logps is not None
        ref_logps = scores.ref_logps.to(policy.logps.dtype)
        out = dpo_loss(policy.logps, ref_logps, beta=self.beta, label_smoothing=self.label_smoothing)
        return ObjectiveOutput(out.losses, out.margins, out.chosen_rewards, out.rejected_rewards)
