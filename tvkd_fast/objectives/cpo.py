"""CPO: Contrastive Preference Optimization, without a reference (arXiv 2401.08417).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("cpo", source="arXiv 2401.08417")
@dataclass(kw_only=True)
class CPO(Objective):
    """−(1−λ) log σ(m) − λ log σ(−m) − w log π(y_w)/|y_w|, m = βΔ log π."""

    beta: float = number(0.1, POSITIVE)
    """β > 0: scale of the margin."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong."""
    likelihood_weight: float = number(1.0, NOT_NEGATIVE)
    """w ≥ 0: weight of the chosen response's negative log-likelihood per token."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.logps).chunk(2)
        likelihood, _ = policy.means.chunk(2)
        losses = sigmoid_losses(chosen - rejected, label_smoothing=self.label_smoothing)
        return ObjectiveOutput.of(losses - self.likelihood_weight * likelihood, chosen, rejected)
