"""Columns Ψ of a dataset's rows, and a mark in every row of what made them.

A row is taken at its word only by a trainer that would have made the same numbers of the same tokens: rows that were
selected, shuffled, joined or saved keep their marks, and rows whose tokens were changed lose their worth.
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
"""Columns of a dataset whose teacher's pass is made."""
MARK = "psi_made_of"
"""The column that says of what."""
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Maker:
    """Who makes Ψ: `key` names teacher, settings and precision; two of one key make the same numbers of a row."""

    key: str

    def mark(self, row: Mapping[str, Sequence[int]]) -> str:
        """Of Ψ that this maker makes of a row's tokens."""
        digest = hashlib.sha256(self.key.encode())
        for name in IDS:
            digest.update(f";{name}:{','.join(map(str, row[name]))}".encode())
        return digest.hexdigest()[:32]

    def made(self, row: Mapping[str, Any]) -> bool:
        """Whether the row's Ψ is what this maker would make of it."""
        return all(name in row for name in (*RETURNS, *IDS)) and row.get(MARK) == self.mark(row)

    def columns(self, rows: Dataset, returns: tuple[Tensor, Tensor]) -> dict[str, list[Any]]:
        """The columns of rows whose Ψ are `returns`, (P,) each."""
        found: dict[str, list[Any]] = {name: x.tolist() for name, x in zip(RETURNS, returns, strict=True)}
        return found | {MARK: [self.mark(row) for row in rows.select_columns(list(IDS))]}

    def made_all(self, rows: Dataset) -> bool:
        names = [*RETURNS, MARK, *IDS]
        return set(names) <= set(rows.column_names) and all(map(self.made, rows.select_columns(names)))


def without_returns(rows: Dataset) -> Dataset:
    """The dataset before any Ψ."""
    return rows.remove_columns([name for name in (*RETURNS, MARK) if name in rows.column_names])
