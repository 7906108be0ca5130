"""The ids at which a model ends what it generates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvkd_fast.models.load import base_name, locate
from tvkd_fast.models.shapes import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stop_ids_of(model: PreTrainedModel) -> frozenset[int]:
    """Every `eos_token_id` of the model's generation config."""
    return _ids(getattr(model, "generation_config", None))


def load_stop_ids(name: str | Path, *, trust_remote_code: bool = False) -> frozenset[int]:
    """The same ids of the model that `load_model` finds by this name, without weights; an adapter has its base's."""
    from transformers import GenerationConfig

    base = base_name(name)
    source = locate(base)
    if source.gguf_file is not None:
        # Its file has one end, the tokenizer's.
        return frozenset()
    try:
        return _ids(GenerationConfig.from_pretrained(source.name))
    except OSError:
        # It has none of its own; transformers then makes one of the model's config.
        return _ids(read_config(base, trust_remote_code=trust_remote_code))


def _ids(config: Any) -> frozenset[int]:
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(int(token) for token in (found if isinstance(found, Iterable) else [found]))
