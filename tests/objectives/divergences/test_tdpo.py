"""TDPO1, TDPO2 and p-DPO against their formulas in float64, gradients included; and DPO where they start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.divergences.p_dpo import PDPO
from tvkd_fast.objectives.divergences.tdpo1 import TDPO1
from tvkd_fast.objectives.divergences.tdpo2 import TDPO2
from tvkd_fast.objectives.dpo import DPO

Response = dict[str, Any]


def ratio(x: Response) -> Tensor:
    return x["logp"] - x["ref_logp"]


def drift(x: Response) -> Tensor:
    return (x["log_ref"].exp() * (x["log_ref"] - x["log_p"])).sum()


def test_tdpo_is_its_formula(is_its_formula_from_logits: Callable[..., None]) -> None:
    def first(chosen: Response, rejected: Response) -> Tensor:
        return -logsigmoid(0.3 * (ratio(chosen) - ratio(rejected) - (drift(rejected) - drift(chosen))))

    def second(chosen: Response, rejected: Response) -> Tensor:
        apart = drift(rejected) - drift(chosen).detach()
        return -logsigmoid(0.3 * (ratio(chosen) - ratio(rejected) - 0.7 * apart))

    is_its_formula_from_logits(TDPO1(beta=0.3), first)
    is_its_formula_from_logits(TDPO2(beta=0.3, drift_weight=0.7), second)


def test_p_dpo_is_its_formula(is_its_formula_from_logits: Callable[..., None]) -> None:
    def formula(chosen: Response, rejected: Response) -> Tensor:
        return -logsigmoid(0.3 * (ratio(chosen) - ratio(rejected))) + 0.05 * (drift(chosen) + drift(rejected))

    is_its_formula_from_logits(PDPO(beta=0.3, kl_weight=0.05), formula)


def test_where_the_policy_is_the_reference_tdpo_starts_as_dpo(batch_of: Any, numbers_of: Any) -> None:
    """There D and its gradient are 0, and so margins, losses and derivatives are DPO's."""
    batch = batch_of([(3, 5), (2, 2)])
    policy, scores = numbers_of(batch)
    with torch.no_grad():
        policy.joint[TDPO1.drift].zero_()
    wanted = DPO(beta=0.3).loss(policy, scores, batch)
    for found in (TDPO1(beta=0.3), TDPO2(beta=0.3), PDPO(beta=0.3)):
        out = found.loss(policy, scores, batch)
        torch.testing.assert_close(out.losses, wanted.losses)
        torch.testing.assert_close(out.margins, wanted.margins)
        ours, theirs = (torch.autograd.grad(x.losses.sum(), policy.logps, retain_graph=True) for x in (out, wanted))
        torch.testing.assert_close(ours, theirs)
