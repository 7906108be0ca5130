"""The settings of sampling, and the law that they make of the policy's own."""

import pytest
import torch

from tvkd_fast.rollout import Sample, SampleCounts, Sampling

LOGPS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.1, 0.8]], dtype=torch.float64).log()


def test_by_default_it_is_the_policys_own():
    sampling = Sampling()
    assert sampling.law(LOGPS) is LOGPS
    assert sampling.bent == ()
    sampling.check_law("opd")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"temperature": 0.5}, [[0.16, 0.09, 0.04, 0.01], [0.0025, 0.0025, 0.01, 0.64]]),
        ({"top_k": 2}, [[0.4, 0.3, 0, 0], [0, 0, 0.1, 0.8]]),
        ({"top_p": 0.5}, [[0.4, 0.3, 0, 0], [0, 0, 0, 0.8]]),
        ({"top_p": 0.85}, [[0.4, 0.3, 0.2, 0], [0, 0, 0.1, 0.8]]),
        ({"top_p": 0.01}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_k": 9}, [[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.1, 0.8]]),
        # The k likeliest first, and the share of what they have.
        ({"top_k": 3, "top_p": 0.7}, [[0.4, 0.3, 0, 0], [0, 0, 0, 0.8]]),
    ],
)
def test_a_bent_law_is_cut_and_sums_to_one(settings, wanted):
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(Sampling(**settings).law(LOGPS).exp(), wanted / wanted.sum(1, keepdim=True))


def test_transformers_cuts_the_same_tokens_off():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(32, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    warped = logits
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)):
        warped = warper(None, warped)
    law = Sampling(temperature=0.8, top_k=20, top_p=0.9).law(logits.log_softmax(-1))
    torch.testing.assert_close(law, warped.log_softmax(-1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": 0.9}, "temperature 0.9"), ({"top_p": 0.9, "top_k": 5}, "top_p 0.9 and top_k 5")],
)
def test_a_bent_law_is_refused_by_whoever_needs_the_policys(settings, named):
    with pytest.raises(ValueError, match=f"opd needs samples of the policy's own law, and {named} would bend it: set"):
        Sampling(**settings).check_law("opd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0: set --n"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n": 2, "temperature": 0.0}, "all 2 responses would be the same: set --n 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_greedy_is_no_law():
    with pytest.raises(ValueError, match="temperature 0 would bend it"):
        Sampling(temperature=0.0).check_law("opd")


def test_counts():
    counts = SampleCounts()
    counts.add([Sample([7, 8, 2], True, [0.0] * 3), Sample([2], True, [0.0]), Sample([7, 7], False, [0.0] * 2)])
    assert str(counts) == "3 responses of 2.0 tokens (at most 3); 1 never stopped (33.3%), 1 empty"
