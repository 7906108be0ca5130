"""A preference pair as text, and the error for a row that is not one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation: `role`, `content` and whatever else the turn carries for the chat template."""


class BadPair(ValueError):  # noqa: N818  the row is what is bad
    """A row that is no preference between two answers to one prompt. Its text is one line.

    Attributes:
        row: where the row came from.
        reason: the kind of fault, the same words for every row that has it, so that faults can be counted.
        detail: what is particular to this row, or "".
        remedy: what helps, where dropping the row is not all that does, or "".
    """

    def __init__(self, row: str, reason: str, detail: str = "", remedy: str = "") -> None:
        # The text of a template's or a file's error may be many lines long.
        detail = " ".join(detail.split())
        super().__init__(row, reason, detail, remedy)
        self.row, self.reason, self.detail, self.remedy = row, reason, detail, remedy

    def that_stops(self) -> BadPair:
        """The same, with the remedy that every bad row has where it has none of its own."""
        remedy = self.remedy or "Mend the row, or leave such rows out with --data.bad_pairs drop"
        return BadPair(self.row, self.reason, self.detail, remedy)

    def __str__(self) -> str:
        text = f"{self.row}: {self.reason}"
        if self.detail:
            text += f" ({self.detail})"
        return f"{text}. {self.remedy}" if self.remedy else text


@dataclass(frozen=True)
class SampledIds:
    """The token ids in which a row's responses were sampled, which are not made anew of its text."""

    tokenizer: str
    """`fingerprint_tokenizer` of the tokenizer whose ids they are."""
    prompt: list[int]
    responses: tuple[list[int], ...]
    """Chosen and rejected, or the one response."""
    ended: tuple[bool, ...]
    """Whether each ends with a stop id."""


@dataclass(frozen=True)
class Preference:
    """One prompt, the preferred answer and the other one.

    Either all three are strings (plain) or all three are lists of messages (conversational), where the answers hold
    only what follows the prompt. `row` names the pair's source: "train.jsonl row 17", counted from 0; `subset` to
    which part of a benchmark it belongs. Pairs of one row, as RewardBench 2 has them, share its name.

    `template` is what the row gives the chat template beside the messages: `tools`, `documents` and its
    `chat_template_kwargs`. `unread` names the row's other columns, so that a template that asks for one is noticed.
    `from_text` says that the row's prompt is a text, which was made the user's turn. `rewards` are the numbers that the
    row has for the chosen and the rejected answer, two per reward that was asked for. `single` says that there is one
    response, which is compared with none; `rejected` is empty then. `desirable` is the label of a
    row of one response; where it is given, `rejected` is a response to another prompt.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    row: str
    subset: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)
    from_text: bool = field(default=False, compare=False)
    rewards: tuple[tuple[float, float], ...] = ()
    single: bool = False
    sampled: SampledIds | None = field(default=None, compare=False)
    desirable: bool | None = None

    def __post_init__(self) -> None:
        if len({isinstance(part, str) for part in (self.prompt, self.chosen, self.rejected)}) > 1:
            raise ValueError(f"{self.row}: prompt, chosen and rejected must be all strings or all lists of messages")
