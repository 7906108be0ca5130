"""The benchmark of a teacher's caches over states in which a coordinate stands out, as in a language model's."""

from typing import Any

import pytest
import torch

from bench.divergence.caches import measure
from bench.tables.caches import caches_table
from tvkd_fast.ops import Head


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(160, 48, generator=draw), torch.randn(700, 48, generator=draw)
    hidden[:, 7] += 20.0
    weight[:, 7] *= 0.05
    student = hidden + 0.3 * torch.randn(160, 48, generator=draw)
    return measure(hidden, Head(weight), student, weight, passes=16)


def test_a_rotation_is_what_makes_eight_bits_enough(rows: list[dict[str, Any]]) -> None:
    error = {row["name"]: row["error"] for row in rows}
    assert error["states, bfloat16"] < error["states, int8, rotated"]
    assert error["states, int8, not rotated"] > 2 * error["states, int8, rotated"]
    assert error["topk:50, tail spread evenly"] < error["topk:50, renormalised"]


def test_samples_are_right_on_average_and_stray_less_than_independent_ones(rows: list[dict[str, Any]]) -> None:
    found = {row["name"]: row for row in rows}
    one, other = found["sampled:50"], found["sampled:50, independent draws"]
    assert one["error"] < 0.8 * other["error"]
    for row in (one, other):
        # The error of a mean of 16 unbiased passes is a quarter of one's; half of it would be a bias.
        assert row["mean_error"] < 0.4 * row["error"]
    assert found["states, int8, rotated"]["mean_error"] == found["states, int8, rotated"]["error"]


def test_bytes_are_those_of_the_rows(rows: list[dict[str, Any]]) -> None:
    size = {row["name"]: row["bytes"] for row in rows}
    assert size["states, bfloat16"] == 96
    assert size["states, int8, rotated"] == 52
    assert size["topk:50, renormalised"] == 50 * (2 + 2) + 4
    assert 4 <= size["sampled:50"] <= 50 * 3 + 1


def test_the_table_has_a_row_of_each(rows: list[dict[str, Any]]) -> None:
    made = {"machine": "Linux x86_64, CPU, 2 threads", "commit": "0" * 40}
    report = {"caches": rows, "passes": 16, "tokens": 160, "teacher": "a", "student": "b", "made_by": made}
    table = caches_table(report)
    assert all(row["name"] in table for row in rows)
    assert table.count("the same") == len(rows) - 2
