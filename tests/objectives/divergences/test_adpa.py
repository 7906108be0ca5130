"""ADPA against its formula in float64, signed and clipped, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tvkd_fast.objectives.divergences.adpa import ADPA

Response = dict[str, Any]


@pytest.mark.parametrize("clip", [None, (0.0, 1.0), (-0.2, 0.1)])
def test_it_is_its_formula(clip: tuple[float, float] | None, is_its_formula_from_logits: Callable[..., None]) -> None:
    def formula(chosen: Response, rejected: Response) -> Tensor:
        advantages = rejected["log_teacher"] - rejected["log_base"]
        if clip is not None:
            advantages = advantages.clamp(*clip)
        expected = (rejected["log_p"].exp() * advantages).sum() / rejected["length"]
        return -0.5 * chosen["logp"] / chosen["length"] - 1.6 * expected

    is_its_formula_from_logits(ADPA(likelihood_weight=0.5, clip=clip), formula)


def test_limits_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clip must be two rising limits, got \[1, 0\]: set --loss.clip"):
        ADPA(clip=(1, 0))
