"""The arms: DPO, kinds of shaping, a control that knows lengths alone, and the simplest rival.

Letters: P pairs, N response tokens, M response states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch, PairDataset
from tvkd_fast.losses import shaping_returns
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import TEACHER, Objective, dpo, tvkd
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.scorer import Scorer

KAPPA = 0.7
"""κ of the teacher's values that are kept beside those of κ = 1."""
Source = Literal["teacher", "reward", "length", "self", "kl"]
Potential = Literal["rewards", "sums"]


@dataclass(frozen=True)
class Arm:
    """A loss, and where its potential comes from.

    `self` is near the released recipe's, whose value is the student's own at every step, with neither reference nor β:
    there Shannon's entropy over the top 50 and the rest, here Rényi's of order κ over the whole vocabulary.
    `kl` is no preference loss: token by token the teacher's distribution over the chosen responses.
    """

    loss: Objective
    source: Source = "teacher"

    @property
    def potential(self) -> Potential | None:
        """Return the potential that must be kept of the teacher."""
        if self.source == "reward":
            return "rewards"
        return "sums" if self.source == "length" or (self.source == "teacher" and self.loss.needs & TEACHER) else None


PAPER = tvkd.TVKD(alpha=1.0, gamma=1.0, terminal="last_content", value_from="logits")
PLAIN = dpo.DPO(beta=PAPER.beta)
DPO, TVKD = "DPO", "TVKD, the paper's"
ARMS: dict[str, Arm] = {
    DPO: Arm(PLAIN),
    TVKD: Arm(PAPER),
    "α = −1": Arm(replace(PAPER, alpha=-1.0)),
    "α = 0.3": Arm(replace(PAPER, alpha=0.3)),
    "α = 3": Arm(replace(PAPER, alpha=3.0)),
    "γ = 0.95": Arm(replace(PAPER, gamma=0.95)),
    "terminal eos": Arm(replace(PAPER, terminal="eos")),
    "terminal zero, γ = 0.95": Arm(replace(PAPER, terminal="zero", gamma=0.95)),
    "logprobs, κ = 0.7": Arm(replace(PAPER, value_from="logprobs", kappa=KAPPA)),
    "implicit reward": Arm(replace(PAPER, value_from="implicit_reward"), "reward"),
    "length alone": Arm(PAPER, "length"),
    "the student's Rényi entropy, κ = 0.7": Arm(
        tvkd.TVKD(beta=1.0, alpha=1.0, value_scale=1.0, value_from="logprobs", kappa=KAPPA), "self"
    ),
    "KL to the teacher": Arm(PAPER, "kl"),
}
FAMILIES = (
    ("γ = 0.95", "terminal eos", "terminal zero, γ = 0.95"),
    ("logprobs, κ = 0.7", "implicit reward"),
)
"""Families by the potential's discount, end and source: each sends one arm to the finals."""


def finalists(screened: list[dict[str, Any]]) -> list[str]:
    """Return each family's arm that was right most often, then by margin; the best first.

    By accuracy, since pushing both responses down widens a margin and makes none of them right.
    """

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        return row["accuracy"], row["margin"]

    best = [max((row for row in screened if row["arm"] in family), key=rank) for family in FAMILIES]
    return [row["arm"] for row in sorted(best, key=rank, reverse=True)]


class ArmScorer:
    """The reference's numbers from one cache and the potential from another, or made up."""

    def __init__(
        self, arm: Arm, reference: Scorer, teacher: Scorer | None, slope: float, policy: PolicyWithHead
    ) -> None:
        self.arm, self.reference, self.teacher, self.slope, self.policy = arm, reference, teacher, slope, policy

    def of(self, batch: PairBatch) -> Scores:
        if self.arm.source == "self":
            return self._own(batch)
        reference = self.reference.of(batch)
        if self.arm.source == "length":
            steps = torch.cat([torch.arange(int(n)) for n in batch.cu_states.diff()]) * self.slope
            return Scores(reference.ref_logps, lse=steps, lse_kappa=steps)
        if self.teacher is None or not self.arm.loss.needs & TEACHER:
            return Scores(reference.ref_logps)
        scores = replace(self.teacher.of(batch), ref_logps=reference.ref_logps)
        # The cache holds κ = 1 beside the other.
        return replace(scores, lse_kappa=scores.lse) if self.arm.loss.teacher_kappa == 1.0 else scores

    @torch.no_grad()
    def _own(self, batch: PairBatch) -> Scores:
        lse, lse_kappa = self.policy.head(self.policy.hidden(batch, batch.states), kappa=KAPPA)
        return Scores(torch.zeros(2 * batch.num_pairs), lse=lse, lse_kappa=lse_kappa)


def length_slope(dataset: PairDataset, teacher: Scorer, batches: list[PairBatch]) -> float:
    """LSE units a token that make an offset of lengths alone as wide as the paper's over these pairs, and as signed."""
    psi, lengths = [], []
    for batch in batches:
        scores = teacher.of(batch)
        values = PAPER.values(replace(scores, lse_kappa=scores.lse))
        chosen, rejected = shaping_returns(values, batch.cu_states, ended=batch.ended).chunk(2)
        psi.append(chosen - rejected)
        lengths.append(batch.length_differences.float())
    shaped, longer = torch.cat(psi), torch.cat(lengths)
    sign = torch.sign(torch.corrcoef(torch.stack([shaped, longer]))[0, 1])
    return float(sign * shaped.std() / longer.std() / PAPER.beta)


def kl_loss(policy: PolicyWithHead, teacher: PolicyWithHead, batch: PairBatch) -> Tensor:
    """KL(teacher ‖ policy), mean over the response tokens of a batch; both have one vocabulary."""
    with torch.no_grad():
        theirs = teacher.head(teacher.hidden(batch, batch.predicting)).log_softmax(-1)
    ours = policy.head(policy.hidden(batch, batch.predicting)).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()
