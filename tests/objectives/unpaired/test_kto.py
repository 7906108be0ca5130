"""KTO against its formula in float64, gradients included: over numbers, and over steps of whole logits."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tvkd_fast.data import MicroBatching, build_dataset, collate_packed, packed_length
from tvkd_fast.data.reading.labelled import unpaired
from tvkd_fast.evaluation.held_out import evaluate_labelled
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import PolicyNumbers
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.unpaired.kto import KTO
from tvkd_fast.scoring import OnlineScorer, Scores
from tvkd_fast.training.step import train_step


def test_losses_are_the_formula(batch_of: Any, numbers_of: Any) -> None:
    batch = batch_of([(3, 5), (2, 2), (7, 1)], chosen_only=True)
    policy, scores = numbers_of(batch)
    out = KTO(beta=0.3, desirable_weight=2.0, undesirable_weight=0.5).loss(policy, scores, batch)
    wanted = []
    for i, desirable in enumerate([True, False, True]):
        margin = 0.3 * (policy.logps[i] - scores.ref_logps[i] - 0.75)
        wanted.append(2.0 * (1 - margin.sigmoid()) if desirable else 0.5 * (1 - (-margin).sigmoid()))
    torch.testing.assert_close(out.losses, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    ours, twin = (
        torch.autograd.grad(x.sum(), policy.logps, retain_graph=True)[0] for x in (out.losses, torch.stack(wanted))
    )
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)


def of_response(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
    logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_a_step_is_the_formula_of_whole_logits_however_it_is_divided(
    shift: float, files: Path, chatml: Any, tiny_model: Any, in_float64: Any
) -> None:
    """With `shift` the policy has moved, by which the baseline of these rows is above 0; where it is not it is cut."""
    dataset = build_dataset(files / "train.jsonl", chatml, limit=3, max_length=40, read=unpaired)
    assert [pair.desirable for pair in dataset] == [True, False] * 3
    policy, reference = (in_float64(tiny_model(seed)) for seed in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(shift)
    ratios, others = (
        [
            of_response(policy, p.prompt_ids, ids(p)) - of_response(reference, p.prompt_ids, ids(p)).detach()
            for p in dataset
        ]
        for ids in (lambda p: p.chosen_ids, lambda p: p.rejected_ids)
    )
    baseline = torch.stack(others).mean().detach().clamp(min=0)
    signs = [1 if pair.desirable else -1 for pair in dataset]
    wanted = torch.stack(
        [1 - (sign * 0.3 * (ratio - baseline)).sigmoid() for sign, ratio in zip(signs, ratios, strict=True)]
    ).mean()
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    before = deepcopy(policy.state_dict())
    scorer = OnlineScorer(PolicyWithHead(reference.eval(), packing="shared"), None)
    places = list(range(len(dataset)))
    for tokens in (2048, max(packed_length(pair) for pair in dataset)):
        batching = MicroBatching(tokens=tokens)
        batches = list(batching.batches(dataset, places, chosen_only=True))
        mismatched = batching.share_rejected(dataset, places, rank=0, size=1)
        assert (len(batches) > 1) == (tokens < 2048)
        policy.load_state_dict(before)
        policy.zero_grad()
        out = train_step(
            PolicyWithHead(policy, packing="shared"),
            scorer,
            batches,
            torch.optim.SGD(policy.parameters(), lr=1.0),
            KTO(beta=0.3),
            clip_norm=0.0,
            mismatched=mismatched,
        )
        assert out.baseline is not None
        torch.testing.assert_close(out.baseline, baseline, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out.loss, wanted.detach(), rtol=1e-10, atol=1e-12)
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(before[name] - parameter, gradients[name], rtol=1e-7, atol=1e-10)
    if not shift:
        found = evaluate_labelled(
            PolicyWithHead(deepcopy(reference), packing="shared"), dataset, scorer=scorer, objective=KTO(beta=0.3)
        )
        assert found.loss == pytest.approx(0.5)
        assert found.margin == pytest.approx(0.0, abs=1e-9)


def test_one_side_of_pairs_is_scored_like_both(files: Path, chatml: Any, tiny_model: Any, in_float64: Any) -> None:
    dataset = build_dataset(files / "train.jsonl", chatml, limit=3, max_length=40, read=unpaired)
    scorer = OnlineScorer(PolicyWithHead(in_float64(tiny_model(1)).eval(), packing="shared"), None)
    places = [4, 1, 2]
    both = scorer.of(collate_packed([dataset[i] for i in places], places)).ref_logps
    (own,) = MicroBatching().batches(dataset, places, chosen_only=True)
    (other,) = MicroBatching().share_rejected(dataset, places, rank=0, size=1)
    assert both is not None
    for batch, wanted in ((own, both[:3]), (other, both[3:])):
        assert (sorted(batch.pairs.tolist()), batch.sides) == (sorted(places), (0,) if batch is own else (1,))
        order = [places.index(place) for place in batch.pairs.tolist()]
        torch.testing.assert_close(scorer.of(batch).ref_logps, wanted[order])


def test_rewards_of_the_right_sign_are_counted(batch_of: Any) -> None:
    batch = replace(batch_of([(1, 1)] * 4, chosen_only=True), baseline=torch.tensor(1.0))
    losses = (
        KTO(beta=1.0)
        .loss(PolicyNumbers(torch.tensor([3.0, 3.0, -1.0, -1.0]), batch.lengths), Scores(torch.zeros(4)), batch)
        .losses
    )
    wanted = torch.tensor([-2.0, 2.0, 2.0, -2.0]).sigmoid()
    torch.testing.assert_close(losses, wanted)


@pytest.mark.parametrize("other", ["dpo", "sft", "forward_kl"])
def test_a_part_that_reads_no_labels_does_not_stand_beside_it(other: str) -> None:
    with pytest.raises(ValueError, match=rf"kto reads single responses with labels, and {other} would take .*: leave"):
        Mixture(parts=[{other: {}}, {"kto": {}}])
    assert Mixture(parts=[{"kto": {}}, {"kto": {"beta": 0.3}}, {other: {}, "weight": 0}]).needs == KTO().needs


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="both weights are 0, and nothing would be learned: set --loss"):
        KTO(desirable_weight=0.0, undesirable_weight=0.0)
