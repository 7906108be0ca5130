"""Mixtures: sums of their parts, each divided as it is alone, over one forward; and what is no mixture."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tvkd_fast.objectives import Need
from tvkd_fast.objectives.divergences.dckd import DCKD
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.mixtures.mixture import Mixture, Part

Response = dict[str, Any]


def kl(x: Response, q: str = "log_teacher") -> Tensor:
    return (x[q].exp() * (x[q] - x["log_p"])).sum()


def dpo(chosen: Response, rejected: Response) -> Tensor:
    return -logsigmoid(0.3 * (chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"]))


MIXTURES: dict[str, tuple[list[Part], Callable[[Response, Response, dict[str, int]], Tensor]]] = {
    "a pair's loss and another's, no walk": (
        [{"dpo": {"beta": 0.3}, "weight": 2.0}, {"sft": None, "weight": 0.5}],
        lambda w, r, n: 2 * dpo(w, r) / n["pairs"] - 0.5 * w["logp"] / n["chosen_tokens"],
    ),
    "a pair's loss beside a walk over chosen responses": (
        [{"dpo": {"beta": 0.3}}, {"forward_kl": {}, "weight": 0.1}],
        lambda w, r, n: dpo(w, r) / n["pairs"] + 0.1 * kl(w) / n["chosen_tokens"],
    ),
    "a pair's loss in the walk": (
        [{"dpo": {"beta": 0.3}}, {"forward_kl": {"responses": "both"}, "weight": 0.1}],
        lambda w, r, n: dpo(w, r) / n["pairs"] + 0.1 * (kl(w) + kl(r)) / n["tokens"],
    ),
    "linear all through": (
        [{"sft": {}}, {"forward_kl": {"responses": "both"}}, {"dckd": {}, "weight": 3.0}],
        lambda w, r, n: (
            -w["logp"] / n["chosen_tokens"]
            + (kl(w) + kl(r)) / n["tokens"]
            + 3 * (-w["logp"] / w["length"] + 0.1 * (kl(w) / w["length"] + kl(r) / r["length"])) / n["pairs"]
        ),
    ),
    "two models": (
        [{"p_dpo": {"beta": 0.3, "kl_weight": 0.05}}, {"forward_kl": {"temperature": 1.0}, "weight": 0.1}],
        lambda w, r, n: (
            (dpo(w, r) + 0.05 * (kl(w, "log_ref") + kl(r, "log_ref"))) / n["pairs"] + 0.1 * kl(w) / n["chosen_tokens"]
        ),
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_weighted_sum_of_its_parts(name: str, is_its_formula_from_logits: Callable[..., None]) -> None:
    parts, formula = MIXTURES[name]
    is_its_formula_from_logits(Mixture(parts=parts), formula)


def test_needs_and_numbers_are_those_of_all_parts() -> None:
    found = Mixture(parts=[{"dpo": {}}, {"forward_kl": {}}, {"jsd": {}}])
    assert found.needs == DPO().needs | {Need.TEACHER_STATES}
    assert {key.output for key in found.joint} == {"forward_kl", "jsd"}
    assert len({key.walk for key in found.joint}) == 1


def test_one_forward_of_the_policy_and_one_walk(
    is_its_formula_from_logits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvkd_fast.models import PolicyWithHead
    from tvkd_fast.objectives.divergences import joint_numbers

    calls: list[str] = []
    hidden, walk = PolicyWithHead.hidden, joint_numbers.linear_joint

    def counted_hidden(self: Any, *args: Any) -> Tensor:
        calls.append("forward" if self.model.training else "frozen")
        return hidden(self, *args)

    def counted_walk(*args: Any, **options: Any) -> Any:
        calls.append(",".join(options["outputs"]))
        return walk(*args, **options)

    monkeypatch.setattr(PolicyWithHead, "hidden", counted_hidden)
    monkeypatch.setattr(joint_numbers, "linear_joint", counted_walk)
    parts, formula = MIXTURES["a pair's loss in the walk"]
    is_its_formula_from_logits(Mixture(parts=parts), formula)
    # One step of one micro-batch, and one of five.
    assert calls.count("forward") == calls.count("forward_kl,logps") == 1 + 5


def test_a_part_of_no_weight_is_neither_computed_nor_scored() -> None:
    found = Mixture(parts=[{"dckd": {}}, {"tvkd": {}, "weight": 0.0}])
    assert found.needs == DCKD().needs


def test_margins_are_those_of_the_first_part_that_has_some(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2)])
    policy, scores = numbers_of(batch)
    out = Mixture(parts=[{"sft": {}}, {"dpo": {"beta": 0.3}, "weight": 2.0}]).loss(policy, scores, batch)
    alone = DPO(beta=0.3).loss(policy, scores, batch)
    torch.testing.assert_close(out.margins, alone.margins)
    torch.testing.assert_close(out.losses, 2 * alone.losses - policy.logps[:2])


def test_without_a_teacher_the_preference_part_is_shown() -> None:
    found = Mixture(parts=[{"forward_kl": {}}, {"dpo": {"beta": 0.3}}])
    assert found.without({Need.TEACHER_STATES}) == DPO(beta=0.3)
    assert found.without(found.needs) is None


def test_settings_are_taken_as_yaml_writes_them() -> None:
    ((part, _),) = Mixture(parts=[{"adpa": {"clip": [0, 1], "advantage_weight": 1}}]).objectives
    assert part.settings() == {"likelihood_weight": 1.0, "advantage_weight": 1.0, "clip": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([], "the weights of a mixture without parts sum to 0"),
        ([{"dpo": {}, "weight": 0}, {"sft": {}, "weight": 0}], "the weights of dpo and sft sum to 0: give at least"),
        ([{"dpo": {}, "weight": -1.0}], "the weight of dpo must be a number of at least 0, got -1.0"),
        ([{"dpo": {}, "weight": "a"}], "the weight of dpo must be a number of at least 0, got 'a'"),
        ([{"forwardkl": {}}], "got 'forwardkl'; did you mean forward_kl?"),
        ([{"dpo": {"gamma": 0.9}}], "gamma is no setting of dpo, which has beta, label_smoothing"),
        ([{"sft": {"beta": 0.9}}], "beta is no setting of sft, which has none"),
        ([{"dpo": {"beta": -1}}], "beta must be a positive number"),
        ([{"forward_kl": {"responses": "all"}}], "responses of forward_kl must be one of chosen, both, got 'all'"),
        (
            [{"adpa": {"clip": [0, "a"]}}],
            "clip of adpa must be a list of 2, a number and a number or null, got [0, 'a']",
        ),
        ([{"adpa": {"clip": 1}}], "clip of adpa must be a list of 2, a number and a number or null, got 1"),
        ([{"dpo": {"beta": True}}], "beta of dpo must be a number, got True"),
        ([{"dpo": {"beta": [0.1]}}], "beta of dpo must be a number, got [0.1]"),
        ([{"dpo": {"beta": None}}], "beta of dpo must be a number, got None"),
        ([{"ipo": {"per_token": "yes"}}], "per_token of ipo must be true or false, got 'yes'"),
        ([{"dpo": 0.1}], "the settings of dpo are a mapping"),
        ([{"dpo": {}, "sft": {}}], "a part of a mixture is one objective and its weight"),
        (["dpo"], "a part of a mixture is one objective and its weight"),
        ([{"mixture": {}}], "a mixture is no part of a mixture"),
        ([{"tvkd": {"kappa": 0.7}}, {"tvkd": {}}], r"parts want [0.7, 1.0]: give them one"),
        ([{"tvkd": {"value_from": "implicit_reward"}}, {"tvkd": {}}], "give both the same value_from"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(parts: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        Mixture(parts=parts)
    assert "\n" not in str(error.value)
