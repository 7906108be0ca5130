"""Intervals and the paired test, beside what can be computed whole."""

import math
from itertools import product

import pytest
import torch

from tvkd_fast.evaluation.intervals import bootstrap_interval, paired_p


def test_the_interval_of_many_numbers_is_the_normal_one():
    torch.manual_seed(0)
    numbers = torch.randn(2000, dtype=torch.float64) + 3
    low, high = bootstrap_interval(numbers)
    half = 1.96 * float(numbers.std()) / math.sqrt(2000)
    assert low == pytest.approx(float(numbers.mean()) - half, abs=0.08 * half)
    assert high == pytest.approx(float(numbers.mean()) + half, abs=0.08 * half)
    assert bootstrap_interval(numbers) == (low, high)


def test_groups_weigh_by_their_weights():
    numbers = torch.tensor([1.0, 1.0, 1.0, 5.0])
    groups = [torch.tensor([0, 1, 2]), torch.tensor([3])]
    # Pairs are drawn within their group, and within these there is nothing to draw.
    assert bootstrap_interval(numbers, groups=groups, weights=[0.5, 0.5]) == (3.0, 3.0)
    low, high = bootstrap_interval(numbers)
    assert low < 2.0 < high


def test_seeds_are_drawn_as_pairs_are():
    """Pairs that agree within each of two seeds: what is unsure is which seed one has."""
    seeds = torch.tensor([[0.0] * 50, [1.0] * 50])
    assert bootstrap_interval(seeds) == (0.0, 1.0)
    assert bootstrap_interval(seeds.mean(0)) == (0.5, 0.5)


@pytest.mark.parametrize("differences", [[1.0, 1, 1, -1, 1, 1, 1], [0.3, -0.2, 1.5, 0.0, 0.7], [2.0, 1.0, 4.0, 3.0]])
def test_p_is_the_share_of_signs_that_go_as_far(differences):
    found = [x for x in differences if x]
    sums = [abs(sum(s * x for s, x in zip(signs, found, strict=True))) for signs in product((-1, 1), repeat=len(found))]
    exact = sum(x >= abs(sum(found)) - 1e-9 for x in sums) / len(sums)
    assert paired_p(torch.tensor(differences)) == pytest.approx(exact, abs=0.015)


def test_p_of_models_that_agree_is_one():
    assert paired_p(torch.zeros(20)) == 1.0


def test_p_of_what_is_no_number_is_none():
    assert math.isnan(paired_p(torch.tensor([1.0, math.nan, 2.0])))


def test_p_is_small_where_all_pairs_agree_and_never_zero():
    assert 0 < paired_p(torch.ones(200)) < 1e-3
