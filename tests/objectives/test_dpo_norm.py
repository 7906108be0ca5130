"""Length-normalised DPO against its formula in float64, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.dpo_norm import DPONorm


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_its_formula(
    smoothing: float, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        means = [(x["logp"] - x["ref_logp"]) / x["length"] for x in (chosen, rejected)]
        margin = 5.0 * (means[0] - means[1])
        return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)

    is_its_formula(DPONorm(label_smoothing=smoothing), formula)
    is_its_formula_from_logits(DPONorm(label_smoothing=smoothing), formula)
