"""The data that a command reads, and the pairs in it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tvkd_fast.data import MicroBatching, PairDataset, build_dataset
from tvkd_fast.data.reading.formats import ReadRow, to_preference
from tvkd_fast.data.reading.labelled import labelled_or_paired, to_chosen, to_labelled, unpaired
from tvkd_fast.data.reading.rewards import with_rewards
from tvkd_fast.data.selection import By, Selection
from tvkd_fast.files import at_home
from tvkd_fast.ranges import NOT_NEGATIVE, Range, at_least, check_numbers, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class DataConfig:
    """Preference data and how it becomes tokens."""

    train: str | None = None
    """Training pairs: hub name (`org/name`, `org/name:data_dir`), .jsonl(.gz) or .parquet file, `datasets` folder, or
    `bundled:train`."""
    eval: str | None = None
    """Held-out pairs, from the same kinds of places."""
    train_split: str = "train"
    """Split of a hub dataset, or of a folder, to train on; a split that does not exist lists those that do."""
    eval_split: str = "test"
    """Split of a hub dataset, or of a folder, to evaluate on."""
    subset: str | None = None
    """Configuration name of a hub dataset or of a copy of one, or a folder inside a folder."""
    train_limit: int | None = number(None, at_least(1))
    """Read only so many training rows."""
    eval_limit: int | None = number(None, at_least(1))
    """Read only so many held-out rows."""
    max_length: int = number(1024, at_least(2))
    """Most tokens of prompt and response together."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """What survives in a longer pair: `keep_start` cuts the responses' ends, `keep_end` the prompt's beginning."""
    overlong: Literal["error", "drop"] = "error"
    """A pair that cutting would leave without a response: stop, or drop and count it."""
    bad_pairs: Literal["error", "drop"] = "error"
    """A row that is no preference (empty, equal or unrelated responses): stop, or drop and count it."""
    chat_template: Literal["auto", "never"] = "auto"
    """`auto` writes conversations with the tokenizer's template, `never` as plain text."""
    teacher_chat_template: Literal["auto", "never"] = "auto"
    """The same for a teacher with another tokenizer; one with the policy's reads what the policy reads."""
    select: By = "no"
    """Which of the pairs that a step takes it learns from: those whose loss exceeds the teacher's most (learnability),
    those whose loss under the teacher is least (easy_reference), or all. Needs the teacher's log-probabilities."""
    select_ratio: float = number(0.8, Range(0, 1, without_high=True))
    """Share of the pairs of a step that selection leaves out; 0.8 takes five times pairs_per_step."""
    select_temperature: float = number(0.0, NOT_NEGATIVE)
    """Selection keeps the highest scores (0), or samples without replacement by softmax(score/temperature)."""
    unpair: bool = False
    """Make two responses with labels of every pair, a desirable and an undesirable one, for --objective kto."""
    rewards: list[str] | None = None
    """Rewards of the answers, such as [score] for columns score_chosen and score_rejected, or chosen_score and
    rejected_score: those an objective over rewards reads; where not given the one that there is."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self, "data")
        if self.rewards is not None and (not self.rewards or len(set(self.rewards)) < len(self.rewards)):
            raise ValueError(f"rewards must be names, each once, got {self.rewards}: set --data.rewards [score]")

    @property
    def selection(self) -> Selection | None:
        """The rule of a step's selection; None where it keeps all pairs."""
        if self.select == "no":
            return None
        return Selection(self.select, self.select_ratio, self.select_temperature)

    def reader(self, *, rewards: bool, paired: bool = True, labels: bool | None = False) -> ReadRow:
        """What makes a pair of a row, with its rewards or without. Unless `paired`, of a row of one response too. With
        `labels` of a row of one response with a label, and where they are None of either."""
        if self.unpair:
            return unpaired
        if labels is not False:
            return to_labelled if labels else labelled_or_paired
        if rewards:
            return with_rewards(self.rewards)
        return to_preference if paired else to_chosen


def load_dataset(
    which: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batching: MicroBatching | None = None,
    *,
    stop_ids: Collection[int] = (),
    verbose: bool = False,
    read: ReadRow = to_preference,
) -> PairDataset:
    """The training ("train") or held-out ("eval") pairs that the config names, tokenized, truncated, and fit to be
    batched so.

    `stop_ids` are `models.load_stop_ids` of the model that reads them; `verbose` prints on stderr what was cut and what
    was dropped; `read` makes a pair of a row, as in `load_preferences`."""
    source = config.train if which == "train" else config.eval
    if source is None:
        raise ValueError(
            f"no {which} data: set --data.{which} to a hub name, a .jsonl(.gz) or .parquet file, a `datasets` folder, "
            f"or bundled:{which}"
        )
    dataset = build_dataset(
        source,
        tokenizer,
        split=config.train_split if which == "train" else config.eval_split,
        subset=config.subset,
        limit=config.train_limit if which == "train" else config.eval_limit,
        max_length=config.max_length,
        truncation=config.truncation,
        overlong=config.overlong,
        bad_pairs=config.bad_pairs,
        chat_template=config.chat_template,
        stop_ids=stop_ids,
        batching=batching,
        read=read,
    )
    if verbose:
        print(f"{which}: {dataset.report}", file=sys.stderr)
    return dataset
