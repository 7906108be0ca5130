"""VARD in language: a value function in the reference's logits, approached by reverse KL (arXiv 2505.15791).

The maximum of Σ_a π(a|s)Q(s,a) − η KL(π‖π_ref) is π_ref · e^{Q/η}, normalised. With a DPO-trained teacher φ, Q = b·z_φ.

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.objectives.contract import Need
from tvkd_fast.objectives.divergences.joint_numbers import Factored, Joint
from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import FINITE, POSITIVE, number


@objective("vard", source="arXiv 2505.15791")
@dataclass(kw_only=True)
class VARD(TokenDivergence):
    """Σ_t KL(p‖q), q = softmax(z_ref + (b/η) z_φ) and p the policy's, divided by tokens and not by pairs."""

    value_scale: float = number(0.1, FINITE)
    """b: scale of the teacher's value Q = b·z_φ; of a DPO-trained teacher its own β."""
    eta: float = number(0.1, POSITIVE)
    """η > 0: strength of the pull towards the reference."""

    kind = "reverse_kl"

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {Need.REFERENCE_STATES}

    @property
    def divergence(self) -> Joint:
        of: Factored = ((1.0, "ref"), (self.value_scale / self.eta, "teacher"))
        return Joint(self.kind, of=of, temperature=self.temperature, responses=self.responses)
