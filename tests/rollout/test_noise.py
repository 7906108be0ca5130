"""The noise of sampling: what it is a function of, and that it is exponential and independent."""

import torch

from tvkd_fast.kernels.hash_uniform import hashed, hashed_rows
from tvkd_fast.rollout.noise import RaceNoise, noise_key

V = 4096


def noise(keys, position=0):
    return RaceNoise(V, torch.device("cpu")).exponentials(keys, position).double()


def test_a_row_is_its_keys_and_positions_alone():
    keys = [noise_key(0, 0, [1, 2, 3], i) for i in range(4)]
    together = noise(keys, 5)
    assert torch.equal(noise(keys[2:3], 5)[0], together[2])
    assert not torch.equal(noise(keys[2:3], 6)[0], together[2])


def test_every_part_of_a_key_matters():
    keys = {
        noise_key(seed, step, prompt, index)
        for seed in (0, 1)
        for step in (0, 1)
        for prompt in ([1, 2], [2, 1], [1, 2, 0])
        for index in (0, 1)
    }
    assert len(keys) == 24


def test_it_is_exponential():
    x = noise([noise_key(0, 0, [i], 0) for i in range(64)]).flatten()
    assert x.min() > 0
    assert x.isfinite().all()
    # Kolmogorov and Smirnov's distance of 262,144 numbers, at 0.1%.
    ranked = 1 - torch.exp(-x.sort().values)
    places = torch.arange(len(x), dtype=torch.float64) / len(x)
    assert float((ranked - places).abs().max()) < 1.95 / len(x) ** 0.5


def test_small_numbers_are_not_rounded_to_a_grid():
    # Of a million, some two hundred are below 2⁻¹²: on a grid of 2⁻²⁴ some would be equal.
    x = noise([noise_key(0, 0, [i], 0) for i in range(256)]).flatten()
    small = x[x < 2.0**-12]
    assert 150 < len(small) < 400
    assert len(small.unique()) == len(small)


def test_rows_and_columns_are_not_correlated():
    x = noise([noise_key(0, 0, [7], i) for i in range(64)], 3)
    centred = (x - 1) / x.std()
    between_rows = centred @ centred.T / V
    between_positions = (centred * (noise([noise_key(0, 0, [7], i) for i in range(64)], 4) - 1)).mean(1)
    assert float((between_rows - torch.eye(64) * between_rows.diagonal()).abs().max()) < 5 / V**0.5
    assert float(between_positions.abs().max()) < 5 / V**0.5
    assert float((centred[:, 1:] * centred[:, :-1]).mean().abs()) < 4 / (64 * V) ** 0.5


def test_int32_wraps_as_whole_numbers_do():
    columns, xors, factors = hashed(torch.arange(50), 0), [3, -5], [7, -9]
    found = hashed_rows(columns, *(torch.tensor(x, dtype=torch.int32) for x in (xors, factors)))
    for row, (xor, factor) in enumerate(zip(xors, factors, strict=True)):
        for column, x in enumerate(columns.tolist()):
            x = ((x ^ xor) & 0xFFFFFFFF) * factor & 0xFFFFFFFF
            for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
            assert int(found[row, column]) & 0xFFFFFFFF == x ^ x >> 16
