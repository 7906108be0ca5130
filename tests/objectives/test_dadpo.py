"""daDPO against its formula in float64, gradients included, and TVKD's loss under another return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.losses import tvkd_loss
from tvkd_fast.objectives.dadpo import DaDPO
from tvkd_fast.objectives.dpo import DPO


@pytest.mark.parametrize("teachers", [0.0, 0.2])
def test_it_is_its_formula(
    teachers: float, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        rewards = [
            (0.3 + teachers) * x["logp"] - 0.3 * x["ref_logp"] - teachers * x["teacher_logp"]
            for x in (chosen, rejected)
        ]
        return -logsigmoid(rewards[0] - rewards[1])

    is_its_formula(DaDPO(beta_ref=0.3, beta_teacher=teachers), formula)
    is_its_formula_from_logits(DaDPO(beta_ref=0.3, beta_teacher=teachers), formula)


def test_it_is_tvkd_whose_return_is_what_the_teacher_gains_over_the_reference(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2), (7, 1)])
    policy, scores = numbers_of(batch)
    psi = scores.teacher_logps - scores.ref_logps
    wanted = tvkd_loss(policy.logps, scores.ref_logps, psi, beta=0.3 + 0.2, alpha=0.2)
    found = DaDPO(beta_ref=0.3, beta_teacher=0.2).loss(policy, scores, batch)
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.shaping_margins, wanted.shaping_margins)


def test_without_a_teacher_dpos_rewards_are_shown() -> None:
    found = DaDPO(beta_ref=0.3, beta_teacher=0.2)
    assert found.without(found.needs - DPO().needs) == DPO(beta=0.5)
