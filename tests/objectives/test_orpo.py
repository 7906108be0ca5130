"""ORPO against its formula in float64, gradients included, and its odds at both ends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.losses import log_odds
from tvkd_fast.objectives.orpo import ORPO


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_it_is_its_formula(
    weight: float, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        likely = [(x["logp"] / x["length"]).exp() for x in (chosen, rejected)]
        odds = [p / (1 - p) for p in likely]
        return -weight * likely[0].log() - 0.3 * logsigmoid((odds[0] / odds[1]).log())

    is_its_formula(ORPO(beta=0.3, likelihood_weight=weight), formula)
    is_its_formula_from_logits(ORPO(beta=0.3, likelihood_weight=weight), formula)


def test_it_needs_no_reference() -> None:
    assert {need.name for need in ORPO().needs} == {"REJECTED"}


def test_log_odds_keep_their_digits_at_both_ends() -> None:
    logps = torch.tensor([-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -3.0, -80.0], requires_grad=True)
    found = log_odds(logps)
    exact = logps.detach().double()
    wanted = exact - torch.log(-torch.expm1(exact))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-7)
    (grad,) = torch.autograd.grad(found.sum(), logps)
    torch.testing.assert_close(grad.double(), -1 / torch.expm1(exact), rtol=1e-5, atol=0.0)
