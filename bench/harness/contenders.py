"""A contender: a name, what runs, and what must be installed for it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

PROGRAMS = ("g++",)
"""The programs that a contender may need; all else is a module, of which a program alone is no sign."""
Run = TypeVar("Run")


@dataclass(frozen=True, kw_only=True)
class Contender(Generic[Run]):
    """`run` imports what it needs when it is called, so that a table of contenders imports none of them."""

    run: Run
    needs: str | None = None
    """A module or a program, without which it takes no part."""
    by_name: bool = False
    """Takes part only where its whole name is asked for."""

    @property
    def refusal(self) -> str | None:
        """Why it takes no part on this machine; None where it does."""
        if self.needs is None:
            return None
        if self.needs in PROGRAMS:
            return None if shutil.which(self.needs) else f"not installed: {self.needs}"
        if importlib.util.find_spec(self.needs) is not None:
            return None
        return f"not installed: {self.needs} (pip install 'tvkd_fast[bench]' brings the peers)"


C = TypeVar("C", bound=Contender[Any])


def selected(contenders: Mapping[str, C], words: Iterable[str] | None) -> dict[str, C]:
    """The contenders of these words: a whole name, "tvkd_fast" apart, or a part of names; all where there are none."""
    names = {name.removeprefix("tvkd_fast, "): name for name in contenders}
    chosen = set()
    for word in words or [""]:
        parts = {name for name, x in contenders.items() if word in name and not x.by_name}
        chosen |= {names[word]} if word in names else parts
    return {name: x for name, x in contenders.items() if name in chosen}


def reason(refusal: Exception) -> str:
    """The first line of what a contender raised."""
    if isinstance(refusal, ModuleNotFoundError):
        return f"not installed: {refusal}"
    lines = str(refusal).strip().splitlines()
    return f"{type(refusal).__name__}: {lines[0] if lines else 'no message'}"[:300]
