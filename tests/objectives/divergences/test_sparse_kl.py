"""Forward KL to a teacher's top k and samples against whole float64 distributions, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.objectives import Need, Objective
from tvkd_fast.objectives.divergences.joint_numbers import Distributions, KnownUpstream, joint_numbers
from tvkd_fast.objectives.divergences.sparse_kl import SparseKL

K = 50


def even_tail(log_q: Tensor) -> Tensor:
    """[T, V] log q with all but the K largest at their mean."""
    top, ids = log_q.topk(K)
    left = (1.0 - top.exp().sum(1, keepdim=True)) / (log_q.shape[1] - K)
    return left.log().expand_as(log_q).scatter(1, ids, top)


@pytest.mark.parametrize("responses", ["chosen", "both"])
def test_it_is_the_kl_to_the_top_k_and_an_even_tail(
    responses: Any, is_its_formula_from_logits: Callable[..., None]
) -> None:
    def formula(chosen: dict[str, Any], rejected: dict[str, Any]) -> Tensor:
        found = []
        for response in (chosen, rejected)[: 1 + (responses == "both")]:
            log_q = even_tail(response["log_teacher"])
            found.append((log_q.exp() * (log_q - response["log_p"])).sum())
        return torch.stack(found).sum()

    is_its_formula_from_logits(SparseKL(responses=responses), formula)


def test_samples_gradient_is_forward_kls_where_they_are_in_proportion(batch_of: Any, tiny_model: Any) -> None:
    from tvkd_fast.models import PolicyWithHead

    batch, policy = batch_of([(3, 5)]), PolicyWithHead(tiny_model(0))
    head, draw = policy.head, torch.Generator().manual_seed(0)
    hidden = torch.randn(8, head.in_features, generator=draw, requires_grad=True)
    ids = torch.stack([torch.randperm(head.out_features, generator=draw)[:6] for _ in range(8)])
    shares = torch.rand(8, 6, generator=draw).softmax(1)
    key = SparseKL(kept="sampled", responses="both").divergence
    _, found = joint_numbers(
        hidden, head, batch, (key,), Distributions({}, {"sampled": (ids, shares)}), KnownUpstream()
    )
    q = torch.zeros(8, head.out_features).scatter(1, ids, shares)
    p = (hidden.detach() @ head.weight.T).softmax(1)
    (grad,) = torch.autograd.grad(found[key].sum(), hidden)
    torch.testing.assert_close(grad, (p - q) @ head.weight.detach(), rtol=1e-4, atol=1e-6)


def test_a_token_that_the_policy_lacks_is_left_to_the_tail(batch_of: Any, tiny_model: Any) -> None:
    from tvkd_fast.models import PolicyWithHead

    batch, policy = batch_of([(1, 1)]), PolicyWithHead(tiny_model(0))
    head = policy.head
    hidden = torch.randn(2, head.in_features, generator=torch.Generator().manual_seed(0))
    key = SparseKL(responses="both").divergence
    probs = torch.tensor([[0.5, 0.3], [0.5, 0.3]])

    def found(*ids: int) -> Tensor:
        kept = {"topk": (torch.tensor([ids, ids]), probs)}
        return joint_numbers(hidden, head, batch, (key,), Distributions({}, kept), KnownUpstream())[1][key]

    log_p = (hidden @ head.weight.T).log_softmax(1)
    q = torch.full_like(log_p, 0.5 / (head.out_features - 1))
    q[:, 3] = 0.5
    torch.testing.assert_close(found(3, head.out_features), (q * (q.log() - log_p)).sum(1), rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_at_temperature_1() -> None:
    with pytest.raises(ValueError, match=r"kept probabilities are at temperature 1, not 2: set --loss.temperature 1"):
        SparseKL(temperature=2.0)


@pytest.mark.parametrize(("kept", "need"), [("topk", Need.TEACHER_TOP_K), ("sampled", Need.TEACHER_SAMPLES)])
def test_its_needs_are_what_is_kept(kept: Any, need: Need) -> None:
    found: Objective = SparseKL(kept=kept, responses="both")
    assert found.needs == {need, Need.REJECTED}
