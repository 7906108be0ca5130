"""IPO: Identity Preference Optimization (arXiv 2310.12036), over log-ratios per token or summed.

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("ipo", source="arXiv 2310.12036")
@dataclass(kw_only=True)
class IPO(Objective):
    """(Δr − 1/(2β))², r = ρ/|y|.

    With per_token false r = ρ, as the paper writes it; its authors told TRL that its results divide by |y|.
    """

    beta: float = number(0.1, POSITIVE)
    """β > 0: the smaller, the larger the margin that is asked for, 1/(2β)."""
    per_token: bool = True
    """Whether a log-ratio is divided by its response's tokens, as TRL does; the paper's formula sums."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED, Need.REFERENCE})

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        ratios = policy.log_ratios(scores)
        chosen, rejected = (ratios / policy.lengths if self.per_token else ratios).chunk(2)
        losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        return ObjectiveOutput.of(losses, self.beta * chosen, self.beta * rejected)
