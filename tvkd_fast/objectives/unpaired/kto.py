"""KTO: Kahneman-Tversky Optimization, over single responses with a label (arXiv 2402.01306).

Letters: P rows, each a response with a label and, where the batch has both, a response to another prompt behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import labelled_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("kto", source="arXiv 2402.01306")
@dataclass(kw_only=True)
class KTO(Objective):
    """w₊ (1 − σ(β(ρ − z))) of a desirable response, w₋ (1 − σ(β(z − ρ))) of another, z = max(0, mean ρ').

    ρ' are log-ratios of responses to other prompts, averaged over the whole step, and no gradient flows through z.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    desirable_weight: float = number(1.0, NOT_NEGATIVE)
    """w₊ ≥ 0: weight of a desirable response's loss."""
    undesirable_weight: float = number(1.0, NOT_NEGATIVE)
    """w₋ ≥ 0: weight of an undesirable response's loss; w₊ and w₋ times their counts should lie within 4/3 of each
    other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "both weights are 0, and nothing would be learned: set --loss.desirable_weight or "
                "--loss.undesirable_weight"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REFERENCE, Need.LABELS})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert batch.desirable is not None
        assert batch.baseline is not None
        rewards = self.beta * policy.log_ratios(scores)[: batch.num_pairs]
        losses = labelled_losses(rewards - self.beta * batch.baseline.to(rewards.dtype), batch.desirable)
        weights = torch.where(batch.desirable, self.desirable_weight, self.undesirable_weight)
        return ObjectiveOutput(weights * losses)

    @property
    def fallback(self) -> Objective:
        """Of pairs, which have no labels, rewards are DPO's."""
        return DPO(beta=self.beta)
