"""What the sums over response tokens, such as divergences between policy and teacher, have in common.

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.objectives.contract import Divisor, Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@dataclass(kw_only=True)
class TokenSum(Objective):
    """A number of every response token, by the policy's distribution and the teacher's, summed over tokens."""

    responses: Literal["chosen", "both"] = "chosen"
    """Whose tokens: the chosen responses', or the rejected ones' as well."""

    @property
    def divided_by(self) -> Divisor:  # type: ignore[override]
        return "chosen_tokens" if self.responses == "chosen" else "tokens"

    @property
    def needs(self) -> frozenset[Need]:
        both = {Need.REJECTED} if self.responses == "both" else set()
        return frozenset({Need.TEACHER_STATES} | both)

    def of_tokens(self, numbers: Tensor, batch: PairBatch) -> ObjectiveOutput:
        """The output whose losses are sums of `numbers` (N,) over the tokens of the responses that count."""
        of_responses = segment_sums(numbers, batch.cu_seqlens)
        if self.responses == "chosen":
            return ObjectiveOutput(of_responses[: batch.num_pairs])
        chosen, rejected = of_responses.chunk(2)
        return ObjectiveOutput(chosen + rejected)


@dataclass(kw_only=True)
class TokenDivergence(TokenSum):
    """A divergence of every response token between the policy's distribution and the teacher's."""

    temperature: float = number(1.0, POSITIVE)
    """τ > 0, by which both models' logits are divided."""

    linear = True
    kind: ClassVar[str]
    """The output of `linear_joint`."""

    @property
    def share(self) -> float:
        """The teacher's share of m, of kinds that have one."""
        return 0.5

    @property
    def divergence(self) -> Joint:
        """The number of a token that is summed."""
        return Joint(self.kind, beta=self.share, temperature=self.temperature, responses=self.responses)

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.divergence,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        return self.of_tokens(policy.joint[self.divergence], batch)
