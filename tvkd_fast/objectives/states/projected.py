"""Projected-state distillation: a linear map of the policy's states follows the teacher's (FitNets, arXiv 1412.6550).

Letters: P pairs, 2P responses, chosen first; N response tokens, D hidden of the policy, D' of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses.states import Measure, projected_distances
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.objectives.registry import objective
from tvkd_fast.objectives.states.projected_states import ProjectedStates
from tvkd_fast.scoring.layout import Scores


@objective("projected", source="arXiv 1412.6550")
@dataclass(kw_only=True)
class Projected(ProjectedStates):
    """−w log π(y_w)/|y_w| + a(D_w + D_l)/2, D = mean_t 1 − cos(W h_t, h'_t), h' the teacher's states.

    W learns with the policy. Rewards that are shown are mean log-probabilities.
    """

    measure: Measure = "cosine"
    """The distance: 1 − cos, or FitNets' `squared` one over the teacher's squared size."""

    def distances(
        self, policy: PolicyWithHead, states: tuple[Tensor, ...], head: FusedLMHead, scores: Scores, batch: PairBatch
    ) -> Tensor:
        assert scores.teacher_hidden is not None
        weight = self.projection(policy)
        return projected_distances(
            states[0], weight, scores.teacher_hidden, batch.response_lengths, measure=self.measure
        )
