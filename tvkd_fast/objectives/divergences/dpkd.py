"""DPKD: the teacher's most probable token over the policy's own, as a preference, token by token (arXiv 2406.19774).

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import logsigmoid

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.objectives.contract import Divisor, Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import TOP_GAP, Joint
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("dpkd", source="arXiv 2406.19774")
@dataclass(kw_only=True)
class DPKD(Objective):
    """Σ_t −log σ(β[log p(v)/p(w) − log q(v)/q(w)]), v = argmax q, w = argmax p, divided by tokens and not by pairs.

    Where v and w are one token the loss is log 2 and has no gradient; it is never less.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: scale of the margin."""
    responses: Literal["chosen", "both"] = "chosen"
    """Whose tokens: the chosen responses', or the rejected ones' as well."""

    @property
    def divided_by(self) -> Divisor:  # type: ignore[override]
        return "chosen_tokens" if self.responses == "chosen" else "tokens"

    @property
    def needs(self) -> frozenset[Need]:
        both = {Need.REJECTED} if self.responses == "both" else set()
        return frozenset({Need.TEACHER_STATES} | both)

    @property
    def gap(self) -> Joint:
        """The margin of a token over β."""
        return Joint(TOP_GAP, responses=self.responses)

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.gap,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        of_responses = segment_sums(-logsigmoid(self.beta * policy.joint[self.gap]), batch.cu_seqlens)
        if self.responses == "chosen":
            return ObjectiveOutput(of_responses[: batch.num_pairs])
        chosen, rejected = of_responses.chunk(2)
        return ObjectiveOutput(chosen + rejected)
