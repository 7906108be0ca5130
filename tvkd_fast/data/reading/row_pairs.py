"""The pairs of one row, which are judged together and so read one prompt.

RewardBench 2 has several answers per row, and compares the scores of answers of different pairs. A score depends on
where the prompt ends and on what a cut left of it, so both are decided once per row: the prompt ends at the first
border that any of its answers asks for, and its front is cut by what the longest answer needs. A row of one pair is
that pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal, Protocol, TypeVar

from tvkd_fast.data.tokenization import TokenizedPair, truncate_pair


class _OfRow(Protocol):
    @property
    def row(self) -> str: ...


Pair = TypeVar("Pair", bound=_OfRow)


def by_row(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """The pairs in their order, those of one row together."""
    for _, group in groupby(pairs, key=lambda pair: pair.row):
        yield list(group)


def share_prompt(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Gives all pairs of a row the shortest of their prompts; the tokens behind it become the responses' first.

    Each sequence of prompt and response stays as it is. The prompts have to begin alike, as they do where one tokenizer
    made them of one text.
    """
    border = min(len(pair.prompt_ids) for pair in pairs)
    return [pair if len(pair.prompt_ids) == border else _with_border(pair, border) for pair in pairs]


def truncate_row(
    pairs: Sequence[TokenizedPair], *, max_length: int, truncation: Literal["keep_start", "keep_end"]
) -> list[tuple[TokenizedPair, bool]]:
    """`truncate_pair` on every pair of a row that shares its prompt, which they still do afterwards.

    Raises:
        BadPair: one of the pairs cannot be cut so.
    """
    cut = [truncate_pair(pair, max_length=max_length, truncation=truncation) for pair in pairs]
    left = min(len(pair.prompt_ids) for pair, _ in cut)
    return [
        (replace(pair, prompt_ids=pair.prompt_ids[-left:]), was_cut or len(pair.prompt_ids) > left)
        for pair, was_cut in cut
    ]


def _with_border(pair: TokenizedPair, border: int) -> TokenizedPair:
    moved = pair.prompt_ids[border:]
    return replace(
        pair,
        prompt_ids=pair.prompt_ids[:border],
        chosen_ids=moved + pair.chosen_ids,
        rejected_ids=moved + pair.rejected_ids,
        merged=True,
    )
