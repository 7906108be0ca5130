"""OKD: the teacher's adapters learn with the student, by the same divergence (arXiv 2409.12512).

Letters: P pairs, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tvkd_fast.data import PairBatch
from tvkd_fast.models import Lora, PolicyWithHead, TeacherWithHead, add_lora
from tvkd_fast.models.parts.beside import LearningAdapters
from tvkd_fast.objectives.contract import Factors, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, at_least, number
from tvkd_fast.scoring.layout import Scores

BESIDE = "teacher"


@objective("okd", source="arXiv 2409.12512")
@dataclass(kw_only=True)
class OKD(TokenDivergence):
    """Σ_t KL(q_a‖p), a adapters of the teacher's that learn too, divided by tokens and not by pairs.

    The gradient of the divergence, whichever is set, reaches policy and adapters.
    """

    divergence_kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence: KL(q‖p), KL(p‖q), or JSD at β' = ½."""
    teacher_rank: int = number(8, at_least(1))
    """r of the adapters beside the linear layers of the teacher's backbone; they begin as no change of it."""
    teacher_alpha: float | None = number(None, POSITIVE)
    """Their scale; twice the rank where not given."""
    teacher_lr_ratio: float = number(1.0, NOT_NEGATIVE)
    """Their learning rate over the policy's; at 0 it is the divergence to a frozen teacher."""

    linear = False
    trains_beside = True

    @property
    def divergence(self) -> Joint:
        return Joint(self.divergence_kind, temperature=self.temperature, responses=self.responses)

    @property
    def teacher_lora(self) -> Lora:
        return Lora(self.teacher_rank, 2.0 * self.teacher_rank if self.teacher_alpha is None else self.teacher_alpha)

    def numbers(
        self, policy: PolicyWithHead, scores: Scores, batch: PairBatch, factors: Factors | None = None
    ) -> PolicyNumbers:
        if BESIDE not in policy.beside:
            raise ValueError(
                f"{self.name} measures by a teacher whose adapters are trained with the policy and are no part of the "
                "saved model: read eval/loss in the run's metrics, or evaluate by another --objective"
            )
        return super().numbers(policy, scores, batch, factors)

    def attach(self, policy: PolicyWithHead, teacher: nn.Module | None, scores: Callable[[], Scores]) -> None:
        assert isinstance(teacher, TeacherWithHead)
        add_lora(teacher, self.teacher_lora)
        policy.beside[BESIDE] = LearningAdapters(teacher, lr_ratio=self.teacher_lr_ratio)
