"""Rewards that a row has for both of its answers."""

from pathlib import Path
from typing import Any

import pytest

from tvkd_fast.data import build_dataset, collate_packed, collate_pairs
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.data.pairs import BadPair
from tvkd_fast.data.reading.rewards import with_rewards

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        pytest.param({"score_chosen": 8.5, "score_rejected": 3}, None, id="ultrafeedback_binarized"),
        pytest.param({"chosen_score": 8.5, "rejected_score": 3}, None, id="turned round"),
        pytest.param({"chosen-rating": 8.5, "rejected-rating": 3}, None, id="argilla's copy"),
        pytest.param({"chosen_rating": 8.5, "rejected_rating": 3}, None, id="dpo-mix-7k"),
        pytest.param({"chosen_avg_rating": 8.5, "rejected_avg_rating": 3}, None, id="means"),
        pytest.param({"helpful_chosen": 8.5, "helpful_rejected": 3}, ["helpful"], id="by name"),
        pytest.param(
            {"score_chosen": 1, "score_rejected": 2, "rating_chosen": 8.5, "rating_rejected": 3},
            ["rating"],
            id="one of two",
        ),
    ],
)
def test_a_reward_is_two_columns(columns: dict[str, Any], names: list[str] | None) -> None:
    assert with_rewards(names)(PAIR | columns, "row 0").rewards == ((8.5, 3.0),)


def test_an_ensemble_is_in_the_order_in_which_it_was_asked_for() -> None:
    row = PAIR | {"a_chosen": 1, "a_rejected": 1, "chosen_b": -2.0, "rejected_b": 0.5}
    assert with_rewards(["b", "a"])(row, "row 0").rewards == ((-2.0, 0.5), (1.0, 1.0))


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        pytest.param({}, None, r"missing reward columns \(chosen_score and rejected_score, .*found: prompt", id="none"),
        pytest.param({"score_chosen": 1}, None, "missing reward columns .*--data.rewards", id="one side"),
        pytest.param(
            {"a_chosen": 2, "a_rejected": 1},
            ["a", "b"],
            r"missing reward columns \(chosen_b and rejected_b",
            id="one member less than asked",
        ),
        pytest.param(
            {"score_chosen": 2, "score_rejected": 2},
            None,
            r"both answers have the same reward \(score 2\). .*--data.bad_pairs drop",
            id="equal",
        ),
        pytest.param(
            {"score_chosen": float("nan"), "score_rejected": 2},
            None,
            r"a reward is no finite number \(score_chosen is nan\). .*--data.bad_pairs drop",
            id="NaN",
        ),
        pytest.param({"score_chosen": None, "score_rejected": 2}, None, "no finite number .*is None", id="null"),
        pytest.param({"score_chosen": "8", "score_rejected": 2}, None, "no finite number .*is '8'", id="text"),
        pytest.param({"score_chosen": True, "score_rejected": 2}, None, "no finite number .*is True", id="bool"),
        pytest.param(
            {"score_chosen": 1, "score_rejected": 2, "rating_chosen": 1, "rating_rejected": 2},
            None,
            r"more than one reward \(score, rating\). Name the one that is meant: --data.rewards \[score\]",
            id="two",
        ),
    ],
)
def test_a_row_without_its_rewards_is_refused(columns: dict[str, Any], names: list[str] | None, message: str) -> None:
    with pytest.raises(BadPair, match=message) as caught:
        with_rewards(names)(PAIR | columns, "train.jsonl row 7")
    assert "\n" not in str(caught.value)


def test_rewards_come_with_the_batch(chatml: Any, write_jsonl: Any) -> None:
    rows = [PAIR | {"prompt": f"{i}?", "score_chosen": i + 1.0, "score_rejected": -i} for i in range(3)]
    path: Path = write_jsonl(rows)
    config = DataConfig(train=str(path), rewards=["score"])
    pairs = load_dataset("train", config, chatml, read=config.reader(rewards=True))
    for batch in (collate_packed(pairs[1:], [1, 2]), collate_pairs(pairs[1:], [1, 2])):
        assert batch.rewards is not None
        assert batch.rewards.tolist() == [[2.0, 3.0, -1.0, -2.0]]
    without = build_dataset(path, chatml)
    assert collate_packed(without[:], range(3)).rewards is None
    assert without.fingerprint == pairs.fingerprint
    assert without.rewards_fingerprint != pairs.rewards_fingerprint


def test_names_stand_once_each() -> None:
    for names in ([], ["score", "score"]):
        with pytest.raises(ValueError, match=r"rewards must be names, each once, .*set --data.rewards \[score\]"):
            DataConfig(rewards=names)


def test_the_bundled_set_has_two(chatml: Any) -> None:
    config = DataConfig(train="bundled:train:12", rewards=["score", "closeness"])
    pairs = load_dataset("train", config, chatml, read=config.reader(rewards=True))
    assert {pair.rewards[0] for pair in pairs} == {(1.0, 0.0)}
    assert all(chosen == 1.0 > rejected >= 0.0 for chosen, rejected in (pair.rewards[1] for pair in pairs))
