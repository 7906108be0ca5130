"""What a teacher may be asked for, by the names of `tvkd score --keep`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

VALUES: tuple[str, ...] = ("values",)
TOP_K, SAMPLED = "topk:50", "sampled:50"
"""What a teacher that runs beside the policy is asked for where a part of its distribution is wanted."""

TOKEN_KINDS = ("states", "topk", "sampled")
"""Kinds that are kept per response token: the distribution whole, its k largest probabilities, k samples of it."""
_LARGEST = {"topk": 4096, "sampled": 255}


def kind_of(name: str) -> str:
    """The kind of "topk:50", without its number."""
    return name.partition(":")[0]


def count_of(name: str) -> int:
    """The k of "topk:k" or "sampled:k"."""
    return int(name.partition(":")[2])


def token_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are kept per token, in the order of `TOKEN_KINDS`."""
    return tuple(sorted((x for x in names if kind_of(x) in TOKEN_KINDS), key=lambda x: TOKEN_KINDS.index(kind_of(x))))


def check_kinds(names: Collection[str]) -> None:
    """Raise ValueError where one of them is no kind, or a kind comes twice."""
    for name in names:
        kind, colon, count = name.partition(":")
        plain = kind in ("values", "logps", "states") and not colon
        if not plain and not (count.isdecimal() and 1 <= int(count) <= _LARGEST.get(kind, 0)):
            counted = " or ".join(f"{x}:K with K from 1 to {most}" for x, most in _LARGEST.items())
            raise ValueError(f"keep names {name!r}, which is none of values, logps, states, {counted}")
    kinds = [kind_of(name) for name in names]
    twice = [name for name in names if kinds.count(kind_of(name)) > 1]
    if twice:
        raise ValueError(f"keep names {' and '.join(twice)}: a folder holds one of a kind")
