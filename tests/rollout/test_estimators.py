"""On-policy objectives on a tree that is enumerated: the mean of what samples give is the gradient that is stated."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tvkd_fast.data import TokenizedPair, collate_packed
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.objectives.onpolicy.opd import OPD
from tvkd_fast.objectives.onpolicy.opd_sampled import SampledOPD
from tvkd_fast.rollout import ModelSampler, SamplePrompt, Sampling
from tvkd_fast.scoring import OnlineScorer

STOPS, PROMPT, LENGTH = (4, 5), [1, 3, 0], 3
LAMBDA = 1.25


@pytest.fixture
def models(six_words, tiny_model, in_float64):
    """Policy, reference and teacher."""
    others = [in_float64(tiny_model(seed=seed, config=six_words.config)).eval() for seed in (6, 7)]
    return six_words, *others


@pytest.fixture
def gradient_of(models):
    """The gradient of an objective's loss of one response by all the policy's weights, as one float64 vector."""
    policy = PolicyWithHead(models[0], packing="shared")
    reference = PolicyWithHead(models[1], packing="shared").requires_grad_(False)
    scorer = OnlineScorer(
        reference, TeacherWithHead(models[2], packing="shared"), of_teacher=("states",), reference_states=True
    )

    def gradient(objective, ids):
        pair = TokenizedPair(PROMPT, list(ids), [], ids[-1] in STOPS, False, "row")
        batch = collate_packed([pair], [0], chosen_only=True)
        with torch.no_grad():
            # The sampler's law is the policy's own.
            batch = replace(batch, sampler_logps=policy(batch))
        scores = scorer.of(batch)
        out = objective.loss(objective.numbers(policy, scores, batch), scores, batch)
        policy.zero_grad()
        out.losses.sum().backward()
        return torch.cat([p.grad.flatten().clone() for p in policy.parameters()])

    return gradient


@pytest.fixture
def stated(models, tree):
    """Σ_y π(y) Σ_t ∇KL(p ‖ r^{1−λ}q^λ/Z) over the tree, from whole logits; π(y) is not differentiated."""
    policy, reference, teacher = models
    policy.zero_grad()
    for ids, probability in tree(policy, PROMPT, LENGTH).items():
        row = torch.tensor([[*PROMPT, *ids]])
        log_p, log_r, log_q = (
            model(row).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1) for model in (policy, reference, teacher)
        )
        target = ((1 - LAMBDA) * log_r + LAMBDA * log_q).log_softmax(-1).detach()
        (probability * (log_p.exp() * (log_p - target)).sum()).backward()
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters()])


def test_the_full_vocabularys_gradient_is_the_enumerated_one(models, tree, stated, gradient_of):
    law = tree(models[0], PROMPT, LENGTH)
    mean = sum(p * gradient_of(OPD(lambda_=LAMBDA), ids) for ids, p in law.items())
    assert (mean - stated).norm() <= 1e-10 * stated.norm()


def test_the_sampled_estimators_mean_is_the_same_gradient(models, tree, stated, gradient_of):
    law = tree(models[0], PROMPT, LENGTH)
    of_response = {ids: gradient_of(SampledOPD(lambda_=LAMBDA), ids) for ids in law}
    expected = sum(p * of_response[ids] for ids, p in law.items())
    assert (expected - stated).norm() <= 1e-10 * stated.norm()
    sampler = ModelSampler(models[0], STOPS, tokens_at_once=10**6)
    sampling = Sampling(n=100_000, max_new_tokens=LENGTH)
    ((*samples,),) = sampler.sample([SamplePrompt(PROMPT, "row")], sampling, seed=2)
    counts = Counter(tuple(sample.ids) for sample in samples)
    assert set(counts) <= set(law)
    mean = sum(count * of_response[ids] for ids, count in counts.items()) / len(samples)
    spread = sum(count * (of_response[ids] - mean).square().sum() for ids, count in counts.items())
    # The mean's own standard error, over all weights together.
    standard_error = (spread / len(samples) ** 2).sqrt()
    assert (mean - stated).norm() <= standard_error
    # It would find an estimator that is off by a percent or two.
    assert standard_error < 0.02 * stated.norm()
