"""Optimal-transport distillation: a response's states as a cloud, moved onto the teacher's (PKDOT, arXiv 2401.15489).

Letters: P pairs, 2P responses, chosen first; N response tokens, T of one response; D hidden of the policy, D' of the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tvkd_fast.data import PairBatch
from tvkd_fast.losses.states import transport_distances
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.objectives.registry import objective
from tvkd_fast.objectives.states.projected_states import ProjectedStates
from tvkd_fast.ranges import POSITIVE, at_least, number
from tvkd_fast.scoring.layout import Scores


@objective("transport", source="arXiv 2401.15489")
@dataclass(kw_only=True)
class Transport(ProjectedStates):
    """−w log π(y_w)/|y_w| + a(D_w + D_l)/2, D the Sinkhorn divergence between rows of cosines of policy and teacher.

    A token's row is its state's cosines to the response's, over √|y|. Rewards that are shown are mean
    log-probabilities.
    """

    points: Literal["cosine_rows", "projected"] = "cosine_rows"
    """What is moved: rows of cosines, or unit states, the policy's by a projection that learns with it."""
    epsilon: float = number(0.05, POSITIVE)
    """ε > 0: entropic regularization, over a response's mean squared distance between the points of both models."""
    iterations: int = number(100, at_least(1))
    """Most Sinkhorn iterations per response and step."""

    @property
    def trains_beside(self) -> bool:  # type: ignore[override]
        return self.points == "projected"

    def attach(self, policy: PolicyWithHead, teacher: nn.Module | None, scores: Callable[[], Scores]) -> None:
        if self.points == "projected":
            super().attach(policy, teacher, scores)

    def distances(
        self, policy: PolicyWithHead, states: tuple[Tensor, ...], head: FusedLMHead, scores: Scores, batch: PairBatch
    ) -> Tensor:
        assert scores.teacher_hidden is not None
        return transport_distances(
            states[0],
            scores.teacher_hidden,
            batch.response_lengths,
            projection=self.projection(policy) if self.points == "projected" else None,
            epsilon=self.epsilon,
            iterations=self.iterations,
        )
