"""SimPO against its formula in float64, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.simpo import SimPO


@pytest.mark.parametrize("beta", [2.0, 2.5])
@pytest.mark.parametrize("ratio", [0.0, 0.55])
def test_it_is_its_formula(beta: float, ratio: float, is_its_formula: Callable[..., None]) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        means = chosen["logp"] / chosen["length"] - rejected["logp"] / rejected["length"]
        return -logsigmoid(beta * (means - ratio))

    is_its_formula(SimPO(beta=beta, gamma_beta_ratio=ratio), formula)


def test_it_needs_no_reference() -> None:
    assert {need.name for need in SimPO().needs} == {"REJECTED"}
