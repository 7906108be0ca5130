"""Properties of every objective: names, needs, and a loss whose gradient is one number per response."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.objectives import (
    SCORED,
    TEACHER,
    Need,
    Objective,
    ObjectiveOutput,
    PolicyNumbers,
    known,
    objective,
    objective_named,
    objectives,
    settings_of,
    shared_settings,
)
from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.divergences.token_divergence import TokenDivergence
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.rewards.m_dpo import MDPO
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.ranges import range_of
from tvkd_fast.scoring import Scores

EVERY = [make() for make in objectives().values()]
EVERY += [TVKD(value_from="implicit_reward", gamma=0.9), MDPO(score_from="perplexity")]
EVERY += [ForwardKL(responses="both"), Mixture(parts=[{"dpo": {}, "weight": 2.0}, {"jsd": {}}, {"dckd": {}}])]
every = pytest.mark.parametrize("found", EVERY, ids=lambda found: f"{found.name} {found.describe()}")


def by_logps(loss: Tensor, policy: PolicyNumbers) -> Tensor:
    """The derivative, 0 where a loss reads no log-probabilities."""
    (grad,) = torch.autograd.grad(loss, policy.logps, allow_unused=True)
    return torch.zeros_like(policy.logps) if grad is None else grad


@every
def test_the_gradient_is_one_number_per_response(found: Objective, batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2), (7, 1)], chosen_only=Need.REJECTED not in found.needs)
    policy, scores = numbers_of(batch)
    out = found.loss(policy, scores, batch)
    assert out.losses.shape == (3,)
    grad = by_logps(out.losses.sum(), policy)
    assert grad.isfinite().all()
    # A pair's loss moves with its own responses alone.
    first = by_logps(found.loss(policy, scores, batch).losses[0], policy)
    own = torch.zeros(len(grad), dtype=torch.bool)
    own[0], own[3:4] = True, True
    torch.testing.assert_close(first, grad.where(own, 0.0))


@every
def test_the_upstream_is_known_before_all_responses_are(found: Objective, batch_of: Any, numbers_of: Any) -> None:
    chosen_only = Need.REJECTED not in found.needs
    batch = batch_of([(3, 5), (2, 2), (7, 1)], chosen_only=chosen_only)
    policy, scores = numbers_of(batch)
    whole = by_logps(found.loss(policy, scores, batch).losses.sum(), policy)
    upstream = found.upstream(scores, batch, policy.log_collisions)
    if not found.per_pair or not set(found.joint) <= set(found.linear_joint):
        assert upstream is None
        return
    assert upstream is not None
    assert upstream.paired == (not chosen_only)
    assert torch.equal(upstream.cu_seqlens, batch.cu_seqlens)
    for pairs in ([0, 1, 2], [0, 2], [1]):
        responses = torch.tensor(pairs if chosen_only else pairs + [pair + 3 for pair in pairs])
        got = upstream.derivative(policy.logps.detach()[responses], responses)
        torch.testing.assert_close(got, whole[responses])


def test_a_loss_across_pairs_has_no_upstream(batch_of: Any, numbers_of: Any) -> None:
    class Across(DPO):
        per_pair = False

    batch = batch_of([(3, 5), (2, 2)])
    assert Across().upstream(numbers_of(batch)[1], batch) is None


@every
def test_numbers_that_are_shown_carry_no_gradient(found: Objective, batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)], chosen_only=Need.REJECTED not in found.needs)
    out = found.loss(*numbers_of(batch), batch)
    shown = [getattr(out, field.name) for field in fields(ObjectiveOutput) if field.name != "losses"]
    assert not any(x.requires_grad for x in shown if x is not None)
    if Need.REJECTED in found.needs and type(found).loss is not TokenDivergence.loss:
        assert out.margins is not None
        assert out.chosen_rewards is not None
        assert out.rejected_rewards is not None
        torch.testing.assert_close(out.margins, out.chosen_rewards - out.rejected_rewards)
    else:
        assert shown == [None] * len(shown)


@every
def test_what_is_not_needed_may_be_missing(found: Objective, batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)], chosen_only=Need.REJECTED not in found.needs)
    policy, scores = numbers_of(batch)
    given = {
        Need.REFERENCE: ("ref_logps",),
        Need.TEACHER_SUMS: ("lse", "lse_kappa"),
        Need.TEACHER_REWARDS: ("reward",),
        Need.TEACHER_LOGPS: ("teacher_logps",),
        Need.TEACHER_STATES: ("teacher_hidden", "teacher_head"),
        Need.TEACHER_TOP_K: ("topk_ids", "topk_logps"),
        Need.TEACHER_SAMPLES: ("sampled_ids", "sampled_shares"),
        Need.REFERENCE_STATES: ("ref_hidden", "ref_head"),
        Need.BASE_STATES: ("base_hidden", "base_head"),
    }
    kept = {name: getattr(scores, name) for need in found.needs & SCORED for name in given[need]}
    least = Scores(**kept)
    assert found.needs & SCORED == known(least) & SCORED
    assert torch.equal(found.loss(policy, least, batch).losses, found.loss(policy, scores, batch).losses)


@every
def test_without_a_need_another_objective_shows_margins_or_none(found: Objective) -> None:
    for need in Need:
        other = found.without({need})
        assert other is None or need not in other.needs
        if need not in found.needs:
            assert other is found


@every
def test_every_number_has_a_range(found: Objective) -> None:
    for field in fields(found):
        if field.type in ("int", "float", "float | None", "int | None"):
            limits = range_of(field)
            assert limits is not None, f"{found.name}.{field.name} has no range: declare it with ranges.number"
            with pytest.raises(ValueError, match=f"--loss.{field.name}"):
                type(found)(**{field.name: float("nan")})


def test_rewards_without_a_teacher_are_dpos() -> None:
    shaped = TVKD(beta=0.3, label_smoothing=0.1)
    assert shaped.without(TEACHER) == DPO(beta=0.3, label_smoothing=0.1)
    assert shaped.without({*TEACHER, Need.REFERENCE}) is None


def test_settings_belong_to_their_objective() -> None:
    assert settings_of("dpo", Objective()) == DPO()
    assert settings_of("sft", SFT()) == SFT()
    with pytest.raises(ValueError, match=r"of the objective tvkd and not of dpo: set objective='tvkd', or give it DPO"):
        settings_of("dpo", TVKD())
    assert shared_settings("dpo", TVKD(beta=0.4, alpha=2.0)) == DPO(beta=0.4)


def test_a_name_that_no_objective_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"objective must be one of .*, got 'tkvd'; did you mean tvkd\?"):
        objective_named("tkvd")


def test_two_objectives_of_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"there are two objectives 'dpo': .*; rename one"):

        @objective("dpo")
        class Another(Objective):
            pass


def test_each_objective_is_a_file_of_its_own() -> None:
    folder = Path(objectives.__code__.co_filename).parent
    shared = {"__init__", "__main__", "contract", "registry", "catalogue", "joint_numbers", "token_divergence"} | {
        "state_distance",
        "projected_states",
        "setting_types",
        "fitting",
    }
    assert {file.stem for file in folder.rglob("*.py")} - shared == set(objectives())
