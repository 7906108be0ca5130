"""Forward KL to a part of the teacher's distribution: its most probable tokens, or draws from it.

Letters: P pairs, N response tokens, V vocabulary, k tokens that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvkd_fast.objectives.contract import KEPT_NEEDS, Need
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective


@objective("sparse_kl", source="arXiv 2502.17927")
@dataclass(kw_only=True)
class SparseKL(TokenDivergence):
    """Σ_t KL(q̂‖p), q̂ the teacher's top k and its other mass spread evenly, divided by tokens and not by pairs.

    With `kept` "sampled" q̂ is of k draws from the teacher: the gradient is then that of forward KL on average, and the
    loss larger than it. k is that of the folder of scores; a teacher that runs beside the policy is asked for 50.
    """

    # No gradient of it is made in the forward, and the log-probabilities beside it, which it does not read, are spared
    # theirs.
    linear = False

    kept: Literal["topk", "sampled"] = "topk"
    """What is known of the teacher: its k most probable tokens, or draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1.0:
            raise ValueError(
                f"the teacher's kept probabilities are at temperature 1, not {self.temperature:g}: set "
                "--loss.temperature 1, or choose --objective forward_kl"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs - {Need.TEACHER_STATES} | {KEPT_NEEDS[self.kept]}

    @property
    def divergence(self) -> Joint:
        return Joint(self.kept, responses=self.responses)
