"""The pairs that are kept of a super-batch, by their scores."""

import math

import pytest
import torch

from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.data.order import check_step
from tvkd_fast.data.selection import Selection

BEST = Selection("learnability", 0.5, 0.0)


@pytest.mark.parametrize(("ratio", "taken"), [(0.8, 25), (0.5, 10), (0.0, 5), (0.9, 50), (0.7, 17)])
def test_so_many_pairs_are_taken_that_a_step_is_left(ratio: float, taken: int) -> None:
    assert Selection("learnability", ratio, 0.0).taken(5) == taken


def test_the_highest_scores_are_kept_in_their_places() -> None:
    assert BEST.kept([0.1, 3.0, -1.0, 2.0], 2, seed=0, step=0) == [1, 3]
    assert BEST.kept([1.0] * 4, 2, seed=7, step=3) == [0, 1]
    assert BEST.kept([0.1, 3.0, math.nan, 2.0], 2, seed=0, step=0) == [1, 2]


def test_a_sample_is_a_function_of_seed_and_step_and_follows_softmax() -> None:
    rule, scores = Selection("learnability", 0.75, 0.5), [0.0, 1.0, 0.5, -0.5]
    draws = [tuple(rule.kept(scores, 1, seed=3, step=step)) for step in range(4000)]
    assert draws == [tuple(rule.kept(scores, 1, seed=3, step=step)) for step in range(4000)]
    assert draws != [tuple(rule.kept(scores, 1, seed=4, step=step)) for step in range(4000)]
    found = torch.tensor([draws.count((place,)) / 4000 for place in range(4)])
    wanted = (torch.tensor(scores) / 0.5).softmax(0)
    # Three standard deviations of a share of 4,000 draws.
    assert (found - wanted).abs().max() < 3 * math.sqrt(0.25 / 4000)


def test_two_are_drawn_without_replacement() -> None:
    rule = Selection("learnability", 0.5, 100.0)
    draws = [rule.kept([0.0, 0.0, 50.0], 2, seed=0, step=step) for step in range(50)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("select_ratio", 1.0), ("select_ratio", -0.1), ("select_temperature", -1.0)]
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--data.{name}"):
        DataConfig(train="x", **{name: value})  # type: ignore[arg-type]


def test_a_ratio_that_leaves_less_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 20 pairs to keep 4 of them, and the data has 12.*--data.select_ratio"):
        check_step(4, range(12), taken=20)
    check_step(4, range(20), taken=20)
