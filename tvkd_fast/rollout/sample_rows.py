"""Rows made of samples: responses, or pairs of them, as `tvkd train` and `tvkd score` read them.

A response without text, and a pair whose answers read alike, are rows of nothing: they are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tvkd_fast.data.pairs import Preference
from tvkd_fast.data.reading.sampled import (
    ANSWERS,
    COMPLETION,
    PROMPT,
    TOKENIZER,
    ended_column,
    ids_column,
    logps_column,
)
from tvkd_fast.data.tokenizer_fingerprint import fingerprint_tokenizer
from tvkd_fast.rollout.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE, NUMBER = "source", "sample"
"""Columns of the row that a prompt came from, and of the sample's number."""
_DIGITS = 6
"""Decimals of a log-probability in nats: finer than float32 sampling is between batches."""


@dataclass
class RowMaker:
    """Makes rows of one tokenizer's samples, and counts what is left out.

    Args:
        tokenizer: the policy's.
        keep_unfinished: whether responses that never stopped become rows, as ones that were cut.
        keep_ids: whether rows hold token ids: not where a pair's responses are of two tokenizers.
    """

    tokenizer: PreTrainedTokenizerBase
    keep_unfinished: bool = True
    keep_ids: bool = True
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._fingerprint = fingerprint_tokenizer(self.tokenizer)

    def responses(self, text: Preference, prompt: Sequence[int], samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """A row for each sample that can be learned from, numbered as they were sampled."""
        rows = []
        for i, sample in enumerate(samples):
            written = self.text_of(sample)
            if written is not None:
                answers = {COMPLETION: (sample, written)}
                rows.append(self._row(text, prompt, answers) | {NUMBER: i})
        return rows

    def pairs(
        self,
        text: Preference,
        prompt: Sequence[int],
        samples: Sequence[tuple[Sample, Sample]],
        *,
        rejected_by: PreTrainedTokenizerBase | None = None,
    ) -> list[dict[str, Any]]:
        """A row for each (chosen, rejected); `rejected_by` is the tokenizer of the rejected, where it is another."""
        rows = []
        for i, (chosen, rejected) in enumerate(samples):
            written = self.text_of(chosen), self.text_of(rejected, rejected_by)
            if written[0] is None or written[1] is None:
                self.left_out["pair with such a response"] += 1
            elif written[0] == written[1]:
                self.left_out["pair of equal responses"] += 1
            else:
                answers = dict(zip(ANSWERS, zip((chosen, rejected), written, strict=True), strict=True))
                rows.append(self._row(text, prompt, answers) | {NUMBER: i})
        return rows

    def text_of(self, sample: Sample, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
        """The response's text without its end; None, and counted, where it is left out."""
        if not sample.ended and not self.keep_unfinished:
            self.left_out["never stopped"] += 1
            return None
        tokenizer = tokenizer or self.tokenizer
        written = str(tokenizer.decode(sample.ids[: len(sample.ids) - sample.ended], skip_special_tokens=True))
        if not written.strip():
            self.left_out["empty"] += 1
            return None
        return written

    def _row(
        self, text: Preference, prompt: Sequence[int], answers: Mapping[str, tuple[Sample, Any]]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {PROMPT: text.prompt}
        for name, (_, written) in answers.items():
            turn = [{"role": "assistant", "content": written}]
            row[name] = written if isinstance(text.prompt, str) else turn
        given = dict(text.template)
        row |= {name: given.pop(name) for name in ("tools", "documents") if name in given}
        if given:
            row["chat_template_kwargs"] = given
        row[SOURCE] = text.row
        if self.keep_ids:
            row |= {TOKENIZER: self._fingerprint, ids_column(PROMPT): list(prompt)}
        for name, (sample, _) in answers.items():
            if self.keep_ids:
                row |= {ids_column(name): sample.ids, ended_column(name): sample.ended}
            row[logps_column(name)] = [round(x, _DIGITS) for x in sample.logps]
            if sample.law_logps is not None:
                row[f"{name}_law_logps"] = [round(x, _DIGITS) for x in sample.law_logps]
        return row


def best_and_worst(samples: Sequence[Sample], rewards: Sequence[float]) -> tuple[Sample, Sample] | None:
    """The samples of the highest and the lowest reward, the first of equal ones; None where all rewards are equal.

    ValueError where a reward is NaN.
    """
    if any(reward != reward for reward in rewards):
        raise ValueError("a reward is NaN: nothing is better or worse than it; mend the rule, or leave the sample out")
    if len(set(rewards)) < 2:
        return None
    return samples[list(rewards).index(max(rewards))], samples[list(rewards).index(min(rewards))]
