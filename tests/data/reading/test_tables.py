"""Rows of Arrow tables, as the objects that were written into them."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tvkd_fast.data.reading.tables import dataset_rows, decoded_row, parquet_rows


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
    decoded: list[dict[str, Any]] = []
    saved.map(lambda row: decoded.append(decoded_row(row, saved.features)))
    assert decoded == rows


def test_map_columns_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.struct([("x", pyarrow.int64()), ("y", pyarrow.int64())]))
    table = pyarrow.table({"chat_template_kwargs": pyarrow.array([[("a", {"x": 1}), ("b", None)], None], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    found = [row["chat_template_kwargs"] for row in parquet_rows(tmp_path / "x.parquet")]
    assert found == [{"a": {"x": 1}, "b": None}, None]


def test_a_row_of_a_stream_without_features_is_as_it_is() -> None:
    row = {"chosen": [{"role": "user", "content": None}]}
    assert decoded_row(row, None) == row
