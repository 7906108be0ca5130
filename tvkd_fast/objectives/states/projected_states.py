"""What objectives by a projection of the policy's states have in common.

Letters: N response tokens, D hidden of the policy, D' of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.parts.beside import Projection
from tvkd_fast.objectives.states.state_distance import StateDistance
from tvkd_fast.ranges import NOT_NEGATIVE, number
from tvkd_fast.scoring.layout import Scores

BESIDE = "projection"


@dataclass(kw_only=True)
class ProjectedStates(StateDistance):
    """A distance between the teacher's states and W times the policy's, W learned with the policy."""

    projection_lr_ratio: float = number(100.0, NOT_NEGATIVE)
    """W's learning rate over the policy's: W begins at random. At 0 it stays there."""

    trains_beside = True

    def attach(self, policy: PolicyWithHead, teacher: nn.Module | None, scores: Callable[[], Scores]) -> None:
        states = scores().teacher_hidden
        assert states is not None
        own = policy.head.weight
        policy.beside[BESIDE] = Projection(own.shape[1], states.shape[1], lr_ratio=self.projection_lr_ratio, like=own)

    def projection(self, policy: PolicyWithHead) -> Tensor:
        """[D', D] W."""
        if BESIDE not in policy.beside:
            raise ValueError(
                f"{self.name} measures by a projection that is trained with the policy and is no part of the saved "
                "model: read eval/loss in the run's metrics, or evaluate by another --objective"
            )
        module = policy.beside[BESIDE]
        assert isinstance(module, Projection)
        return module.weight
