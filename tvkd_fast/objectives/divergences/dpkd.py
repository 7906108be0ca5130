"""DPKD: the teacher's most probable token over the policy's own, as a preference, token by token (arXiv 2406.19774).

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import TOP_GAP, Joint
from tvkd_fast.objectives.divergences.token_divergence import TokenSum
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("dpkd", source="arXiv 2406.19774")
@dataclass(kw_only=True)
class DPKD(TokenSum):
    """Σ_t −log σ(β[log p(v)/p(w) − log q(v)/q(w)]), v = argmax q, w = argmax p, divided by tokens and not by pairs.

    Where v and w are one token the loss is log 2 and has no gradient; it is never less.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: scale of the margin."""

    @property
    def gap(self) -> Joint:
        """The margin of a token over β."""
        return Joint(TOP_GAP, responses=self.responses)

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.gap,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        return self.of_tokens(-logsigmoid(self.beta * policy.joint[self.gap]), batch)
