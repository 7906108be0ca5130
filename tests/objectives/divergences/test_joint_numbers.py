"""Which walks there are, what they share, and heads of unequal padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvkd_fast.models.head import FusedLMHead, HeadTransforms
from tvkd_fast.objectives import Joint
from tvkd_fast.objectives.divergences import joint_numbers as module
from tvkd_fast.objectives.divergences.joint_numbers import Distributions, KnownUpstream, joint_numbers
from tvkd_fast.ops import Head

LENGTHS = [(3, 5), (2, 2)]


def drawn(vocabulary: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(12, width, generator=draw, dtype=torch.float64)
    return states, torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)


def head_of(weight: Tensor) -> FusedLMHead:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    return FusedLMHead.from_linear(linear, HeadTransforms())


def test_outputs_share_a_walk_where_nothing_but_their_names_differs() -> None:
    jsd, kl = Joint("jsd"), Joint("forward_kl")
    assert jsd.walk == kl.walk
    assert Joint("jsd", beta=0.1).walk != kl.walk
    assert Joint("forward_kl", responses="chosen").walk != kl.walk


@pytest.mark.parametrize(("own", "others"), [(9, 11), (11, 9), (9, 9)])
def test_rows_of_padding_are_cut_from_the_longer_head(own: int, others: int, batch_of: Any) -> None:
    batch = batch_of(LENGTHS)
    hidden, weight = drawn(own, 4, 0)
    teacher_hidden, teacher_weight = drawn(others, 6, 1)
    hidden.requires_grad_()
    head = head_of(weight)
    key = Joint("forward_kl")
    frozen = Distributions({"teacher": (teacher_hidden, Head(teacher_weight))})
    logps, found = joint_numbers(hidden, head, batch, [key], frozen, KnownUpstream())
    log_p, log_q = ((h @ w[:9].T).log_softmax(-1) for h, w in ((hidden, head.weight), (teacher_hidden, teacher_weight)))
    wanted = (log_q.exp() * (log_q - log_p)).sum(-1)
    # Log-probabilities are of the policy's whole head all the same.
    of_labels = (hidden @ head.weight.T).log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(found[key], wanted)
    torch.testing.assert_close(logps, of_labels)
    for x, y in ((found[key], wanted), (logps, of_labels)):
        ours, twin = (torch.autograd.grad(z.sum(), [hidden, head.weight], retain_graph=True) for z in (x, y))
        torch.testing.assert_close(ours, twin)


def test_one_walk_serves_all_keys_and_the_log_probabilities(batch_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def walk(*arguments: Any, outputs: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
        asked.append(outputs)
        return dict.fromkeys(outputs, torch.zeros(12))

    monkeypatch.setattr(module, "linear_joint", walk)
    hidden, weight = drawn(9, 4, 0)
    frozen = Distributions({"teacher": (hidden, Head(weight)), "ref": (hidden, Head(weight))})
    keys = [Joint("forward_kl"), Joint("jsd"), Joint("forward_kl", of=((1.0, "ref"),)), Joint("jsd", temperature=2.0)]
    joint_numbers(hidden, head_of(weight), batch_of(LENGTHS), [*keys, *keys], frozen, KnownUpstream())
    assert asked == [("forward_kl", "jsd", "logps"), ("forward_kl",), ("jsd",)]


@pytest.mark.parametrize(("which", "tokens"), [("chosen", slice(0, 5)), ("rejected", slice(5, 12))])
def test_responses_that_are_not_asked_for_are_0(which: Any, tokens: slice, batch_of: Any) -> None:
    hidden, weight = drawn(9, 4, 0)
    frozen = Distributions({"teacher": (hidden.flip(0), Head(weight))})
    all_of_them, some = Joint("forward_kl"), Joint("forward_kl", responses=which)
    _, found = joint_numbers(hidden, head_of(weight), batch_of(LENGTHS), [all_of_them, some], frozen, KnownUpstream())
    wanted = torch.zeros(12, dtype=torch.float64)
    wanted[tokens] = found[all_of_them][tokens].detach()
    torch.testing.assert_close(found[some].detach(), wanted)
