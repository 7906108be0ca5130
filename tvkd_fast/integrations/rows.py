"""TRL's rows of token ids, where they differ from what a model is to read, and what of them is a response.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from tvkd_fast.data.chat_template import apply_template
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.data.tokenization import PairTokenizer, TokenizedPair, truncate_pair
from tvkd_fast.integrations.returns import RETURNS, Maker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHICH = ("chosen", "rejected")
RESPONSES = ("response_mask", "response_ended")
"""What a batch holds of its responses, for a teacher that is yet to read them."""


class RowTokenizer:
    """A tokenizer as TRL calls one, by which rows are the tokens of `tvkd score`: text that a template wrote already
    begins once, and a template that asks for the date is told the same on all days.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pairs = PairTokenizer(tokenizer)

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids, opening = list(self.tokenizer(text=text)["input_ids"]), self.pairs.opening
        begun = ids[: len(opening)] == opening and self.pairs.brings_opening(ids[len(opening) :])
        return {"input_ids": ids[len(opening) :] if begun else ids}

    def apply_chat_template(self, messages: list[Any], **options: Any) -> Any:
        return apply_template(self.tokenizer, messages, **options)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def end_once(dataset: Any, ends: ResponseEnds) -> Any:
    """Rows of plain text without the end that TRL puts behind one that the text had."""

    names = [f"{which}_ids" for which in WHICH]

    def once(row: dict[str, Any]) -> dict[str, Any]:
        return {name: ends.cut(row[name])[0] for name in names}

    if isinstance(dataset, Dataset) and all(once(row) == row for row in dataset.select_columns(names)):
        return dataset
    return dataset.map(once)


def checked_rows(dataset: Any, positions: int, whose: str, max_length: int | None) -> Any:
    """The dataset; a stream is looked at as it comes.

    Raises a ValueError that names the first row which a model of so many positions cannot read.
    """

    def checked(row: dict[str, Any], i: int) -> dict[str, Any]:
        length = len(row["prompt_ids"]) + max(len(row[f"{which}_ids"]) for which in WHICH)
        length = length if max_length is None else min(length, max_length)
        if length > positions:
            raise ValueError(
                f"row {i} has {length:,} tokens, and the {whose} was made for {positions:,} positions: set "
                f"max_length={positions}, or choose a model that reads longer ones"
            )
        return row

    if max_length is not None and max_length <= positions:
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.map(checked, with_indices=True)
    for i, row in enumerate(dataset):
        checked(row, i)
    return dataset


def as_pairs(rows: Iterable[dict[str, Any]], ends: ResponseEnds, max_length: int | None) -> Iterable[TokenizedPair]:
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids` as `tvkd score` reads the same text.

    What a template writes behind the end of a response is no part of it; and longer rows are cut.
    """
    for i, row in enumerate(rows):
        _check_prompt(row, f"row {i}")
        (chosen, chosen_ended), (rejected, rejected_ended) = (ends.cut(row[f"{which}_ids"]) for which in WHICH)
        pair = TokenizedPair(row["prompt_ids"], chosen, rejected, chosen_ended, rejected_ended, f"row {i}")
        yield pair if max_length is None else truncate_pair(pair, max_length=max_length, truncation="keep_start")[0]


@dataclass
class WithReturns:
    """A collator that hands Ψ on where every row has what `maker` would make of it, and else what of each row is a
    response."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    ends: ResponseEnds
    truncation: str
    """The collator's, "keep_start" or "keep_end"."""
    maker: Maker | None = None
    """None where rows have no Ψ that could be taken at its word."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        if self.maker is not None and all(map(self.maker.made, examples)):
            return batch | {name: torch.tensor([example[name] for example in examples]) for name in RETURNS}
        for example in examples:
            _check_prompt(example, "a row")
        responses = [example[f"{which}_ids"] for which in WHICH for example in examples]
        return batch | dict(zip(RESPONSES, self._of(responses, batch["completion_mask"].bool()), strict=True))

    def _of(self, responses: list[list[int]], completion: Tensor) -> tuple[Tensor, Tensor]:
        """[2P, L] bool, which tokens are a response's up to and with its end, and (2P,) bool, whether that is there.

        An end is looked for in the whole row: what truncation left of one does not tell.
        """
        cut = [self.ends.cut(ids) for ids in responses]
        length, ended = torch.tensor([len(ids) for ids, _ in cut]), torch.tensor([found for _, found in cut])
        left = completion.sum(1)
        lost = torch.tensor([len(ids) for ids in responses]) - left
        first = lost if self.truncation == "keep_end" else torch.zeros_like(lost)
        place = completion.cumsum(1) - 1 + first[:, None]
        return completion & (place < length[:, None]), ended & (length > first) & (length <= first + left)


def _check_prompt(row: Mapping[str, Any], name: str) -> None:
    if not row["prompt_ids"]:
        raise ValueError(
            f"{name} has no prompt of its own: its tokens are merged with a response's, and no state is left from "
            "which a teacher's value starts. End prompts where a token ends, or have a template write them"
        )
