"""CPO against its formula in float64, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.cpo import CPO


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 1.0), (0.1, 0.0), (0.1, 2.0)])
def test_it_is_its_formula(
    smoothing: float,
    weight: float,
    is_its_formula: Callable[..., None],
    is_its_formula_from_logits: Callable[..., None],
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.2 * (chosen["logp"] - rejected["logp"])
        contrast = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        return contrast - weight * chosen["logp"] / chosen["length"]

    found = CPO(beta=0.2, label_smoothing=smoothing, likelihood_weight=weight)
    is_its_formula(found, formula)
    is_its_formula_from_logits(found, formula)


def test_it_needs_no_reference() -> None:
    assert {need.name for need in CPO().needs} == {"REJECTED"}
