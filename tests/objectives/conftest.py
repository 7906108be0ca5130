"""Numbers of responses that objectives are computed from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.data import PairBatch, TokenizedPair, collate_packed
from tvkd_fast.objectives import PolicyNumbers
from tvkd_fast.scoring import Scores


def make_batch(lengths: list[tuple[int, int]], *, chosen_only: bool = False) -> PairBatch:
    pairs = [TokenizedPair([1, 2], [3] * c, [4] * r, True, True, "row") for c, r in lengths]
    return collate_packed(pairs, range(len(pairs)), chosen_only=chosen_only)


def make_numbers(batch: PairBatch) -> tuple[PolicyNumbers, Scores]:
    """Log-probabilities as float64 leaves, and everything that an objective may need."""
    draw = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64)

    responses, states = len(batch.lengths), int(batch.cu_states[-1])
    logps = (-10 + normal(responses)).requires_grad_()
    lse = 5 + normal(states)
    return PolicyNumbers(logps, batch.lengths), Scores(-10 + normal(responses), lse, lse, normal(states))


@pytest.fixture
def batch_of() -> Callable[..., PairBatch]:
    return make_batch


@pytest.fixture
def numbers_of() -> Callable[[PairBatch], tuple[PolicyNumbers, Scores]]:
    return make_numbers


@pytest.fixture
def is_its_formula(batch_of: Any, numbers_of: Any) -> Callable[..., None]:
    """Checks losses and gradients of an objective against a formula of one pair, in float64.

    The formula is given dicts of the chosen and of the rejected response: logp, ref_logp and length.
    """

    def check(found: Any, formula: Callable[[dict[str, Any], dict[str, Any]], Tensor]) -> None:
        batch = batch_of([(3, 5), (2, 2), (7, 1)])
        policy, scores = numbers_of(batch)
        responses = [
            {"logp": policy.logps[i], "ref_logp": scores.ref_logps[i], "length": int(batch.lengths[i])}
            for i in range(6)
        ]
        wanted = torch.stack([formula(responses[i], responses[i + 3]) for i in range(3)])
        out = found.loss(policy, scores, batch)
        torch.testing.assert_close(out.losses, wanted, rtol=1e-12, atol=1e-12)
        ours, twin = (torch.autograd.grad(x.sum(), policy.logps, retain_graph=True)[0] for x in (out.losses, wanted))
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)

    return check
