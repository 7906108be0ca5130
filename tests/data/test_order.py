from collections import Counter

import pytest
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.data import pairs_of_epochs, pairs_of_step


@draws(100)
@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 13))
def test_an_epoch_takes_every_pair_once(seed, num_pairs, pairs_per_step):
    steps = -(-3 * num_pairs // pairs_per_step)
    taken = [
        i
        for step in range(steps)
        for i in pairs_of_step(seed, step, num_pairs=num_pairs, pairs_per_step=pairs_per_step)
    ]
    for epoch in range(3):
        assert sorted(taken[epoch * num_pairs : (epoch + 1) * num_pairs]) == list(range(num_pairs))


def test_the_order_is_the_same_in_any_process(another_process):
    here = pairs_of_step(3, 5, num_pairs=1000, pairs_per_step=8)
    assert another_process["order"] == list(here)


def test_seeds_and_epochs_differ():
    first = pairs_of_step(0, 0, num_pairs=50, pairs_per_step=50)
    assert first != pairs_of_step(1, 0, num_pairs=50, pairs_per_step=50)
    assert first != pairs_of_step(0, 1, num_pairs=50, pairs_per_step=50)


@pytest.mark.parametrize(("epochs", "num_pairs", "each"), [(1, 10, 4), (2, 10, 4), (3, 7, 5), (1, 8, 4), (0.1, 30, 2)])
def test_whole_passes_take_every_pair_as_often(epochs, num_pairs, each):
    total = pairs_of_epochs(epochs, num_pairs)
    steps = [
        pairs_of_step(0, step, num_pairs=num_pairs, pairs_per_step=each, total=total)
        for step in range(-(-total // each))
    ]
    taken = Counter(i for pairs in steps for i in pairs)
    assert total == sum(taken.values()) == round(epochs * num_pairs)
    assert epochs < 1 or set(taken.values()) == {epochs}
    assert all(len(pairs) == each for pairs in steps[:-1])
    assert steps[-1]
