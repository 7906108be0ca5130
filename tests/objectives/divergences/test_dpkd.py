"""DPKD against its formula of whole float64 logits, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives.divergences.dpkd import DPKD

Response = dict[str, Any]


@pytest.mark.parametrize("both", [False, True])
def test_it_is_its_formula(both: bool, is_its_formula_from_logits: Callable[..., None]) -> None:
    def of_one(x: Response) -> Tensor:
        log_p, log_q = x["log_p"], x["log_teacher"]
        top_p, top_q = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
        assert (top_p != top_q).any()
        gaps = [y.gather(1, top_q) - y.gather(1, top_p) for y in (log_p, log_q)]
        return -logsigmoid(0.7 * (gaps[0] - gaps[1])).sum()

    def formula(*responses: Response) -> Tensor:
        return torch.stack([of_one(x) for x in responses[: 1 + both]]).sum()

    is_its_formula_from_logits(DPKD(beta=0.7, responses="both" if both else "chosen"), formula)
