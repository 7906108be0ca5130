"""On-policy distillation with a scaled reward, over the full vocabulary: G-OPD and ExOPD (arXiv 2602.12125).

The reward of a response y is log q(y) − log r(y), and λ scales it against KL(π‖r). Per state that is

    KL(p‖r) − λ E_p[log q − log r] = KL(p ‖ r^{1−λ}q^λ/Z) − log Z,     Z = Σ_v r(v)^{1−λ} q(v)^λ,

where Z is free of p. λ = 1 is on-policy distillation, KL(p‖q) whatever r; λ > 1 extrapolates beyond the teacher.

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Factored, Joint, Whose
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("opd", source="arXiv 2602.12125")
@dataclass(kw_only=True)
class OPD(Objective):
    """Σ_t KL(p ‖ r^{1−λ}q^λ/Z), q the teacher's distribution and r the base's, divided by tokens and not by pairs.

    The responses are the policy's own samples; with --rollout.share 0 they are the data's chosen ones.
    """

    lambda_: float = number(1.0, POSITIVE)
    """λ > 0: scale of the teacher's reward over the base; 1 is on-policy distillation, which needs no base. On the
    command line --loss.lambda means this too."""
    base: Literal["reference", "teacher_reference"] = "reference"
    """r where λ ≠ 1: the reference, which is the policy's start unless given, or the teacher's own reference."""

    divided_by = "chosen_tokens"
    linear = True
    on_policy = True

    @property
    def target(self) -> Factored:
        """The models whose logits, multiplied so, are those of r^{1−λ}q^λ/Z."""
        if self.lambda_ == 1.0:
            return ((1.0, "teacher"),)
        base: Whose = "ref" if self.base == "reference" else "base"
        return ((1.0 - self.lambda_, base), (self.lambda_, "teacher"))

    @property
    def needs(self) -> frozenset[Need]:
        of_base = Need.REFERENCE_STATES if self.base == "reference" else Need.BASE_STATES
        return frozenset({Need.TEACHER_STATES} | (set() if self.lambda_ == 1.0 else {of_base}))

    @property
    def divergence(self) -> Joint:
        """The number of a token that is summed."""
        return Joint("reverse_kl", of=self.target, responses="chosen")

    @property
    def joint(self) -> tuple[Joint, ...]:
        return (self.divergence,)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        return ObjectiveOutput(policy.summed(self.divergence, batch)[: batch.num_pairs])
