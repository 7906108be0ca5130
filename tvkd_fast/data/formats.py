"""Preference pairs as people store them, read into one shape.

A `Preference` is one prompt and two answers to it. `load_preferences` finds the rows (a file, a folder, the hub) and
`to_preference` recognises what a row means; what cannot be a preference is a `BadPair` that names its row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tvkd_fast.data.sources import records

Message = dict[str, str]
"""One turn of a conversation: `role` and `content`."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadPair(ValueError):  # noqa: N818  the row is what is bad
    """A row that is no preference between two answers to one prompt.

    Attributes:
        row: where the row came from.
        reason: the kind of fault, the same words for every row that has it, so that faults can be counted.
        detail: what is particular to this row, or "".
        remedy: what helps, where dropping the row is not all that does, or "".
    """

    def __init__(self, row: str, reason: str, detail: str = "", remedy: str = "") -> None:
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
class Preference:
    """One prompt, the preferred answer and the other one.

    Either all three are strings (plain) or all three are lists of messages (conversational), where the answers hold
    only what follows the prompt. `row` says where the pair came from: "train.jsonl row 17", counted from 0; `subset` to
    which part of a benchmark it belongs.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    row: str
    subset: str = ""

    def __post_init__(self) -> None:
        if len({isinstance(part, str) for part in (self.prompt, self.chosen, self.rejected)}) > 1:
            raise ValueError(f"{self.row}: prompt, chosen and rejected must be all strings or all lists of messages")


@dataclass(frozen=True)
class LoadedPreferences:
    """What `load_preferences` read: the pairs, and how many rows it dropped for which reason."""

    pairs: list[Preference]
    dropped: dict[str, int]
    source: str


ReadRow = Callable[[Mapping[str, Any], str], Preference]
"""A row's columns and where it came from, to a preference."""


def to_preference(record: Mapping[str, Any], row: str) -> Preference:
    """Recognises one row in any of the formats that preference sets come in.

    | format | `prompt` | `chosen`, `rejected` |
    | --- | --- | --- |
    | explicit | string | strings |
    | explicit, conversational | messages | messages, with or without the prompt's own in front |
    | explicit, mixed | string | messages: the answers alone, or whole conversations, which then speak for themselves |
    | implicit | absent or null | strings that begin alike |
    | implicit, conversational | absent or null | messages that begin alike |
    | HH-RLHF | absent or null | "\\n\\nHuman: … \\n\\nAssistant: …" dialogues, read as messages |

    An implicit plain prompt ends where the answers stop being alike, backed up to the border of a word; one space at
    the border belongs to the answers. Dialogue turns lose the whitespace around them. Other columns are ignored.

    Raises:
        BadPair: a column is missing or of the wrong type, a prompt or an answer is empty, the answers are equal, or
            the prompts differ.
    """
    if "chosen" not in record or "rejected" not in record:
        found = ", ".join(sorted(map(str, record))) or "none"
        wanted = "chosen, rejected and, unless they hold it, prompt"
        raise BadPair(row, "missing column", f"found: {found}; wanted: {wanted}", "Rename the file's columns")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _plain(prompt, chosen, rejected, row)
    elif _is_list(chosen) and _is_list(rejected):
        pair = _conversational(prompt, _messages(chosen, "chosen", row), _messages(rejected, "rejected", row), row)
    else:
        kinds = f"chosen is {type(chosen).__name__}, rejected is {type(rejected).__name__}"
        raise BadPair(row, "wrong type", f"{kinds}; both must be strings or both lists of messages")
    _check(pair)
    return pair


def load_preferences(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    bad_pairs: Literal["error", "drop"] = "error",
    read: ReadRow = to_preference,
) -> LoadedPreferences:
    """Reads preference pairs from a file, a folder or the hub.

    Args:
        source: a `.jsonl`, `.json` (either also `.gz`) or `.parquet` file; a folder of them, such as a copy of a
            dataset of the hub, with the splits that it has there (`data/splits.py`); a folder that
            `datasets.save_to_disk` wrote; or a dataset's name on the hub, with a data folder after a colon if it has
            several (`"Anthropic/hh-rlhf:harmless-base"`). A name that ends like a file is never asked of the hub.
        split: which split, where the source has several. A single file is one split, whatever it is called.
        subset: the hub's configuration name, of a local copy too, or a folder inside a local folder.
        limit: read the first `limit` rows only. Rows dropped as bad count among them.
        bad_pairs: "error" stops at the first row that is no preference, "drop" leaves it out and counts it.
        read: what makes a preference of a row.

    Raises:
        BadPair: a row is no preference and `bad_pairs` is "error".
        ValueError: the source cannot be read, is broken, or holds no pair.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give a positive number of rows, or None to read them all")
    if bad_pairs not in ("error", "drop"):
        raise ValueError(f"bad_pairs is {bad_pairs!r}: give 'error' or 'drop'")
    pairs: list[Preference] = []
    dropped: Counter[str] = Counter()
    first_bad: BadPair | None = None
    for record, row in islice(records(source, split, subset), limit):
        try:
            pairs.append(read(record, row))
        except BadPair as bad:
            if bad_pairs == "error":
                raise bad.that_stops() from None
            first_bad = first_bad or bad
            dropped[bad.reason] += 1
    if not pairs and first_bad is not None:
        raise ValueError(f"{source}: all {dropped.total()} rows were dropped; the first was {first_bad}")
    if not pairs:
        raise ValueError(f"{source} holds no rows: give a source with at least one preference pair")
    return LoadedPreferences(pairs, dict(dropped), str(source))


def _plain(prompt: object, chosen: str, rejected: str, row: str) -> Preference:
    if isinstance(prompt, str):
        return Preference(prompt, chosen, rejected, row)
    if prompt is not None:
        kind = type(prompt).__name__
        raise BadPair(row, "wrong type", f"prompt is {kind}; beside string answers it must be a string")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadPair(row, "empty response", name)
    if chosen == rejected:
        raise BadPair(row, "chosen equals rejected")
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        # A dialogue's last turn may be empty, so the turns before it are compared, not the longest common beginning.
        chosen_turns, rejected_turns = _dialogue(chosen), _dialogue(rejected)
        return _answers_to_one_prompt(chosen_turns, rejected_turns, row)
    border = _word_border(chosen, rejected)
    if not chosen[:border].strip():
        raise BadPair(row, "prompts differ", "no prompt column, and chosen and rejected do not begin alike")
    return Preference(chosen[:border], chosen[border:], rejected[border:], row)


def _conversational(prompt: object, chosen: list[Message], rejected: list[Message], row: str) -> Preference:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise BadPair(row, "empty response", name)
    if prompt is not None and not isinstance(prompt, str) and not _is_list(prompt):
        kind = type(prompt).__name__
        raise BadPair(row, "wrong type", f"prompt is {kind}; it must be a string or a list of messages")
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Preference([{"role": "user", "content": prompt}], chosen, rejected, row)
    if prompt is None or isinstance(prompt, str):
        return _answers_to_one_prompt(chosen, rejected, row)
    asked = _messages(prompt, "prompt", row)
    return Preference(asked, _after(asked, chosen), _after(asked, rejected), row)


def _after(asked: list[Message], answer: list[Message]) -> list[Message]:
    return answer[len(asked) :] if answer[: len(asked)] == asked else answer


def _answers_to_one_prompt(chosen: list[Message], rejected: list[Message], row: str) -> Preference:
    """Splits two whole conversations where they part, leaving each at least its last turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        detail = f"{len(chosen)} and {len(rejected)} turns, of which only the first {shared} are the same"
        raise BadPair(row, "prompts differ", detail)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:], row)


def _check(pair: Preference) -> None:
    if not _text(pair.prompt).strip():
        raise BadPair(pair.row, "empty prompt")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for message in answer:
            if not isinstance(message, str) and message["role"] != "assistant":
                raise BadPair(pair.row, "answer is not the assistant's", f"{name} holds a {message['role']} turn")
        if not _text(answer).strip():
            raise BadPair(pair.row, "empty response", name)
    if pair.chosen == pair.rejected:
        raise BadPair(pair.row, "chosen equals rejected")
    for name, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        try:
            _text(text).encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no tokenizer can read
            raise BadPair(pair.row, "text is not valid Unicode", name) from None


def _text(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "".join(message["content"] for message in content)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _messages(values: Any, column: str, row: str) -> list[Message]:
    messages = []
    for value in values:
        if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
            raise BadPair(row, "message without role and content", f"in {column}")
        role, content = value["role"], value["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadPair(row, "wrong type", f"{column} holds a message whose role or content is no string")
        if value.get("tool_calls"):
            raise BadPair(row, "tool calls are not supported", f"in {column}")
        messages.append({"role": role, "content": content})
    return messages


def _is_dialogue(text: str) -> bool:
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def _dialogue(text: str) -> list[Message]:
    _, *parts = _HH_TURN.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def _word_border(chosen: str, rejected: str) -> int:
    """The largest index at which both texts may be split alike, no word cut and neither side's answer empty."""
    shorter = min(len(chosen.rstrip()), len(rejected.rstrip()))
    border = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    while border and not chosen[border - 1].isspace() and not (chosen[border].isspace() and rejected[border].isspace()):
        border -= 1
    return border - 1 if border and chosen[border - 1] == " " else border
