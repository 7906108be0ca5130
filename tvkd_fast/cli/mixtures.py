"""A mixture of objectives in short: a list where an objective's name stands, in a recipe or on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tvkd_fast.objectives.mixtures.mixture import Mixture


def with_parts(arguments: Sequence[str]) -> list[str]:
    """The arguments with every mixture in short written out: the objective's name, and its parts among its settings.

    A file that has one becomes its text. Raises ValueError where such a file has settings beside the parts.
    """
    return list(_written_out(arguments))


def _written_out(arguments: Sequence[str]) -> Iterator[str]:
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--objective" and equals and _is_list(value):
            yield from (name, Mixture.name, "--loss.parts", value)
        elif before == "--objective" and _is_list(argument):
            yield from (Mixture.name, "--loss.parts", argument)
        else:
            yield _file(argument) if before == "--config" else argument
        before = argument


def _file(path: str) -> str:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # The parser says what is wrong with it.
        return path
    if not isinstance(found, dict) or not isinstance(found.get("objective"), list):
        return path
    if found.get("loss"):
        raise ValueError(
            f"{path} has a mixture for its objective and settings under loss: write each objective's settings into its "
            "part, {dpo: {beta: 0.1}, weight: 1}"
        )
    written: dict[str, Any] = found | {"objective": Mixture.name, "loss": {"parts": found["objective"]}}
    return yaml.safe_dump(written, allow_unicode=True)


def _is_list(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), list)
    except yaml.YAMLError:
        return False
