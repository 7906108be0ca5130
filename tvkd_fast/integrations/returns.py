"""Columns of Ψ in a dataset, and a mark in every row that identifies how they were computed.

A trainer uses the columns of a row only if it would compute the same numbers from the same tokens: rows that were
selected, shuffled, joined or saved keep valid marks, and rows whose tokens were changed do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

RETURNS = ("psi_chosen", "psi_rejected")
"""Columns of a dataset that the teacher has read."""
MARK = "psi_made_of"
"""The column that identifies the tokens, teacher and settings that Ψ was computed from."""
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Maker:
    """The source of Ψ: `key` identifies teacher, settings and precision, and equal keys give equal numbers."""

    key: str

    def mark(self, row: Mapping[str, Sequence[int]]) -> str:
        """The mark of Ψ that this source computes from a row's tokens."""
        digest = hashlib.sha256(self.key.encode())
        for name in IDS:
            digest.update(f";{name}:{','.join(map(str, row[name]))}".encode())
        return digest.hexdigest()[:32]

    def made(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row's Ψ is what this source would compute."""
        return all(name in row for name in (*RETURNS, *IDS)) and row.get(MARK) == self.mark(row)

    def columns(self, rows: Dataset, returns: tuple[Tensor, Tensor]) -> dict[str, list[Any]]:
        """The columns for rows with Ψ `returns`, (P,) each."""
        found: dict[str, list[Any]] = {name: x.tolist() for name, x in zip(RETURNS, returns, strict=True)}
        return found | {MARK: [self.mark(row) for row in rows.select_columns(list(IDS))]}

    def made_all(self, rows: Dataset) -> bool:
        names = [*RETURNS, MARK, *IDS]
        return set(names) <= set(rows.column_names) and all(map(self.made, rows.select_columns(names)))


def without_returns(rows: Dataset) -> Dataset:
    """The dataset without its columns of Ψ."""
    return rows.remove_columns([name for name in (*RETURNS, MARK) if name in rows.column_names])
