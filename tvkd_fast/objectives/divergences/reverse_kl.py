"""Reverse KL: the policy keeps away from what the teacher would not say, token by token of given responses.

It is GKD (arXiv 2306.13649) at β' = 1; on-policy distillation is the same over samples of the policy's.

Letters: P pairs, N response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective


@objective("reverse_kl", source="arXiv 2306.13649")
@dataclass(kw_only=True)
class ReverseKL(TokenDivergence):
    """Σ_t KL(p‖q), q the teacher's softmax(z/τ) and p the policy's, divided by tokens and not by pairs.

    Not multiplied by τ².
    """

    kind = "reverse_kl"
