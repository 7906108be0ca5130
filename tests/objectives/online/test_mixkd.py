"""MixKD: the divergence on mixed embeddings against the same done row by row, and what a mixture depends on."""

import random
from collections.abc import Callable
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.data import MicroBatching, TokenizedPair, packed_length
from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.online.mixkd import MixKD, drawn_share


def test_at_a_share_of_1_it_is_the_divergence(steps_of: Callable[..., SimpleNamespace]) -> None:
    found, plain = (
        steps_of(MixKD(own_share=1.0, responses="both"), steps=3),
        steps_of(ForwardKL(responses="both"), steps=3),
    )
    torch.testing.assert_close(found.losses, plain.losses, rtol=1e-12, atol=1e-14)
    mixed = steps_of(MixKD(own_share=0.6, responses="both"))
    assert abs(mixed.losses[0] - plain.losses[0]) > 1e-3


@pytest.mark.parametrize(("packing", "count"), [("shared", 1), ("shared", 4), ("unshared", 4), ("padded", 1)])
def test_loss_and_gradients_are_those_of_mixed_rows(
    packing: Any,
    count: int,
    pairs: list[TokenizedPair],
    steps_of: Callable[..., SimpleNamespace],
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> None:
    tokens = 2048 if count == 1 else max(packed_length(pair, shared=packing == "shared") for pair in pairs)
    found = steps_of(MixKD(responses="both"), tokens=tokens, packing=packing, lr=1e-12)
    assert found.count == count
    total, number = torch.zeros((), dtype=torch.float64), 0
    for i, pair in enumerate(pairs):
        share = drawn_share(0.4, 0, 0, i)
        responses = (pair.chosen_ids, pair.rejected_ids)
        common = min(map(len, responses))
        for own, other in (responses, responses[::-1]):
            ids, others = (torch.tensor([pair.prompt_ids + response]) for response in (own, other))
            start, end = len(pair.prompt_ids), len(pair.prompt_ids) + common
            logits = []
            for model in (found.teacher.model, found.policy.model):
                embed = model.get_input_embeddings()
                mixed = share * embed(ids)[:, start:end] + (1 - share) * embed(others)[:, start:end]
                inputs = torch.cat([embed(ids)[:, :start], mixed, embed(ids)[:, end:]], 1)
                logits.append(model(inputs_embeds=inputs, use_cache=False).logits[0, start - 1 : -1])
            total = total + divergence(logits[0].detach(), logits[1])
            number += len(own)
    wanted = total / number
    # Shares are rounded to float32, whatever the models are in.
    torch.testing.assert_close(found.losses[0], wanted.detach(), rtol=1e-5, atol=1e-8)
    named = dict(found.policy.named_parameters())
    for name, grad in zip(named, torch.autograd.grad(wanted, list(named.values())), strict=True):
        torch.testing.assert_close(found.gradients[name], grad, rtol=1e-4, atol=1e-6)


def test_a_mixture_depends_on_seed_step_and_pair_alone(pairs: list[TokenizedPair]) -> None:
    whole = next(MicroBatching("padded", pairs=4).batches(pairs, range(4)))
    alone = [next(MicroBatching("padded").batches(pairs, [i])) for i in range(4)]
    shares = MixKD().changed(whole, 5, 7).shares
    assert shares is not None
    drawn = {round(drawn_share(0.4, 5, 7, i), 6) for i in range(4)}
    assert {round(x, 6) for x in shares.tolist()} - {1.0} == drawn
    of_one = [MixKD().changed(batch, 5, 7).shares for batch in alone]
    assert {round(x, 6) for one in of_one for x in one.tolist()} - {1.0} == drawn
    assert len({drawn_share(0.4, *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
    of_many = torch.tensor([drawn_share(0.4, 0, step, 0) for step in range(2000)])
    # Beta(a, a) has the mean ½ and the variance 1 / (8a + 4).
    assert abs(of_many.mean() - 0.5) < 0.03
    assert abs(of_many.var() - 1 / 7.2) < 0.01


def test_scores_on_disk_are_refused(make_config: Any, run: Any) -> None:
    with pytest.raises(ValueError, match=r"mixkd changes the input of every step, .*: leave --scores out, and set"):
        run(make_config(objective="mixkd", scores="scores"))


def test_shares_have_noise_of_their_own() -> None:
    """What orders an epoch's pairs is a hash of three numbers too."""
    digest = sha256(b"0:1:2").digest()
    assert drawn_share(1.0, 0, 1, 2) != random.Random(int.from_bytes(digest[:8], "big")).betavariate(1.0, 1.0)
    assert drawn_share(1.0, 0, 1, 2) == drawn_share(1.0, 0, 1, 2) != drawn_share(1.0, 1, 1, 2)
