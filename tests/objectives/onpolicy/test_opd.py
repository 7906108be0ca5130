"""G-OPD against its formulas of whole float64 logits, gradients included, and its identities."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.objectives import Need, PolicyNumbers
from tvkd_fast.objectives.divergences.reverse_kl import ReverseKL
from tvkd_fast.objectives.onpolicy.opd import OPD
from tvkd_fast.objectives.onpolicy.opd_sampled import SampledOPD
from tvkd_fast.ops import Head
from tvkd_fast.scoring import Scores

Response = dict[str, Any]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


@pytest.mark.parametrize(("lambda_", "base"), [(1.25, "reference"), (0.5, "teacher_reference")])
def test_the_loss_is_the_kl_to_the_extrapolated_teacher(
    lambda_: float, base: Any, is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: Response, rejected: Response) -> Tensor:
        log_r = chosen["log_ref" if base == "reference" else "log_base"]
        target = ((1 - lambda_) * log_r + lambda_ * chosen["log_teacher"]).log_softmax(-1)
        return kl(chosen["log_p"], target)

    is_its_formula_from_logits(OPD(lambda_=lambda_, base=base), formula)


def test_it_is_the_scaled_reward_under_a_pull_to_the_base(is_its_formula_from_logits: Callable[..., None]) -> None:
    """KL(p‖r) − λ E_p[log q − log r] is the loss less log Z, which no policy changes: loss and gradient are equal."""

    def formula(chosen: Response, rejected: Response) -> Tensor:
        log_p, log_q, log_r = chosen["log_p"], chosen["log_teacher"], chosen["log_ref"]
        log_z = (-0.25 * log_r + 1.25 * log_q).logsumexp(-1).sum()
        return kl(log_p, log_r) - 1.25 * (log_p.exp() * (log_q - log_r)).sum() + log_z

    is_its_formula_from_logits(OPD(lambda_=1.25), formula)


def test_at_lambda_1_it_is_the_reverse_kl_whatever_the_base(is_its_formula_from_logits: Callable[..., None]) -> None:
    assert OPD(base="teacher_reference").target == ReverseKL().divergence.of
    assert OPD(base="teacher_reference").needs == ReverseKL().needs == {Need.TEACHER_STATES}
    is_its_formula_from_logits(OPD(), lambda chosen, rejected: kl(chosen["log_p"], chosen["log_teacher"]))


def test_only_the_base_that_is_asked_for_is_needed() -> None:
    assert OPD(lambda_=2.0).needs == {Need.TEACHER_STATES, Need.REFERENCE_STATES}
    assert OPD(lambda_=2.0, base="teacher_reference").needs == {Need.TEACHER_STATES, Need.BASE_STATES}
    assert SampledOPD().needs == {Need.TEACHER_STATES, Need.SAMPLER_LOGPS}


def test_sampled_losses_are_clipped_and_capped_policy_gradients(batch_of: Any) -> None:
    """Token by token, in Python's own arithmetic: inside the clip, at either side of it, and beyond the cap."""
    batch = batch_of([(4, 1), (3, 1)], chosen_only=True)
    draw = torch.Generator().manual_seed(3)
    log_ratios = torch.tensor([0.0, 0.1, 0.7, -0.9, 2.5, -2.0, 1.9], dtype=torch.float64)
    logps = (-3 * torch.rand(7, generator=draw, dtype=torch.float64)).requires_grad_()
    object.__setattr__(batch, "sampler_logps", logps.detach() - log_ratios)
    heads = [Head(torch.randn(9, 4, generator=draw, dtype=torch.float64)) for _ in range(2)]
    states = [torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2)]
    scores = Scores(teacher_hidden=states[0], teacher_head=heads[0], ref_hidden=states[1], ref_head=heads[1])
    found = SampledOPD(lambda_=1.5, clip_ratio=0.25, importance_cap=4.0)
    out = found.loss(PolicyNumbers(torch.zeros(2), batch.lengths, token_logps=logps), scores, batch)
    (grad,) = torch.autograd.grad(out.losses.sum(), logps)
    log_q, log_r = (
        (x @ head.weight.T).log_softmax(-1)[range(7), batch.labels].tolist()
        for x, head in zip(states, heads, strict=True)
    )
    losses, slopes = [], []
    for t, log_p in enumerate(logps.tolist()):
        advantage = -(log_p - log_r[t] - 1.5 * (log_q[t] - log_r[t]))
        ratio = min(math.exp(log_ratios[t]), 4.0)
        clipped = min(max(ratio, 0.75), 1.25)
        inside = ratio * advantage <= clipped * advantage
        losses.append(-min(ratio * advantage, clipped * advantage))
        slopes.append(-ratio * advantage if inside else 0.0)
    assert out.losses.tolist() == pytest.approx([sum(losses[:4]), sum(losses[4:])], rel=1e-12)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-15)
    assert 0.0 in slopes
