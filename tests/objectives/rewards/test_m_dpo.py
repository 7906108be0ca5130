"""M-DPO against its formula in float64, gradients included, by rewards and by a teacher's perplexities."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.rewards.m_dpo import MDPO


@pytest.mark.parametrize("score_from", ["rewards", "perplexity"])
def test_it_is_its_formula(
    score_from: Any, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def score(x: dict[str, Any]) -> torch.Tensor:
        if score_from == "rewards":
            return torch.tensor(x["rewards"][0], dtype=torch.float64)
        return (-((-x["teacher_logp"] / x["length"]).exp()) / 20.0).exp()

    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"])
        return -(1 + (2.0 * (score(chosen) - score(rejected))).exp()).log() * logsigmoid(margin)

    found = MDPO(beta=0.3, gap_scale=2.0, score_from=score_from, score_temperature=20.0)
    is_its_formula(found, formula)
    is_its_formula_from_logits(found, formula)


def test_perplexities_are_of_the_teachers_own_tokens(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5)])
    _, scores = numbers_of(batch)
    own = replace(scores, teacher_states=torch.tensor([5, 9]))
    wanted = torch.exp(-torch.exp(-scores.teacher_logps / torch.tensor([4, 8])) / 10.0)
    torch.testing.assert_close(MDPO(score_from="perplexity").scores(own, batch), wanted)
