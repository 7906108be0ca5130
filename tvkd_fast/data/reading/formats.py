"""Preference pairs as people store them, read into one shape.

`load_preferences` finds the rows (a file, a folder, the hub) and `to_preference` recognises what a row means; what
cannot be a preference is a `BadPair` that names its row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tvkd_fast.data.pairs import BadPair, Message, Preference
from tvkd_fast.data.reading.columns import Named, named
from tvkd_fast.data.reading.messages import (
    carries_nothing,
    has_text,
    is_dialogue,
    is_list,
    read_dialogue,
    read_messages,
    strings,
)
from tvkd_fast.data.reading.sampled import (
    ANSWERS,
    COMPLETION,
    is_single,
    sampled_ids,
    with_stand_ins,
    without_stand_in,
)
from tvkd_fast.data.reading.sources import records

__all__ = [
    "BadPair",
    "LoadedPreferences",
    "Message",
    "Preference",
    "ReadRow",
    "load_preferences",
    "read_row",
    "to_preference",
    "to_prompt",
    "to_response",
]

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


@dataclass(frozen=True)
class LoadedPreferences:
    """The result of `load_preferences`: the pairs, and how many rows it dropped for which reason."""

    pairs: list[Preference]
    dropped: dict[str, int]
    source: str


ReadRow = Callable[[Mapping[str, Any], str], Preference | list[Preference]]
"""A row's columns and where it came from, to a preference, or to several that share the row's name."""


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
    the border belongs to the answers. Dialogue turns lose the whitespace around them. Columns of other names are read
    by the rules of `columns.py`. A `system` column is the conversation's first turn, and makes a plain row one,
    unless its prompt holds that text already. Messages keep all that they carry, and `tools`, `documents` and
    `chat_template_kwargs` go to the chat template with them. Columns that only describe the row are left alone.

    Raises:
        BadPair: a column is missing or of the wrong type, is ambiguous or has no place in the pair; a
            prompt or an answer is empty, the answers are equal, or the prompts differ.
    """
    given = named(record, row)
    for name, value in (("prompt", given.prompt), ("chosen", given.chosen), ("rejected", given.rejected)):
        if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
            raise BadPair(row, "messages written as text", name, "Parse the column, and write lists of messages")
    chosen, rejected = given.chosen, given.rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _plain(given, row)
    elif _are_texts(chosen) and _are_texts(rejected):
        remedy = "Evaluate it with --format rewardbench, or write a row for every two answers"
        raise BadPair(row, "several answers in one column", "", remedy)
    elif is_list(chosen) and is_list(rejected):
        turns = read_messages(chosen, "chosen", row), read_messages(rejected, "rejected", row)
        pair = _conversational(given.prompt, *turns, row)
    else:
        kinds = f"chosen is {type(chosen).__name__}, rejected is {type(rejected).__name__}"
        raise BadPair(row, "wrong type", f"{kinds}; both must be strings or both lists of messages")
    ids = sampled_ids(record, ANSWERS, row)
    pair = replace(_with_system(pair, given), template=given.template, unread=given.unread, sampled=ids)
    _check(pair)
    return pair


def to_response(record: Mapping[str, Any], row: str) -> Preference:
    """A row of one response (`prompt`, `completion`), or the preference that another row is, for whoever reads chosen
    responses alone."""
    if not is_single(record):
        return to_preference(record, row)
    pair = to_preference(with_stand_ins(record, row), row)
    return without_stand_in(pair, sampled_ids(record, (COMPLETION,), row))


def to_prompt(record: Mapping[str, Any], row: str) -> Preference:
    """The same of a row that may have no response at all: of which the prompt alone is read."""
    try:
        return to_response(record, row)
    except BadPair as bad:
        if bad.reason != "missing column" or record.get("prompt") is None:
            raise
    return without_stand_in(to_preference(with_stand_ins(record, row), row), None)


def read_row(read: ReadRow, record: Mapping[str, Any], row: str) -> list[Preference]:
    """Returns what `read` makes of a row, one pair or several. Raises BadPair where it makes none."""
    try:
        found = read(record, row)
    except RecursionError:
        raise BadPair(row, "nested too deeply to be read") from None
    return found if isinstance(found, list) else [found]


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
            dataset of the hub, with the splits that it has there (`data/reading/splits.py`); a folder that
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
            pairs += read_row(read, record, row)
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


def _plain(given: Named, row: str) -> Preference:
    prompt, chosen, rejected = given.prompt, given.chosen, given.rejected
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
    if is_dialogue(chosen) and is_dialogue(rejected):
        # A dialogue's last turn may be empty, so the turns before it are compared, not the longest common beginning.
        chosen_turns, rejected_turns = read_dialogue(chosen), read_dialogue(rejected)
        return _answers_to_one_prompt(chosen_turns, rejected_turns, row)
    border = _word_border(chosen, rejected)
    if not chosen[:border].strip():
        raise BadPair(row, "prompts differ", "no prompt column, and chosen and rejected do not begin alike")
    return Preference(chosen[:border], chosen[border:], rejected[border:], row)


def _conversational(prompt: object, chosen: list[Message], rejected: list[Message], row: str) -> Preference:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise BadPair(row, "empty response", name)
    if prompt is not None and not isinstance(prompt, str) and not is_list(prompt):
        kind = type(prompt).__name__
        raise BadPair(row, "wrong type", f"prompt is {kind}; it must be a string or a list of messages")
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Preference(_as_user_turn(prompt, row), chosen, rejected, row, from_text=True)
    if prompt is None or isinstance(prompt, str):
        return _answers_to_one_prompt(chosen, rejected, row)
    asked = read_messages(prompt, "prompt", row)
    return Preference(asked, _after(asked, chosen), _after(asked, rejected), row)


def _after(asked: list[Message], answer: list[Message]) -> list[Message]:
    return answer[len(asked) :] if answer[: len(asked)] == asked else answer


def _answers_to_one_prompt(chosen: list[Message], rejected: list[Message], row: str) -> Preference:
    """Splits two whole conversations where they part, leaving each at least its last turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 and len(chosen) == len(rejected) == 1:
        raise BadPair(row, "empty prompt", "no column is the prompt, and the conversations begin with the answer")
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        detail = f"{len(chosen)} and {len(rejected)} turns, of which only the first {shared} are the same"
        raise BadPair(row, "prompts differ", detail)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:], row)


def _as_user_turn(prompt: str, row: str) -> list[Message]:
    """A text as the one turn of a conversation. Raises BadPair where it is written as turns already."""
    if is_dialogue(prompt):
        remedy = "Write the prompt as messages, or prompt, chosen and rejected as text without a system column"
        raise BadPair(row, "the prompt's turns are text, and would be written as one turn", "Human: …", remedy)
    return [{"role": "user", "content": prompt}]


def _with_system(pair: Preference, given: Named) -> Preference:
    """The pair with its system column as first turn; a plain one becomes a conversation for it."""
    text = given.system
    if text is None:
        return pair
    if isinstance(pair.prompt, str):
        if (given.prompt is None and not text) or (text and _stands_in(pair.prompt, text)):
            return pair
        if given.prompt is None:
            remedy = "Make a column prompt of it, or begin both answers with the system turn's text as a line"
            raise BadPair(pair.row, "a system turn has no place before answers that hold their prompt", "", remedy)
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (pair.chosen, pair.rejected))
        pair = Preference(_as_user_turn(pair.prompt, pair.row), chosen, rejected, pair.row, from_text=True)
    if not text:
        return pair
    first = next(iter(pair.prompt), None)
    if not isinstance(first, dict) or first["role"] != "system":
        return replace(pair, prompt=[{"role": "system", "content": text}, *pair.prompt])
    if first.get("content") != text:
        raise BadPair(pair.row, "two system turns", "a column and the prompt's first", "Keep one of them")
    return pair


def _stands_in(prompt: str, system: str) -> bool:
    """Return whether the text is a paragraph of the prompt, or a turn that a template has written."""
    return re.search(rf"(^|\n)[ \t]*{re.escape(system.strip())}[ \t]*($|\n|<)", prompt) is not None


def _check(pair: Preference) -> None:
    if not _has_text(pair.prompt):
        raise BadPair(pair.row, "empty prompt")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for message in answer:
            if not isinstance(message, str) and message["role"] != "assistant":
                raise BadPair(pair.row, "answer is not the assistant's", f"{name} holds a {message['role']} turn")
        if not _has_text(answer):
            raise BadPair(pair.row, "empty response", name)
    if pair.chosen == pair.rejected:
        raise BadPair(pair.row, "chosen equals rejected")
    parts = ("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)
    for name, part in (*parts, *pair.template.items()):
        try:
            "".join(strings(part)).encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no tokenizer can read
            raise BadPair(pair.row, "text is not valid Unicode", name) from None
    if isinstance(pair.prompt, str):
        homeless = [name for name, value in pair.template.items() if not carries_nothing(value)]
        if homeless:
            remedy = "Write prompt, chosen and rejected as messages, or remove the column"
            raise BadPair(
                pair.row, "plain text has no place for what a chat template is given", ", ".join(homeless), remedy
            )


def _has_text(part: str | list[Message]) -> bool:
    return bool(part.strip()) if isinstance(part, str) else any(has_text(message) for message in part)


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or (is_list(value) and bool(value) and all(isinstance(x, str) for x in value))


def _word_border(chosen: str, rejected: str) -> int:
    """The largest index at which both texts may be split alike, no word cut and neither side's answer empty."""
    shorter = min(len(chosen.rstrip()), len(rejected.rstrip()))
    border = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    while border and not chosen[border - 1].isspace() and not (chosen[border].isspace() and rejected[border].isspace()):
        border -= 1
    return border - 1 if border and chosen[border - 1] == " " else border
