"""TVKD: DPO plus a potential-based shaping reward from a teacher's soft value (arXiv 2509.16965; docs/method.md).

Letters: P pairs, 2P responses, chosen first; M teacher states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import shaping_returns, tvkd_loss
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ops import soft_values
from tvkd_fast.ranges import FINITE, POSITIVE, SHARE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("tvkd", source="arXiv 2509.16965")
@dataclass(kw_only=True)
class TVKD(Objective):
    """−(1−λ) log σ(m) − λ log σ(−m), m = βΔρ − αΔΨ, Ψ = Σ_t γV(s_{t+1}) − V(s_t)."""

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    alpha: float = number(1.0, FINITE)
    """α: strength and sign of the teacher's shaping; 0 is DPO."""
    gamma: float = number(1.0, SHARE)
    """γ in [0, 1]: discount of the shaping."""
    kappa: float = number(1.0, POSITIVE)
    """κ > 0: inverse temperature of the teacher's soft value."""
    value_scale: float | None = number(None, FINITE)
    """b: scale of the soft value; β where not given, as in the paper."""
    value_from: Literal["logits", "logprobs", "implicit_reward"] = "logits"
    """Soft value from the teacher's logits (the paper), its log-probabilities (needs κ ≠ 1), or its DPO reward so far
    (needs teacher_reference)."""
    terminal: Literal["last_content", "eos", "zero"] = "last_content"
    """Which state ends the shaping sum."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_from == "logprobs" and self.kappa == 1.0:
            raise ValueError(
                "value_from='logprobs' is 0 everywhere at kappa=1: set --loss.kappa to another value, such as 0.7"
            )

    @property
    def needs(self) -> frozenset[Need]:
        teacher = Need.TEACHER_REWARDS if self.value_from == "implicit_reward" else Need.TEACHER_SUMS
        return frozenset({Need.REJECTED, Need.REFERENCE, teacher})

    @property
    def teacher_kappa(self) -> float:
        return self.kappa

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        assert scores.ref_logps is not None
        cu_states, ended = scores.boundaries(batch)
        psi = shaping_returns(self.values(scores), cu_states, gamma=self.gamma, terminal=self.terminal, ended=ended)
        out = tvkd_loss(
            policy.logps,
            scores.ref_logps.to(policy.logps.dtype),
            psi,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
        )
        return ObjectiveOutput(out.losses, out.margins, out.chosen_rewards, out.rejected_rewards, out.shaping_margins)

    def values(self, scores: Scores) -> Tensor:
        """(M,) soft values V of every response state."""
        if self.value_from == "implicit_reward":
            assert scores.reward is not None
            return scores.reward * self.scale
        assert scores.lse is not None
        assert scores.lse_kappa is not None
        return soft_values(
            scores.lse, scores.lse_kappa, kappa=self.kappa, value_scale=self.scale, value_from=self.value_from
        )

    @property
    def scale(self) -> float:
        """b."""
        return self.beta if self.value_scale is None else self.value_scale

    @property
    def fallback(self) -> Objective:
        return DPO(beta=self.beta, label_smoothing=self.label_smoothing)

    def describe(self) -> str:
        return (
            f"beta {self.beta}, label_smoothing {self.label_smoothing}, alpha {self.alpha}, gamma {self.gamma}, "
            f"terminal {self.terminal}, value {self.scale}·LSE from {self.value_from} at kappa {self.kappa}"
        )
