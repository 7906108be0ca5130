"""Forward KL: the policy covers what the teacher might say, token by token of given responses.

It is the full-vocabulary form of sequence-level distillation, and GKD (arXiv 2306.13649) at β' = 0 without samples of
the policy's.

Letters: P pairs, N response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective


@objective("forward_kl", source="arXiv 2306.13649")
@dataclass(kw_only=True)
class ForwardKL(TokenDivergence):
    """Σ_t KL(q‖p), q the teacher's softmax(z/τ) and p the policy's, divided by tokens and not by pairs.

    Not multiplied by τ².
    """

    kind = "forward_kl"
