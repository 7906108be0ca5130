"""Relational distillation: a response's states relate to each other as the teacher's do (arXiv 1904.05068).

Letters: P pairs, 2P responses, chosen first; N response tokens, D hidden of the policy, D' of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses.states import Relation, relational_distances
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.objectives.registry import objective
from tvkd_fast.objectives.states.state_distance import StateDistance
from tvkd_fast.scoring.layout import Scores


@objective("relational", source="arXiv 1904.05068")
@dataclass(kw_only=True)
class Relational(StateDistance):
    """−w log π(y_w)/|y_w| + a(D_w + D_l)/2, D = mean_ij (R_ij − R'_ij)², R the cosines between a response's states.

    R' are the teacher's. Rewards that are shown are mean log-probabilities.
    """

    relation: Relation = "cosine"
    """How two states relate: their cosine, `gram` their inner product (D is 1 − CKA, without centring), or RKD's
    `distance` over the mean one."""

    def distances(
        self, policy: PolicyWithHead, states: tuple[Tensor, ...], head: FusedLMHead, scores: Scores, batch: PairBatch
    ) -> Tensor:
        assert scores.teacher_hidden is not None
        return relational_distances(states[0], scores.teacher_hidden, batch.response_lengths, relation=self.relation)
