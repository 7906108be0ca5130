"""Columns Ψ that a dataset already has are what this trainer would make of the same rows, or are made anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvkd_fast.integrations.returns import MARK, RETURNS, Maker
from tvkd_fast.integrations.trl import TVKDConfig, TVKDTrainer

ROWS = [{"prompt": f"{i}: say ab.", "chosen": " ab", "rejected": " no" * (1 + i % 3)} for i in range(6)]


@pytest.fixture
def make(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., Any]:
    def trainer(data: Any = ROWS, teacher: Any = folders[1], **changes: Any) -> Any:
        options = {"max_length": 40, "use_cpu": True, "bf16": False, "report_to": [], "value_scale": 9.0}
        return TVKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(folders[0]),
            args=TVKDConfig(output_dir=str(tmp_path), disable_tqdm=True, **options | changes),
            train_dataset=Dataset.from_list(data) if isinstance(data, list) else data,
            processing_class=AutoTokenizer.from_pretrained(folders[0]),
            teacher_model=teacher,
        )

    return trainer


def returns(trainer: Any) -> list[list[float]]:
    return [list(trainer.train_dataset[name]) for name in RETURNS]


@pytest.mark.parametrize(
    "changes", [{"gamma": 0.5}, {"terminal": "eos"}, {"value_scale": 2.0}, {"max_length": 16}, {"teacher": "policy"}]
)
def test_another_run_makes_its_own(make: Callable[..., Any], folders: tuple[str, str], changes: Any) -> None:
    if "teacher" in changes:
        changes = {"teacher": folders[0]}
    first = make()
    assert returns(make(first.train_dataset, **changes)) == returns(make(**changes)) != returns(first)


def test_the_same_run_takes_what_is_there_in_any_order(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    monkeypatch.setattr(TVKDTrainer, "_returns_of", None)
    again = make(first.train_dataset.select([4, 1, 3]))
    assert returns(again) == [[column[i] for i in (4, 1, 3)] for column in returns(first)]


def test_rows_whose_text_was_changed_are_made_anew(make: Callable[..., Any]) -> None:
    changed = make().train_dataset.map(lambda row: row | {"chosen": " ab ab"})
    plain = [row | {"chosen": " ab ab"} for row in ROWS]
    assert returns(make(changed)) == returns(make(plain))


def test_columns_of_nobody_are_not_believed(make: Callable[..., Any]) -> None:
    foreign = [row | dict.fromkeys(RETURNS, 7.0) for row in ROWS]
    assert returns(make(foreign)) == returns(make())
    # Nor where a teacher runs on every batch, and none are made beforehand.
    online = make(foreign, precompute_teacher=False)
    batch = online.data_collator([online.train_dataset[0]])
    assert not batch.keys() & set(RETURNS)


def test_a_mark_is_of_the_rows_own_tokens() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    maker = Maker("a")
    mark = maker.mark(row)
    assert maker.made(row | {"psi_chosen": 0.0, "psi_rejected": 0.0, MARK: mark})
    others = [Maker("b").mark(row), maker.mark(row | {"prompt_ids": [1], "chosen_ids": [2, 3]})]
    assert mark not in others


def test_references_are_named_by_how_they_are_used(make: Callable[..., Any]) -> None:
    """TRL names its cache by data and weights alone."""
    kept = make(precompute_ref_log_probs=True, truncation_mode="keep_end", max_length=40)
    cut = make(precompute_ref_log_probs=True, truncation_mode="keep_end", max_length=12)
    assert list(kept.train_dataset["ref_chosen_logps"]) != list(cut.train_dataset["ref_chosen_logps"])
