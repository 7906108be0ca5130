"""Rows of a dataset in the tokens that `tvkd score` makes of them, in TRL's columns.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features
from torch import Tensor

from tvkd_fast.data.dataset import written_before
from tvkd_fast.data.pairs import Preference
from tvkd_fast.data.reading.formats import to_preference
from tvkd_fast.data.reading.rewards import with_rewards
from tvkd_fast.data.reading.tables import decoded_row
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.data.tokenization import PairTokenizer, TokenizedPair, truncate_pair
from tvkd_fast.integrations.returns import IDS, MARK, RETURNS, Maker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHICH = ("chosen", "rejected")
RESPONSES = ("response_mask", "response_ended")
"""Keys of a batch that describe its responses, for a teacher that runs on the batch."""
ROW = "source_row"
"""The column with a row's name, which stays the same when other rows are dropped or rows are shuffled."""
DATA_REWARDS = "data_rewards"
"""The column, and the key of a batch, of the rewards that a row has for its responses."""
OF_OBJECTIVES = (*RESPONSES, *RETURNS, DATA_REWARDS)
"""Keys of a batch that are no inputs of a model."""
_MADE = {DATA_REWARDS, *IDS, *RETURNS, MARK, ROW, *(f"ref_{which}_logps" for which in WHICH)}
"""Columns that a trainer has added to a dataset, and that are not read as data."""


class RowReader:
    """Reads rows of a dataset as `tvkd score` reads them: by the same rules, into the same tokens.

    Args:
        tokenizer: the policy's.
        stop_ids: as in `ResponseEnds`.
        features: the dataset's; None where a stream has none.
        rewards: whether rows have rewards, which are read with them.
        reward_names: which ones; None where a row has one alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        features: Features | None,
        rewards: bool = False,
        reward_names: Sequence[str] | None = None,
    ) -> None:
        self._given = tokenizer, sorted(stop_ids), features, rewards, reward_names
        self._read = with_rewards(reward_names) if rewards else to_preference
        self._pairs = PairTokenizer(tokenizer, stop_ids=stop_ids)
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        # datasets names its cache by what is pickled: state from earlier rows must not be part of it.
        return RowReader, self._given

    def __call__(self, row: Mapping[str, Any], i: int) -> dict[str, Any]:
        """Returns the row's token ids and its name. Raises BadPair if it is no preference."""
        written = decoded_row({name: value for name, value in row.items() if name not in _MADE}, self._given[2])
        preference = self._read(written, f"row {i}")
        assert isinstance(preference, Preference)
        pair = self._pairs(preference)
        if pair.written_before and not self._warned:
            self._warned = True
            warnings.warn(written_before(pair.row), stacklevel=2)
        found = {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}
        rewards = {DATA_REWARDS: [list(reward) for reward in pair.rewards]} if pair.rewards else {}
        return found | rewards | {ROW: pair.row}


def read_rows(dataset: Any, reader: RowReader, **options: Any) -> Any:
    """The dataset with the columns that the reader makes; `options` are those of `Dataset.map`."""
    return dataset.map(reader, with_indices=True, **(options if isinstance(dataset, Dataset) else {}))


def long_prompts_dropped(dataset: Any, max_length: int, **options: Any) -> Any:
    """The dataset without rows whose prompt leaves no space for a response, which TRL leaves out too."""
    options = options if isinstance(dataset, Dataset) else {}
    return dataset.filter(lambda row: len(row["prompt_ids"]) < max_length, **options)


def checked_rows(dataset: Any, positions: int, whose: str, max_length: int | None) -> Any:
    """Returns the dataset; a stream is checked as it is read.

    Raises a ValueError that names the first row with more tokens than the model has positions.
    """

    def checked(row: dict[str, Any], i: int) -> dict[str, Any]:
        length = len(row["prompt_ids"]) + max(len(row[f"{which}_ids"]) for which in WHICH)
        length = length if max_length is None else min(length, max_length)
        if length > positions:
            name = row.get(ROW, f"row {i}")
            raise ValueError(
                f"{name} has {length:,} tokens, and the {whose} was made for {positions:,} positions: set "
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
        name = row.get(ROW, f"row {i}")
        _check_prompt(row, name)
        (chosen, chosen_ended), (rejected, rejected_ended) = (ends.cut(row[f"{which}_ids"]) for which in WHICH)
        pair = TokenizedPair(row["prompt_ids"], chosen, rejected, chosen_ended, rejected_ended, name)
        yield pair if max_length is None else truncate_pair(pair, max_length=max_length, truncation="keep_start")[0]


@dataclass
class WithReturns:
    """A collator that adds Ψ if every row has the Ψ that `maker` would make, and otherwise marks the responses.

    For an objective it marks them in any case, and adds the rows' rewards [K, 2P] where they have some.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    ends: ResponseEnds
    truncation: str
    """The collator's, "keep_start" or "keep_end"."""
    maker: Maker | None = None
    """None where no row's Ψ may be reused."""
    for_objective: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        if self.for_objective and DATA_REWARDS in examples[0]:
            rewards = torch.tensor([example[DATA_REWARDS] for example in examples])
            batch[DATA_REWARDS] = rewards.permute(1, 2, 0).flatten(1)
        if self.maker is not None and all(map(self.maker.made, examples)):
            batch |= {name: torch.tensor([example[name] for example in examples]) for name in RETURNS}
            if not self.for_objective:
                return batch
        for example in examples:
            _check_prompt(example, example.get(ROW, "a row"))
        responses = [example[f"{which}_ids"] for which in WHICH for example in examples]
        return batch | dict(zip(RESPONSES, self._of(responses, batch["completion_mask"].bool()), strict=True))

    def _of(self, responses: list[list[int]], completion: Tensor) -> tuple[Tensor, Tensor]:
        """[2P, L] bool, which tokens are a response's up to and with its end, and (2P,) bool, whether that exists.

        The end is found in the whole row, since a truncated one may have lost it.
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
