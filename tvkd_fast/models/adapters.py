"""The names that peft gives to adapters, and to the layers that it puts them beside."""

from __future__ import annotations

import re

ADAPTER = "tvkd_run"
"""Name of a run's own adapter. One that a model came with has another name, and is part of that model."""
_OF_ADAPTER = re.compile(rf".*\.lora_[AB]\.{ADAPTER}\.weight")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to the adapter that the run itself has added."""
    return _OF_ADAPTER.fullmatch(name) is not None


def without_adapter(name: str) -> str:
    """A parameter's name before an adapter was put beside its layer; a layer of two weights has two around it."""
    return re.sub(r"\.(base_layer\.)+", ".", name)
