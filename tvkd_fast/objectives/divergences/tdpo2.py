"""TDPO2: TDPO1 in which the rejected response alone pays for straying from the reference (arXiv 2404.11999).

Letters: P pairs, 2P responses, chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tvkd_fast.objectives.divergences.tdpo1 import TDPO1
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ranges import NOT_NEGATIVE, number


@objective("tdpo2", source="arXiv 2404.11999")
@dataclass(kw_only=True)
class TDPO2(TDPO1):
    """−log σ(β(Δρ − w(D_l − sg D_w))), D = Σ_t KL(π_ref‖π).

    Rewards that are shown are β(ρ + D).
    """

    drift_weight: float = number(0.5, NOT_NEGATIVE)
    """w ≥ 0: weight of the drift's margin; its authors call it α. 0 is DPO."""

    def margins(self, ratios: Tensor, drifts: Tensor) -> Tensor:
        chosen, rejected = ratios.chunk(2)
        of_chosen, of_rejected = drifts.chunk(2)
        return self.beta * (chosen - rejected - self.drift_weight * (of_rejected - of_chosen.detach()))
