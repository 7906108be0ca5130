"""e-DPO against its formula in float64, gradients included; of one member it is d-DPO."""

from collections.abc import Callable
from typing import Any

import torch

from tvkd_fast.objectives.rewards.d_dpo import DistilledDPO
from tvkd_fast.objectives.rewards.e_dpo import EnsembleDPO


def test_it_is_its_formula(
    is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"])
        errors = [(c - r - margin) ** 2 for c, r in zip(chosen["rewards"], rejected["rewards"], strict=True)]
        return min(errors)

    is_its_formula(EnsembleDPO(beta=0.3), formula)
    is_its_formula_from_logits(EnsembleDPO(beta=0.3), formula)


def test_of_one_member_it_is_d_dpo(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2), (7, 1)], rewards=((1.0, 0.25),))
    policy, scores = numbers_of(batch)
    found, wanted = (make(beta=0.2).loss(policy, scores, batch).losses for make in (EnsembleDPO, DistilledDPO))
    assert torch.equal(found, wanted)
