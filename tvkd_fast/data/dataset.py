"""A tokenized preference set that knows what was cut, what was dropped, and what it is."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from tvkd_fast.data.packing import MicroBatching
from tvkd_fast.data.reading.formats import (
    BadPair,
    LoadedPreferences,
    Preference,
    ReadRow,
    load_preferences,
    read_row,
    to_preference,
)
from tvkd_fast.data.reading.labelled import with_mismatched
from tvkd_fast.data.reading.rewards import check_told_apart
from tvkd_fast.data.reading.row_pairs import by_row, share_prompt, truncate_row
from tvkd_fast.data.tokenization import PairTokenizer, TokenizedPair

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_ANOTHER = "another pair of the row was dropped"
"""A row of several pairs is judged by all of them, and would be easier without one."""


@dataclass(frozen=True)
class TokenReport:
    """Counts of pairs that tokenization kept, cut and dropped, and of the tokens that remain.

    `str()` of it is one paragraph to read.
    """

    source: str
    pairs: int
    max_length: int
    truncation: Literal["keep_start", "keep_end"]
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_bad: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    merged: int = 0
    """Pairs in which the tokenizer merges the prompt's end with the beginning of a response, which has the token."""
    sampled: int = 0
    """Pairs in the very tokens that they were sampled in."""
    written_before: int = 0
    """Plain pairs that a chat template had written already: their text holds special tokens or an end of its own."""

    def __str__(self) -> str:
        parts = [f"{self.pairs:,} pairs of {self.source}"]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {self.max_length:,} tokens ({self.truncation})")
        if self.dropped_overlong:
            parts.append(f"{self.dropped_overlong:,} dropped: too long even when cut to {self.max_length:,} tokens")
        parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(self.dropped_bad.items())]
        if self.merged:
            parts.append(f"{self.merged:,} whose prompt ends in a token that a response begins with, which has it")
        if self.sampled:
            parts.append(f"{self.sampled:,} in the tokens that they were sampled in")
        if self.written_before:
            parts.append(f"{self.written_before:,} with special tokens in their text, which are not written twice")
        if self.pairs:
            tokens = (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
            prompt, chosen, rejected = (f"{count / self.pairs:,.1f}" for count in tokens)
            # Scripts find the three figures by these words.
            parts.append(f"tokens a pair: {prompt} prompt, {chosen} chosen, {rejected} rejected")
        return "; ".join(parts)


class PairDataset(Sequence[TokenizedPair]):
    """Tokenized pairs in order, with the text that they were made of; a slice is a list of them."""

    def __init__(self, pairs: Iterable[TokenizedPair], report: TokenReport, texts: Iterable[Preference] = ()) -> None:
        self._pairs = list(pairs)
        self.report = report
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        return self._pairs[index]

    @cached_property
    def vocab_size_needed(self) -> int:
        """The largest token id plus one."""
        return 1 + max(max(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in self._pairs)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the pairs' token ids, of which of them ended, of labels, and of their order; of nothing
        else."""
        digest = hashlib.sha256(b"tvkd_fast pairs 1")
        for pair in self._pairs:
            digest.update(_in_bytes(pair))
        return digest.hexdigest()

    @cached_property
    def rewards_fingerprint(self) -> str:
        """SHA-256 (hex) of the pairs' rewards, in their order."""
        numbers = [[list(column) for column in pair.rewards] for pair in self._pairs]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()

    def with_rewards(self, rewards: Tensor, names: Sequence[str]) -> PairDataset:
        """The dataset with rewards [K, P, 2] of the chosen and the rejected responses, by models of these names.

        Raises BadPair for a pair whose responses no reward sets apart.
        """
        pairs = []
        for pair, columns in zip(self._pairs, rewards.transpose(0, 1).tolist(), strict=True):
            own = tuple((chosen, rejected) for chosen, rejected in columns)
            check_told_apart(own, names, pair.row)
            pairs.append(replace(pair, rewards=own))
        return PairDataset(pairs, self.report, self.texts)

    @cached_property
    def pair_digests(self) -> list[int]:
        """63 bits for each pair, of what `fingerprint` is made of: enough to find the first pair that differs."""
        return [int.from_bytes(hashlib.sha256(_in_bytes(pair)).digest()[:8]) >> 1 for pair in self._pairs]


def _in_bytes(pair: TokenizedPair) -> bytes:
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    head = [*map(len, parts), pair.chosen_ended, pair.rejected_ended]
    head += [] if pair.desirable is None else [pair.desirable]
    return np.array([*head, *(i for part in parts for i in part)], dtype="<i8").tobytes()


def build_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    max_length: int = 1024,
    truncation: Literal["keep_start", "keep_end"] = "keep_start",
    overlong: Literal["error", "drop"] = "error",
    bad_pairs: Literal["error", "drop"] = "error",
    chat_template: Literal["auto", "never"] = "auto",
    stop_ids: Collection[int] = (),
    batching: MicroBatching | None = None,
    progress: bool = False,
    read: ReadRow = to_preference,
) -> PairDataset:
    """Reads, tokenizes and truncates a preference set. Nothing is dropped without being counted in the report.

    Args:
        source: what `load_preferences` reads, or `"bundled:train"` and `"bundled:eval"`, made on the spot without any
            file; a number after a second colon says how many rows (`"bundled:train:200"`).
        tokenizer: a transformers tokenizer.
        split, subset, limit: as in `load_preferences`.
        max_length, truncation: as in `truncate_pair`.
        overlong: what to do with a pair that `truncate_pair` cannot cut, or that no packed row of `batching` can hold:
            "error" stops, "drop" leaves it out.
        bad_pairs: the same for a row that is no preference, or none once it is tokenized.
        chat_template, stop_ids: as in `PairTokenizer`.
        batching: how the pairs will be put into micro-batches, where that limits their length.
        progress: show a progress bar on stderr.
        read: as in `load_preferences`.

    Raises:
        BadPair: a row cannot be used and the setting for its kind is "error".
        ValueError: the source cannot be read, or no pair is left.
    """
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong is {overlong!r}: give 'error' or 'drop'")
    to_tokens = PairTokenizer(tokenizer, chat_template=chat_template, stop_ids=stop_ids)
    loaded = load_rows(source, split, subset, limit, bad_pairs, read)
    dropped = Counter(loaded.dropped)
    dropped_overlong = 0
    first_dropped: BadPair | None = None
    made: list[tuple[TokenizedPair, bool, Preference]] = []
    preferences = loaded.pairs
    if any(pair.desirable is not None for pair in preferences):
        preferences = with_mismatched(preferences)
    for texts in by_row(_with_progress(preferences, progress)):
        try:
            whole = share_prompt([to_tokens(text) for text in texts])
        except BadPair as bad:
            if bad_pairs == "error":
                raise bad.that_stops() from None
            first_dropped = first_dropped or bad
            dropped += Counter({bad.reason: 1, _ANOTHER: len(texts) - 1})
            continue
        try:
            kept = truncate_row(whole, max_length=max_length, truncation=truncation)
            if batching is not None:
                for pair, _ in kept:
                    batching.check_fits(pair)
        except BadPair as bad:
            if overlong == "error":
                raise
            first_dropped = first_dropped or bad
            dropped_overlong += 1
            dropped += Counter({_ANOTHER: len(texts) - 1})
            continue
        made += [(pair, was_cut, text) for (pair, was_cut), text in zip(kept, texts, strict=True)]
    pairs = [pair for pair, _, _ in made]
    if not pairs:
        raise ValueError(f"{source}: no pair is left of {len(loaded.pairs)}; the first one dropped was {first_dropped}")
    report = report_of(
        pairs,
        source=loaded.source,
        max_length=max_length,
        truncation=truncation,
        truncated=sum(was_cut for _, was_cut, _ in made),
        dropped_overlong=dropped_overlong,
        dropped_bad=dict(dropped),
    )
    _warn_of_templates(pairs, report)
    return PairDataset(pairs, report, [text for _, _, text in made])


def report_of(pairs: Sequence[TokenizedPair], **counts: Any) -> TokenReport:
    """Return a report of the pairs, with their token counts."""
    return TokenReport(
        pairs=len(pairs),
        prompt_tokens=sum(len(p.prompt_ids) for p in pairs),
        chosen_tokens=sum(len(p.chosen_ids) for p in pairs),
        rejected_tokens=sum(len(p.rejected_ids) for p in pairs),
        merged=sum(p.merged for p in pairs),
        sampled=sum(p.sampled for p in pairs),
        written_before=sum(p.written_before for p in pairs),
        **counts,
    )


def check_token_ids(dataset: Sequence[TokenizedPair], vocab_size: int) -> None:
    """Raises a ValueError that names the first row with a token id outside `range(vocab_size)`."""
    for pair in dataset:
        largest = max(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids)
        if largest >= vocab_size:
            raise ValueError(
                f"{pair.row} has token id {largest}, but the model's vocabulary ends at {vocab_size - 1}: the "
                "tokenizer does not belong to this model; give the model's own tokenizer"
            )


def check_positions(dataset: Sequence[TokenizedPair], positions: int, whose: str) -> None:
    """Raises a ValueError that names the first row with a sequence of more than `positions` tokens."""
    for pair in dataset:
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if length > positions:
            raise ValueError(
                f"{pair.row} has {length:,} tokens, and the {whose} was made for {positions:,} positions: have such "
                f"rows cut, --data.max_length {positions}, or choose a model that reads longer ones"
            )


def load_rows(
    source: str | Path,
    split: str,
    subset: str | None,
    limit: int | None,
    bad_pairs: Literal["error", "drop"],
    read: ReadRow,
) -> LoadedPreferences:
    """The rows of a source of `build_dataset`, not tokenized yet."""
    if not (isinstance(source, str) and source.startswith("bundled:")):
        return load_preferences(source, split=split, subset=subset, limit=limit, bad_pairs=bad_pairs, read=read)
    from tvkd_fast.synthetic.bundled import rewarded_rows

    matched = re.fullmatch(r"bundled:(train|eval)(?::([1-9]\d*))?", source)
    if matched is None:
        raise ValueError(
            f"{source!r} is no bundled set: use bundled:train or bundled:eval, with a count bundled:train:200"
        )
    count = int(matched[2]) if matched[2] else None
    rows = rewarded_rows("train" if matched[1] == "train" else "eval", count)[:limit]
    pairs = [pair for i, row in enumerate(rows) for pair in read_row(read, row, f"{source} row {i}")]
    return LoadedPreferences(pairs, {}, source)


def written_before(row: str, count: int = 1) -> str:
    """The warning about text that a chat template has written already; `row` is the first of `count` rows."""
    rows = f"{row}, and of {count:,} rows in all," if count > 1 else row
    return (
        f"the text of {rows} holds special tokens, as if a chat template had written it already: no second beginning "
        "or end is added. Give prompts and answers as messages to have the model's own template write them"
    )


def _warn_of_templates(pairs: Sequence[TokenizedPair], report: TokenReport) -> None:
    if report.written_before:
        first = next(pair for pair in pairs if pair.written_before)
        warnings.warn(written_before(first.row, report.written_before), stacklevel=3)


def _with_progress(items: list[Preference], progress: bool) -> Iterable[Preference]:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="tokenizing", unit="pair")
