"""Robust DPO against its formula in float64, gradients included; and what makes it robust."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tvkd_fast.losses import robust_losses, sigmoid_losses
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.robust import Robust


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_it_is_its_formula(
    smoothing: float, is_its_formula: Callable[..., None], is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> torch.Tensor:
        margin = 0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"])
        right, wrong = -logsigmoid(margin), -logsigmoid(-margin)
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)

    is_its_formula(Robust(beta=0.3, label_smoothing=smoothing), formula)
    is_its_formula_from_logits(Robust(beta=0.3, label_smoothing=smoothing), formula)


@pytest.mark.parametrize("flipped", [0.1, 0.4])
def test_its_mean_over_flipped_labels_is_dpos_loss_under_the_true_ones(flipped: float) -> None:
    margins = torch.linspace(-8, 8, 33, dtype=torch.float64)
    seen = [robust_losses(sign * margins, label_smoothing=flipped) for sign in (1, -1)]
    torch.testing.assert_close((1 - flipped) * seen[0] + flipped * seen[1], sigmoid_losses(margins))


def test_without_flipped_labels_it_is_dpo(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)])
    policy, scores = numbers_of(batch)
    found, wanted = (make(beta=0.3).loss(policy, scores, batch) for make in (Robust, DPO))
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.margins, wanted.margins)
