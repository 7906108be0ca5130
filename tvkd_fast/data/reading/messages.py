"""Messages of a conversation: reading them from a row, and looking at what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from tvkd_fast.data.pairs import BadPair, Message

SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields that give a turn without content something to learn from."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: object) -> TypeGuard[str]:
    """Return whether it is text in HH-RLHF's turns, from the first user's on to an assistant's."""
    return isinstance(text, str) and text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def read_dialogue(text: str) -> list[Message]:
    """The turns of HH-RLHF's text as messages, without the white space around them."""
    _, *parts = _HH_TURN.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def carries_nothing(value: object) -> bool:
    """Return whether a value that a row gives its template is null or empty."""
    return value is None or (isinstance(value, list | tuple | Mapping | str) and not value)


def read_messages(values: Sequence[Any], column: str, row: str) -> list[Message]:
    """A row's messages with every field that they carry; a null field is a missing one.

    transformers drops such fields before a template sees them, and parquet writes them where another row has the field.

    Raises:
        BadPair: an element is no message, or its role or content no string.
    """
    return [_message(value, column, row) for value in values]


def has_text(message: Message) -> bool:
    """Return whether there is anything in the turn to learn from, or to answer."""
    return bool(message.get("content", "").strip()) or any(message.get(name) for name in SPOKEN)


def text_of(message: Message) -> str:
    """The turn's content, and as JSON what else it carries: for people to read."""
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    parts = [message.get("content", "")] + ([json.dumps(more, ensure_ascii=False, default=str)] if more else [])
    return "\n".join(part for part in parts if part)


def unwritten(messages: Sequence[Message]) -> list[str]:
    """Names of the fields that only a chat template can write, sorted."""
    return sorted({name for message in messages for name in message if name not in ("role", "content")})


def strings(value: object) -> Iterator[str]:
    """Every string inside lists and mappings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a column holds a list, of messages it is to be hoped."""
    return isinstance(value, list | tuple)


def _message(value: object, column: str, row: str) -> Message:
    if isinstance(value, Mapping) and "from" in value and "value" in value and "role" not in value:
        remedy = "Rename its from and value to role and content, and the speakers to system, user and assistant"
        raise BadPair(row, "message without role and content", f"in {column}", remedy)
    if not isinstance(value, Mapping) or "role" not in value:
        raise BadPair(row, "message without role and content", f"in {column}")
    message = {str(name): field for name, field in value.items() if field is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise BadPair(row, "wrong type", f"{column} holds a message whose role or content is no string")
    if content is None and not has_text(message):
        raise BadPair(row, "message without role and content", f"in {column}")
    return message
