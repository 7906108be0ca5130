"""What objectives over hidden states have in common: likelihood, and a distance of each response.

Letters: P pairs, 2P responses, chosen first; N response tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.objectives.contract import Factors, Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.ranges import NOT_NEGATIVE, number
from tvkd_fast.scoring.layout import Scores


@dataclass(kw_only=True)
class StateDistance(Objective):
    """−w log π(y_w)/|y_w| + a(D_w + D_l)/2 of a distance D per response. Rewards that are shown are mean
    log-probabilities."""

    likelihood_weight: float = number(1.0, NOT_NEGATIVE)
    """w ≥ 0: weight of the chosen response's negative log-likelihood per token."""
    distance_weight: float = number(1.0, NOT_NEGATIVE)
    """a ≥ 0: weight of the distance, the mean of both responses'."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.TEACHER_STATES})

    def layers_of(self, policy: PolicyWithHead) -> tuple[int, ...]:
        """Return the inner layers whose states `distances` is given, none by default."""
        return ()

    def distances(
        self, policy: PolicyWithHead, states: tuple[Tensor, ...], head: FusedLMHead, scores: Scores, batch: PairBatch
    ) -> Tensor:
        """(2P,) D of the policy's last states and those of `layers_of`, [N, D] each, differentiable."""
        raise NotImplementedError

    def numbers(
        self, policy: PolicyWithHead, scores: Scores, batch: PairBatch, factors: Factors | None = None
    ) -> PolicyNumbers:
        upstream = None if factors is None else self.upstream(scores, batch, None, factors)

        def walk(hidden: Tensor, head: FusedLMHead, *inner: Tensor) -> tuple[Tensor, Tensor]:
            logps = head(hidden, batch.labels, upstream=upstream)
            assert isinstance(logps, Tensor)
            return logps, self.distances(policy, (hidden, *inner), head, scores, batch)

        logps, distances = policy(batch, walk=walk, layers=self.layers_of(policy))
        return PolicyNumbers(segment_sums(logps, batch.cu_seqlens), batch.lengths, distances=distances)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = policy.means.chunk(2)
        losses = -self.likelihood_weight * chosen
        if policy.distances is not None:
            of_chosen, of_rejected = policy.distances.to(losses.dtype).chunk(2)
            losses = losses + self.distance_weight * (of_chosen + of_rejected) / 2
        return ObjectiveOutput.of(losses, chosen, rejected)
