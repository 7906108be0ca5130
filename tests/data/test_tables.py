"""Rows of Arrow tables, as the objects that were written into them."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from tvkd_fast.data.tables import dataset_rows, parquet_rows


def call(**arguments: Any) -> dict[str, Any]:
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"chosen": [asked], "chat_template_kwargs": None}


ROWS = [
    call(city="Berlin"),
    call(day=3, names=["a", None]),
    {"chosen": [{"role": "user"}], "chat_template_kwargs": {"short": True}},
]
MIXED = [*ROWS, {"chosen": [{"role": "user", "content": {"null": None}}], "chat_template_kwargs": {"thinking": False}}]


@pytest.mark.parametrize(("rows", "options"), [(ROWS, {}), (MIXED, {"on_mixed_types": "use_json"})])
def test_rows_are_what_was_written(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    dataset = datasets.Dataset.from_list(rows, **options)
    dataset.to_parquet(str(tmp_path / "x.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    assert list(parquet_rows(tmp_path / "x.parquet")) == rows
    assert list(dataset_rows(saved)) == rows
    assert list(dataset_rows(saved.select([1, 0]))) == [rows[1], rows[0]]
