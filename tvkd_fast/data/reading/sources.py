"""Rows as they lie in files, in folders and on the hub, each with the name that messages call it by."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvkd_fast.data.reading.sample_folder import SAMPLES, sample_files
from tvkd_fast.data.reading.splits import FILE_SUFFIXES, JSON_SUFFIXES, files_of_split, folder_of_subset
from tvkd_fast.data.reading.tables import dataset_rows, parquet_rows

if TYPE_CHECKING:
    import datasets

Rows = Iterator[tuple[Mapping[str, Any], str]]
"""Each row's columns, and where it came from: "train.jsonl row 17"."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w./-]+)?")


def records(source: str | Path, split: str, subset: str | None) -> Rows:
    """Return the rows of a source of `load_preferences`. Raises ValueError where it cannot be read."""
    path = Path(expanduser(source))
    if path.is_file():
        if subset is not None:
            raise ValueError(f"{path} is a single file and has no subset {subset!r}: leave the subset out")
        return _file_records(path, path.name)
    if path.is_dir():
        return _folder_records(path, split, subset)
    if isinstance(source, Path) or source.endswith(FILE_SUFFIXES) or not _HUB_NAME.fullmatch(source):
        raise ValueError(f"{source} does not exist: check the path (relative paths start at {Path.cwd()})")
    return _hub_records(source, split, subset)


def _file_records(path: Path, name: str) -> Rows:
    if path.name.endswith(".parquet"):
        return _numbered(parquet_rows(path), name)
    if path.name.endswith(JSON_SUFFIXES):
        return _json_records(path, name)
    raise ValueError(f"{path} is no preference file that can be read: use one of {', '.join(FILE_SUFFIXES)}")


def _json_records(path: Path, name: str) -> Rows:
    lines: Iterable[str] = _lines(path)
    if path.name.endswith((".json", ".json.gz")):
        lines = list(lines)
        text = "\n".join(lines)
        if text.lstrip().startswith("["):
            for i, value in enumerate(_parse_json(text, path, first_line=1)):
                yield _object(value, f"{name} row {i}"), f"{name} row {i}"
            return
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    for i, (number, line) in enumerate(filled):
        value = _parse_json(line, path, first_line=number)
        yield _object(value, f"{name} line {number}"), f"{name} row {i}"


def _lines(path: Path) -> Iterator[str]:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"{path.name} line {number} is not UTF-8: save the file as UTF-8") from None
        except (EOFError, OSError, zlib.error) as error:
            remedy = "copy or download the file again"
            raise ValueError(f"{path.name} is truncated or damaged after line {number} ({error}): {remedy}") from error


def _parse_json(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        what, remedy = f"{error.msg} at column {error.colno}", "write one JSON object a line"
        if text.startswith("version https://git-lfs"):
            what, remedy = "a Git LFS pointer", "fetch the file itself with git lfs pull"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        line, what, remedy = first_line, str(error), "write one JSON object a line, of text and lists of messages"
    raise ValueError(f"{path.name} line {line} is broken JSON ({what}): {remedy}")


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise ValueError(f"{where} is not a JSON object but {kind}: write one object with chosen and rejected a row")
    return value


def _numbered(rows: Iterable[Any], name: str) -> Rows:
    for i, record in enumerate(rows):
        yield record, f"{name} row {i}"


def _folder_records(folder: Path, split: str, subset: str | None) -> Rows:
    if (folder / SAMPLES).is_file():
        return (record for file in sample_files(folder) for record in _file_records(file, file.name))
    if subset is not None:
        folder, subset = folder_of_subset(folder, subset)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_records(folder, split)
    files = files_of_split(folder, split, subset)
    # Files of one name in several folders would give their rows the same names.
    apart = len({file.name for file in files}) < len(files)
    return (
        record
        for file in files
        for record in _file_records(file, file.relative_to(folder.resolve()).as_posix() if apart else file.name)
    )


def _saved_records(folder: Path, split: str) -> Rows:
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} is no sound folder of save_to_disk ({message}): save or copy it again") from error
    if not isinstance(saved, datasets.DatasetDict):
        return _numbered(dataset_rows(saved), folder.name)
    if split not in saved:
        raise ValueError(
            f"{folder} has no split {split!r}: set --data.train_split or --data.eval_split to one of {', '.join(saved)}"
        )
    return _numbered(dataset_rows(saved[split]), f"{folder.name} {split}")


def _hub_records(source: str, split: str, subset: str | None) -> Rows:
    import datasets

    name, _, data_dir = source.partition(":")
    rows: datasets.Dataset
    try:
        rows = datasets.load_dataset(name, subset, data_dir=data_dir or None, split=split)
    except Exception as error:  # the hub's client raises its own, datasets', httpx's and the builtin kinds
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{source}: neither a local file or folder of that name nor the hub (split {split!r}) could be read "
            f"({type(error).__name__}: {first_line}). Check the name, the split and the subset; on a machine without "
            "network give a .jsonl or .parquet file, or a folder that datasets.save_to_disk wrote"
        ) from error
    return _numbered(dataset_rows(rows) if isinstance(rows, datasets.Dataset) else rows, f"{source} {split}")
