"""WPO against its formula in float64, gradients included: none flows through the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.losses import on_policy_weights
from tvkd_fast.objectives.wpo import WPO


def test_it_is_its_formula(
    is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"])
        means = [(x["logp"].detach() - x["log_collisions"]) / x["length"] for x in (chosen, rejected)]
        weight = min(1.0, float((means[0] + means[1]).exp()))
        return -weight * logsigmoid(margin)

    is_its_formula(WPO(beta=0.3), formula)
    is_its_formula_from_logits(WPO(beta=0.3), formula)


def test_a_pair_weighs_1_at_most_and_less_the_less_likely_it_is() -> None:
    collisions, lengths = torch.full((4,), -6.0), torch.tensor([2, 3, 3, 2])
    weights = on_policy_weights(torch.tensor([-2.0, -9.0, -2.0, -9.0]), collisions, lengths)
    wanted = torch.tensor([4.0 / 2 + 4.0 / 3, -3.0 / 3 - 3.0 / 2]).exp().clamp(max=1.0)
    torch.testing.assert_close(weights, wanted)
    assert weights[0] == 1.0
