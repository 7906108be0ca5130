"""DPO's and TVKD's losses are those of `tvkd_fast.losses`, which have their twins there; SFT's is a sum."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.losses import shaping_returns, tvkd_loss
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.objectives.tvkd import TVKD


def test_dpo_is_its_formula(is_its_formula: Callable[..., None]) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"])
        return -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)

    is_its_formula(DPO(beta=0.3, label_smoothing=0.1), formula)


def test_tvkd_shapes_by_its_own_values(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)])
    policy, scores = numbers_of(batch)
    out = TVKD(gamma=0.9, alpha=0.5, value_from="implicit_reward", value_scale=0.2).loss(policy, scores, batch)
    psi = shaping_returns(0.2 * scores.reward, batch.cu_states, gamma=0.9, ended=batch.ended)
    wanted = tvkd_loss(policy.logps, scores.ref_logps, psi, alpha=0.5)
    assert torch.equal(out.losses, wanted.losses)
    assert out.shaping_margins is not None
    assert torch.equal(out.shaping_margins, wanted.shaping_margins)


def test_sft_sums_over_tokens(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)], chosen_only=True)
    policy, scores = numbers_of(batch)
    assert torch.equal(SFT().loss(policy, scores, batch).losses, -policy.logps)
    assert SFT.divided_by == "chosen_tokens"
