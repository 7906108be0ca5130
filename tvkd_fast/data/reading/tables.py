"""Rows of Arrow tables as the objects that were written into them.

Arrow gives every struct of a column the same fields: what one row's message, tool or argument has and another's has not
is null there. Newer `datasets` write such columns as JSON text of a type of its own instead. Here the first lose those
nulls, and the second are parsed, so that a row is what it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import pyarrow


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file. Raises ValueError where it is no sound one."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from rows_of(file.iter_batches())
    except (pyarrow.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path.name} is no sound parquet file ({message}): copy or download it again") from error


def dataset_rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`."""
    return rows_of(dataset.with_format("arrow").iter(batch_size=1000))


def rows_of(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[dict[str, Any]]:
    """The rows of Arrow batches or tables, with nulls at their top alone."""
    for batch in batches:
        types = {field.name: field.type for field in batch.schema}
        for row in batch.to_pylist():
            yield {name: _as_written(value, types[name], json.loads) for name, value in row.items()}


def decoded_row(row: Mapping[str, Any], features: datasets.Features | None) -> dict[str, Any]:
    """Returns a row that `datasets` has decoded, without such nulls. A stream without features keeps its rows."""
    if features is None:
        return dict(row)
    types = {field.name: field.type for field in features.arrow_schema}
    return {
        name: _as_written(value, types[name], lambda parsed: parsed) if name in types else value
        for name, value in row.items()
    }


def _as_written(value: Any, kind: pyarrow.DataType, parse: Callable[[Any], Any]) -> Any:
    from pyarrow import JsonType, types

    if value is None:
        return None
    if isinstance(kind, JsonType):
        return parse(value)
    if types.is_struct(kind):
        return {f.name: _as_written(value[f.name], f.type, parse) for f in kind if value[f.name] is not None}
    if types.is_map(kind):
        return {key: _as_written(item, kind.item_type, parse) for key, item in value}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_as_written(item, kind.value_type, parse) for item in value]
    return value
