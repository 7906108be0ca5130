"""The names that peft gives to adapters, and to the layers that it puts them beside."""

from __future__ import annotations

import re

ADAPTER = "default"
_OF_ADAPTER = re.compile(rf".*\.lora_[AB]\.{ADAPTER}\.weight")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _OF_ADAPTER.fullmatch(name) is not None


def without_adapter(name: str) -> str:
    """A parameter's name before an adapter was put beside its layer."""
    return name.replace(".base_layer.", ".")
