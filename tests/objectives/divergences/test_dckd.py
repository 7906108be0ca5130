"""DCKD against its formula in float64, gradients included."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tvkd_fast.objectives.divergences.dckd import DCKD

Response = dict[str, Any]


def test_it_is_its_formula(is_its_formula_from_logits: Callable[..., None]) -> None:
    def distance(x: Response) -> Tensor:
        return (x["log_teacher"].exp() * (x["log_teacher"] - x["log_p"])).sum() / x["length"]

    def formula(chosen: Response, rejected: Response) -> Tensor:
        return -0.5 * chosen["logp"] / chosen["length"] + 0.2 * (distance(chosen) + distance(rejected))

    is_its_formula_from_logits(DCKD(likelihood_weight=0.5, divergence_weight=0.2), formula)
