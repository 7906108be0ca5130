"""d-DPO against its formula in float64, gradients included, and IPO's summed form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvkd_fast.objectives.ipo import IPO
from tvkd_fast.objectives.rewards.d_dpo import DistilledDPO


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_it_is_its_formula(
    beta: float, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        ratios = [x["logp"] - x["ref_logp"] for x in (chosen, rejected)]
        return (chosen["rewards"][0] - rejected["rewards"][0] - beta * (ratios[0] - ratios[1])) ** 2

    is_its_formula(DistilledDPO(beta=beta), formula)
    is_its_formula_from_logits(DistilledDPO(beta=beta), formula)


def test_at_a_margin_of_one_half_it_is_ipo_over_sums(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2), (7, 1)])
    policy, scores = numbers_of(batch)
    constant = batch_of([(3, 5), (2, 2), (7, 1)], rewards=((1.5, 1.0),))
    found = DistilledDPO(beta=0.2).loss(policy, scores, constant).losses
    wanted = 0.2**2 * IPO(beta=0.2, per_token=False).loss(policy, scores, batch).losses
    torch.testing.assert_close(found, wanted)
