"""The prompts that are to be answered, in the tokens of each model that answers."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvkd_fast.data import BadPair, PairDataset, TokenizedPair
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.data.dataset import load_rows, report_of
from tvkd_fast.data.reading.formats import Preference, to_prompt
from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.rollout.samples import SamplePrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Prompts in order, as text and in the tokens of each model."""

    texts: list[Preference]
    of_model: list[list[SamplePrompt]]
    left_out: Counter[str]
    again: int
    """Prompts that were asked before; their samples are further ones."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all token ids, and of their order."""
        ids = [[prompt.ids for prompt in of_one] for of_one in self.of_model]
        return hashlib.sha256(repr(ids).encode()).hexdigest()

    def report(self, source: str, done: int) -> str:
        parts = [f"{len(self.texts):,} prompts of {source}"]
        if done:
            parts.append(f"the first {done:,} are sampled already")
        if self.again:
            parts.append(f"{self.again:,} of them again, whose samples are further ones")
        parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(self.left_out.items())]
        return "; ".join(parts)


def load_prompts(config: DataConfig, n: int, models: Sequence[tuple[PairTokenizer, int]]) -> Prompts:
    """The prompts of `config.train`, one of each row, for models that sample `n` responses to each; of each model its
    tokenizer, and the most tokens of prompt and response.

    Raises:
        BadPair: a row has no prompt that can be read, or one that leaves a model no room for a response, and the
            setting for its kind is "error".
        ValueError: the source cannot be read, or no prompt is left.
    """
    if config.train is None:
        raise ValueError(
            "no prompts: set --data to a hub name, a .jsonl(.gz) or .parquet file, a `datasets` folder, or "
            "bundled:train"
        )
    loaded = load_rows(config.train, config.train_split, config.subset, config.train_limit, config.bad_pairs, to_prompt)
    texts: list[Preference] = []
    of_model: list[list[SamplePrompt]] = [[] for _ in models]
    left_out, asked = Counter(loaded.dropped), Counter[tuple[int, ...]]()
    first_dropped: BadPair | None = None
    for text in loaded.pairs:
        try:
            ids = [to_tokens.prompt_of(text) for to_tokens, _ in models]
            if not all(ids):
                raise BadPair(text.row, "prompt without tokens")
        except BadPair as bad:
            if config.bad_pairs == "error":
                raise bad.that_stops() from None
            first_dropped = first_dropped or bad
            left_out[bad.reason] += 1
            continue
        try:
            for own, (_, max_length) in zip(ids, models, strict=True):
                _check_room(text.row, len(own), max_length)
        except BadPair as bad:
            if config.overlong == "error":
                raise
            first_dropped = first_dropped or bad
            left_out[bad.reason] += 1
            continue
        texts.append(text)
        for prompts, own in zip(of_model, ids, strict=True):
            prompts.append(SamplePrompt(own, text.row, n * asked[tuple(ids[0])]))
        asked[tuple(ids[0])] += 1
    if not texts:
        raise ValueError(
            f"{config.train}: no prompt is left of {len(loaded.pairs)}; the first one dropped was {first_dropped}"
        )
    return Prompts(texts, of_model, left_out, sum(asked.values()) - len(asked))


def prompt_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int], max_length: int, verbose: bool
) -> PairDataset:
    """The prompts of `config.train` as a dataset without responses, for a run that samples them. Raises as
    `load_prompts`; `verbose` prints on stderr what was dropped."""
    to_tokens = PairTokenizer(tokenizer, chat_template=config.chat_template, stop_ids=stop_ids)
    found = load_prompts(config, 1, [(to_tokens, max_length)])
    pairs = [TokenizedPair(prompt.ids, [], [], False, False, prompt.row) for prompt in found.of_model[0]]
    if verbose:
        print(f"train: {found.report(str(config.train), 0)}", file=sys.stderr)
    report = report_of(
        pairs,
        source=str(config.train),
        max_length=max_length,
        truncation=config.truncation,
        dropped_bad=dict(found.left_out),
    )
    return PairDataset(pairs, report)


def _check_room(row: str, length: int, most: int) -> None:
    if length >= most:
        remedy = "Raise --data.max_length where the model has the positions, or leave such prompts out with "
        remedy += "--data.overlong drop"
        raise BadPair(
            row, "the prompt leaves no room for a response", f"{length:,} tokens, of {most:,} with a response", remedy
        )
