"""JSD: GKD's generalized Jensen-Shannon divergence on given responses (arXiv 2306.13649).

Letters: P pairs, N response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import SHARE, number


@objective("jsd", source="arXiv 2306.13649")
@dataclass(kw_only=True)
class JSD(TokenDivergence):
    """Σ_t β'KL(q‖m) + (1−β')KL(p‖m), m = (1−β')p + β'q, divided by tokens and not by pairs.

    By special case β' = 0 is the forward KL and β' = 1 the reverse one; the formula's own limit there is 0.
    """

    mixing: float = number(0.5, SHARE)
    """β' in [0, 1]: the teacher's share of m."""
    kind = "jsd"

    @property
    def share(self) -> float:
        return self.mixing
