"""IPO against its formula in float64, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvkd_fast.objectives.ipo import IPO


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_it_is_its_formula(beta: float, is_its_formula: Callable[..., None]) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        means = [(x["logp"] - x["ref_logp"]) / x["length"] for x in (chosen, rejected)]
        return (means[0] - means[1] - 1 / (2 * beta)) ** 2

    is_its_formula(IPO(beta=beta), formula)
