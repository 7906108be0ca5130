"""Forward KL, reverse KL, JSD and VARD against their formulas of whole float64 logits, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.divergences.joint_numbers import Distributions
from tvkd_fast.objectives.divergences.jsd import JSD
from tvkd_fast.objectives.divergences.reverse_kl import ReverseKL
from tvkd_fast.objectives.divergences.vard import VARD
from tvkd_fast.ops import Head, linear_divergence

Response = dict[str, Any]


def at(response: Response, whose: str, temperature: float = 1.0) -> Tensor:
    return (response[whose] / temperature).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


@pytest.mark.parametrize("both", [False, True])
def test_the_kls_are_their_formulas(both: bool, is_its_formula_from_logits: Callable[..., None]) -> None:
    def forward(*responses: Response) -> Tensor:
        of_each = [kl(at(x, "log_teacher", 2.0), at(x, "log_p", 2.0)) for x in responses[: 1 + both]]
        return torch.stack(of_each).sum()

    def reverse(*responses: Response) -> Tensor:
        return torch.stack([kl(at(x, "log_p"), at(x, "log_teacher")) for x in responses[: 1 + both]]).sum()

    which: Any = "both" if both else "chosen"
    is_its_formula_from_logits(ForwardKL(responses=which, temperature=2.0), forward)
    is_its_formula_from_logits(ReverseKL(responses=which), reverse)


@pytest.mark.parametrize("mixing", [0.0, 0.1, 0.5, 1.0])
def test_jsd_is_its_formula_and_a_kl_at_both_ends(
    mixing: float, is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: Response, rejected: Response) -> Tensor:
        log_p, log_q = at(chosen, "log_p"), at(chosen, "log_teacher")
        if mixing in (0.0, 1.0):
            return kl(log_p, log_q) if mixing else kl(log_q, log_p)
        log_m = ((1 - mixing) * log_p.exp() + mixing * log_q.exp()).log()
        return mixing * kl(log_q, log_m) + (1 - mixing) * kl(log_p, log_m)

    is_its_formula_from_logits(JSD(mixing=mixing), formula)


def test_jsd_over_its_smaller_share_tends_to_the_kls() -> None:
    """To GKD's special cases, while the formula itself tends to 0."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, other, its = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((5, 4), (31, 4)) * 2)
    for mixing, kind in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        jsd = linear_divergence(hidden, weight, other, its, kind="jsd", beta=JSD(mixing=mixing).divergence.beta)
        wanted = linear_divergence(hidden, weight, other, its, kind=kind)
        torch.testing.assert_close(jsd / 1e-6, wanted, rtol=1e-3, atol=0.0)


def test_vard_is_the_reverse_kl_to_the_references_logits_and_the_teachers_value(
    is_its_formula_from_logits: Callable[..., None],
) -> None:
    def formula(chosen: Response, rejected: Response) -> Tensor:
        target = (chosen["log_ref"] + 0.3 / 0.6 * chosen["log_teacher"]).log_softmax(-1)
        return kl(at(chosen, "log_p"), target)

    is_its_formula_from_logits(VARD(value_scale=0.3, eta=0.6), formula)


def test_vards_gradient_is_that_of_expected_value_less_the_pull_to_the_reference(
    is_its_formula_from_logits: Callable[..., None],
) -> None:
    """max E_p[Q] − η KL(p‖ref): the loss is it over −η, but for what no policy changes."""

    def formula(chosen: Response, rejected: Response) -> Tensor:
        log_p, log_ref, value = at(chosen, "log_p"), chosen["log_ref"], 0.3 * chosen["log_teacher"]
        constant = (log_ref + value / 0.6).logsumexp(-1).sum()
        return (kl(log_p, log_ref) - (log_p.exp() * value).sum() / 0.6) + constant

    is_its_formula_from_logits(VARD(value_scale=0.3, eta=0.6), formula)


def test_several_models_logits_add_in_one_head() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, d, generator=draw, dtype=torch.float64) for d in (4, 6)]
    weights = [torch.randn(9 + i, x.shape[1], generator=draw, dtype=torch.float64) for i, x in enumerate(states)]
    bias = torch.randn(10, generator=draw, dtype=torch.float64)
    frozen = Distributions(
        {"ref": (states[0], Head(weights[0], logit_scale=0.5)), "teacher": (states[1], Head(weights[1], bias))}
    )
    hidden, head = frozen.one(((1.0, "ref"), (-0.7, "teacher")))
    wanted = 0.5 * states[0] @ weights[0].T - 0.7 * (states[1] @ weights[1].T + bias)[:, :9]
    assert head.bias is not None
    torch.testing.assert_close(hidden @ head.weight.T + head.bias, wanted)


def test_a_softcap_keeps_logits_from_adding() -> None:
    capped = (torch.zeros(2, 4), Head(torch.zeros(9, 4), softcap=30.0))
    frozen = Distributions({"ref": capped, "teacher": capped})
    with pytest.raises(ValueError, match="heads without a softcap"):
        frozen.one(((1.0, "ref"), (1.0, "teacher")))
    assert frozen.one(((1.0, "ref"),)) is capped
