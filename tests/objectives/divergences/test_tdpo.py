"""TDPO1, TDPO2 and p-DPO against their formulas in float64, gradients included; and DPO where they start."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tvkd_fast.data import MicroBatching, build_dataset
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives.divergences.p_dpo import PDPO
from tvkd_fast.objectives.divergences.tdpo1 import TDPO1
from tvkd_fast.objectives.divergences.tdpo2 import TDPO2
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.scoring import OnlineScorer
from tvkd_fast.training.step import train_step

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


def test_where_the_policy_is_the_reference_tdpo_and_p_dpo_step_as_dpo(
    files: Path, chatml: Any, tiny_model: Any, in_float64: Any
) -> None:
    """There D is 0 and has no gradient."""
    dataset = build_dataset(files / "train.jsonl", chatml, limit=4, max_length=40)
    (batch,) = MicroBatching().batches(dataset, range(4))
    start, stepped = in_float64(tiny_model(0)), []
    for found in (DPO(beta=0.3), TDPO1(beta=0.3), TDPO2(beta=0.3), PDPO(beta=0.3)):
        policy = deepcopy(start)
        frozen = PolicyWithHead(deepcopy(start).eval(), packing="shared")
        scorer = OnlineScorer(frozen, None, reference_states=bool(found.joint))
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        out = train_step(PolicyWithHead(policy, packing="shared"), scorer, [batch], optimizer, found, clip_norm=0.0)
        assert float(out.loss) == pytest.approx(math.log(2), rel=1e-12)
        stepped.append(list(policy.parameters()))
    for weights in stepped[1:]:
        torch.testing.assert_close(weights, stepped[0], rtol=1e-10, atol=1e-12)
