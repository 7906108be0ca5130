"""Rows that `tvkd sample` writes, and rows of one response or of none: read by the rules of preference rows.

A row of one response has the columns `prompt` and `completion`, as TRL names them. Beside a response's text stand its
token ids, `chosen_ids` and the like, with the fingerprint of their tokenizer, so that they need not be made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tvkd_fast.data.pairs import BadPair, Preference, SampledIds
from tvkd_fast.data.reading.messages import is_list

PROMPT, TOKENIZER, COMPLETION = "prompt", "tokenizer", "completion"
ANSWERS = ("chosen", "rejected")


def ids_column(name: str) -> str:
    """The column of a part's token ids."""
    return f"{name}_ids"


def ended_column(name: str) -> str:
    """The column that says whether a response ends with a stop id."""
    return f"{name}_ended"


def logps_column(name: str) -> str:
    """The column of a response's log-probabilities under the model that sampled it."""
    return f"{name}_logps"


def sampled_ids(record: Mapping[str, Any], names: tuple[str, ...], row: str) -> SampledIds | None:
    """The row's token ids of prompt and responses; None where it does not say whose they are. BadPair where they are
    none."""
    if not isinstance(record.get(TOKENIZER), str) or not all(ids_column(name) in record for name in (PROMPT, *names)):
        return None
    parts = [_ids(record, ids_column(name), row) for name in (PROMPT, *names)]
    ended = [record.get(ended_column(name)) for name in names]
    for name, value in zip(names, ended, strict=True):
        if not isinstance(value, bool):
            raise BadPair(row, "wrong type", f"{ended_column(name)} is {value!r}, neither true nor false")
    return SampledIds(record[TOKENIZER], parts[0], tuple(parts[1:]), tuple(bool(value) for value in ended))


def _ids(record: Mapping[str, Any], column: str, row: str) -> list[int]:
    value = record[column]
    if not is_list(value) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise BadPair(row, "wrong type", f"{column} is no list of token ids")
    return list(value)


def is_single(record: Mapping[str, Any]) -> bool:
    """Whether the row has one response, and not two."""
    return COMPLETION in record and not all(name in record for name in ANSWERS)


def with_stand_ins(record: Mapping[str, Any], row: str) -> dict[str, Any]:
    """The row with answers that it lacks, so that its prompt is read by the rules of preference rows."""
    if record.get(PROMPT) is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise BadPair(row, "missing column", f"found: {found}; wanted: prompt", "Name the column of prompts prompt")
    answer = record.get(COMPLETION, "a")
    if isinstance(answer, str) and (is_list(record[PROMPT]) or is_list(answer)):
        answer = [{"role": "assistant", "content": answer}]
    other: Any = f"{answer}." if isinstance(answer, str) else [{"role": "assistant", "content": f"not {answer}"}]
    return {**record, "chosen": answer, "rejected": other}


def without_stand_in(pair: Preference, sampled: SampledIds | None) -> Preference:
    """The one response of such a row."""
    return replace(pair, rejected="" if isinstance(pair.prompt, str) else [], single=True, sampled=sampled)
