"""M-DPO: DPO whose pairs weigh by the gap of their scores (GFRIEND, arXiv 2506.08965).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import sigmoid_losses
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import FINITE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("m_dpo", source="arXiv 2506.08965")
@dataclass(kw_only=True)
class MDPO(Objective):
    """−w log σ(βΔρ), w = log(1 + e^{aΔs}), s a column of the data, or e^{−PPL/τ} of the teacher.

    A pair whose scores are equal weighs log 2.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    gap_scale: float = number(1.0, FINITE)
    """a: how much a gap of scores weighs; its authors call it α. 0 is DPO times log 2."""
    score_from: Literal["rewards", "perplexity"] = "rewards"
    """A response's score: a column of the data, or e^{−PPL/τ} with its perplexity under the teacher."""
    score_temperature: float = number(10.0, POSITIVE)
    """τ > 0 of a score made of a perplexity."""

    @property
    def needs(self) -> frozenset[Need]:
        source = Need.REWARDS if self.score_from == "rewards" else Need.TEACHER_LOGPS
        return frozenset({Need.REJECTED, Need.REFERENCE, source})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = (self.beta * policy.log_ratios(scores)).chunk(2)
        better, worse = self.scores(scores, batch).to(chosen.dtype).chunk(2)
        weights = softplus(self.gap_scale * (better - worse))
        return ObjectiveOutput.of(weights * sigmoid_losses(chosen - rejected), chosen, rejected)

    def scores(self, scores: Scores, batch: PairBatch) -> Tensor:
        """(2P,) s."""
        if self.score_from == "rewards":
            assert batch.rewards is not None
            return batch.rewards[0]
        assert scores.teacher_logps is not None
        perplexities = torch.exp(-scores.teacher_logps / scores.teacher_lengths(batch))
        return torch.exp(-perplexities / self.score_temperature)

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta)
