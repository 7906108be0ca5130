"""Sampling from a model: the law of its samples, their log-probabilities, and what a sample does not depend on."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, MambaConfig, RwkvConfig

from tvkd_fast.data import MicroBatching, TokenizedPair
from tvkd_fast.distributed import checkpoint_activations
from tvkd_fast.models import Lora, PolicyWithHead, add_lora
from tvkd_fast.rollout import ModelSampler, SamplePrompt, Sampling

STOPS = (4, 5)
BENT = {"temperature": 0.7, "top_p": 0.8, "top_k": 4}


def chi_square(counts, law, samples):
    """Pearson's statistic over the responses of at least five expected, the others as one; its degrees of freedom."""
    often = [(counts[ids], samples * p) for ids, p in law.items() if samples * p >= 5]
    rest = samples - sum(expected for _, expected in often)
    seen = samples - sum(count for count, _ in often)
    cells = often + ([(seen, rest)] if rest >= 5 else [])
    return sum((count - expected) ** 2 / expected for count, expected in cells), len(cells) - 1


@pytest.mark.parametrize("settings", [{}, BENT], ids=["own", "bent"])
def test_samples_follow_the_enumerated_law(six_words, tree, settings):
    sampling = Sampling(n=4000, max_new_tokens=3, **settings)
    law = tree(six_words, [1, 3, 0], 3, sampling.law)
    (samples,) = ModelSampler(six_words, STOPS, tokens_at_once=10**6).sample(
        [SamplePrompt([1, 3, 0], "row")], sampling, seed=11
    )
    counts = Counter(tuple(sample.ids) for sample in samples)
    assert set(counts) <= {ids for ids, p in law.items() if p > 0}
    statistic, degrees = chi_square(counts, law, len(samples))
    assert degrees >= 10
    # Wilson and Hilferty's normal approximation, at three standard deviations.
    spread = math.sqrt(2 / (9 * degrees))
    assert (statistic / degrees) ** (1 / 3) < 1 - 2 / (9 * degrees) + 3 * spread
    own = tree(six_words, [1, 3, 0], 3)
    for sample in samples[:50]:
        assert sample.ended == (sample.ids[-1] in STOPS)
        assert math.exp(sum(sample.law_logps or sample.logps)) == pytest.approx(law[tuple(sample.ids)], rel=1e-9)
        assert math.exp(sum(sample.logps)) == pytest.approx(own[tuple(sample.ids)], rel=1e-9)


def test_a_sample_depends_on_nothing_beside_it(tiny_model, prompts):
    model, sampling = tiny_model(seed=3).double().eval(), Sampling(n=3, max_new_tokens=6)
    together = ModelSampler(model, [2]).sample(prompts, sampling, seed=7)
    small = ModelSampler(model, [2], tokens_at_once=60)
    assert [[x.ids for x in of_one] for of_one in small.sample(prompts[::-1], sampling, seed=7)] == [
        [x.ids for x in of_one] for of_one in together[::-1]
    ]
    for prompt, of_one in zip(prompts, together, strict=True):
        ((alone,),) = small.sample([replace(prompt, first=2)], replace(sampling, n=1), seed=7)
        assert alone.ids == of_one[2].ids
        assert alone.logps == pytest.approx(of_one[2].logps, abs=1e-5)
    assert len({tuple(sample.ids) for of_one in together for sample in of_one}) == 15


@pytest.mark.parametrize("change", [{"seed": 8}, {"seed": 7, "step": 1}])
def test_another_seed_or_step_samples_others(sampler, prompts, change):
    sampling = Sampling(max_new_tokens=8)
    first = sampler.sample(prompts, sampling, seed=7)
    assert sampler.sample(prompts, sampling, seed=7) == first
    other = sampler.sample(prompts, sampling, **change)
    assert all(a.ids != b.ids for (a,), (b,) in zip(first, other, strict=True))


def test_torchs_generator_is_left_alone(sampler, prompts):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampler.sample(prompts, Sampling(max_new_tokens=4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_log_probabilities_are_the_trainers(tiny_model, prompts, packing):
    policy = PolicyWithHead(tiny_model(seed=3), packing=packing)
    # Restored when the samples are there.
    policy.train()
    found = ModelSampler(policy.model, [2]).sample(prompts, Sampling(n=2, max_new_tokens=20), seed=1)
    assert policy.model.training
    pairs = [
        TokenizedPair(prompt.ids, a.ids, b.ids, a.ended, b.ended, prompt.row)
        for prompt, (a, b) in zip(prompts, found, strict=True)
    ]
    (batch,) = MicroBatching(packing, 10**6, 100).batches(pairs, range(len(pairs)))
    with torch.no_grad():
        logps = policy(batch)
    for response, own in enumerate(logps.split(batch.lengths.tolist())):
        pair = int(batch.pairs[response % len(pairs)])
        sampled = found[pair][response // len(pairs)]
        assert own.tolist() == pytest.approx(sampled.logps, abs=1e-4)


def test_greedy_is_transformers_own(sampler, prompts):
    found = sampler.sample(prompts, Sampling(max_new_tokens=9, temperature=0), seed=0)
    for prompt, (sample,) in zip(prompts, found, strict=True):
        greedy = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=0)
        ids = torch.tensor([prompt.ids])
        own = sampler.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        assert sample.ids == own[0, len(prompt.ids) :].tolist()
        assert sample.law_logps is None


def test_padding_is_told_by_its_place(tiny_model, prompts):
    # A prompt of nothing but the id that pads.
    zeros = SamplePrompt([0, 0, 0, 0], "zeros")
    sampler = ModelSampler(tiny_model(seed=3).double().eval(), [2])
    together = sampler.sample([*prompts, zeros], Sampling(max_new_tokens=8), seed=0)
    assert sampler.sample([zeros], Sampling(max_new_tokens=8), seed=0)[0][0].ids == together[-1][0].ids


def test_a_response_stops_at_the_first_of_several_stops(six_words):
    (samples,) = ModelSampler(six_words, STOPS).sample(
        [SamplePrompt([1], "r")], Sampling(n=200, max_new_tokens=5), seed=0
    )
    for sample in samples:
        assert not any(token in STOPS for token in sample.ids[:-1])
        assert sample.ended or len(sample.ids) == 5
        assert len(sample.logps) == len(sample.ids)
    assert {sample.ids[-1] for sample in samples if sample.ended} == set(STOPS)
    assert any(sample.empty for sample in samples)


def test_a_prompt_is_read_once_for_all_its_responses(sampler, prompts, monkeypatch):
    shapes = []
    call = ModelSampler._call
    monkeypatch.setattr(
        ModelSampler, "_call", lambda self, ids, *given: shapes.append(tuple(ids.shape)) or call(self, ids, *given)
    )
    sampler.sample(prompts, Sampling(n=4, max_new_tokens=3), seed=0)
    assert shapes[0] == (5, 11)
    assert {shape[1] for shape in shapes[1:]} == {1}
    assert len(shapes) == 3


def test_rows_that_ended_leave_the_batch(six_words, monkeypatch):
    rows = []
    call = ModelSampler._call
    monkeypatch.setattr(
        ModelSampler, "_call", lambda self, ids, *given: rows.append(len(ids)) or call(self, ids, *given)
    )
    (samples,) = ModelSampler(six_words, STOPS).sample(
        [SamplePrompt([1], "r")], Sampling(n=64, max_new_tokens=8), seed=0
    )
    alive = [sum(len(sample.ids) > t for sample in samples) for t in range(1, 8)]
    assert all(count <= ran <= count * 8 / 7 + 1 for count, ran in zip(alive, rows[1:], strict=False))


def test_adapters_are_sampled_and_recomputation_is_left_out(tiny_model, prompts):
    sampling = Sampling(max_new_tokens=6)
    plain = ModelSampler(tiny_model(seed=3).eval(), [2]).sample(prompts, sampling, seed=0)
    policy = PolicyWithHead(tiny_model(seed=3), packing="padded")
    add_lora(policy, Lora(2, 4.0, None))
    checkpoint_activations(policy, "full")
    policy.train()
    found = ModelSampler(policy.model, [2]).sample(prompts, sampling, seed=0)
    assert [x.ids for (x,) in found] == [x.ids for (x,) in plain]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert ModelSampler(policy.model, [2]).sample(prompts, sampling, seed=0) != found


def test_a_prompt_without_room_is_refused_by_its_row(tiny_model):
    sampler = ModelSampler(tiny_model(max_position_embeddings=16), [2])
    assert sampler.room(SamplePrompt([1] * 15, "r"), Sampling()) == 1
    with pytest.raises(ValueError, match=r"train.jsonl row 3 has 16 tokens, which leaves no room for a response in 16"):
        sampler.sample([SamplePrompt([1] * 16, "train.jsonl row 3")], Sampling(), seed=0)
    with pytest.raises(ValueError, match="no room for a response in 12"):
        ModelSampler(sampler.model, [2], max_length=12).room(SamplePrompt([1] * 12, "r"), Sampling())


def test_weights_that_are_not_finite_are_named(tiny_model, prompts):
    model = tiny_model()
    model.get_output_embeddings().weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of token 0 of a response are not finite"):
        ModelSampler(model, [2]).sample(prompts, Sampling(), seed=0)


def test_a_state_is_continued_as_keys_and_values_are(tiny_model, prompts):
    config = MambaConfig(vocab_size=262, hidden_size=16, num_hidden_layers=1, state_size=4)
    test_greedy_is_transformers_own(ModelSampler(tiny_model(config=config).eval(), [2]), prompts)


def test_a_family_without_such_a_cache_is_refused(tiny_model, prompts):
    config = RwkvConfig(vocab_size=262, hidden_size=16, num_hidden_layers=2, context_length=64)
    with pytest.raises(ValueError, match="no cache of keys and values that can be continued"):
        ModelSampler(tiny_model(config=config), [2]).sample(prompts, Sampling(), seed=0)
