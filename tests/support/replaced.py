"""Functions of the package, replaced wherever a module has imported them by name."""

import sys
from collections.abc import Callable
from typing import Any

import pytest


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, **stands_for: Callable[..., Any]) -> None:
    """Let each function stand for the package's of that name, in all modules that are imported by now."""
    for name, module in list(sys.modules.items()):
        for attribute in stands_for.keys() & vars(module).keys() if name.startswith("tvkd_fast.") else ():
            if callable(vars(module)[attribute]):
                monkeypatch.setattr(module, attribute, stands_for[attribute])
