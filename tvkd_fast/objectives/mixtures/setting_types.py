"""Whether a setting, as YAML gives it, is of its field's type, and that type in words."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_IN_WORDS: dict[Any, str] = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def is_of(kind: Any, value: Any) -> bool:
    """Whether `value` is of the annotation `kind`; YAML's lists may stand for tuples, and whole numbers for others."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(is_of(one, value) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of(inner[0], one) for one in value)
    if origin is tuple:
        whole = isinstance(value, (list, tuple)) and len(value) == len(inner)
        return whole and all(map(is_of, inner, value))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind not in _IN_WORDS or isinstance(value, kind)


def in_words(kind: Any) -> str:
    """What `is_of` asks of a value, as it stands behind "must be"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if origin is list:
        return f"a list, each of it {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, {' and '.join(map(in_words, inner))}"
    return _IN_WORDS.get(kind, "a mapping")
