"""Whether head and embedding are one weight: by the config, and by the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096
"""Rows of two weights that are compared at once."""


def config_as_tied(model: PreTrainedModel) -> None:
    """Have the config state that head and embedding are two weights, where they are.

    A folder may hold both under a config that ties them. transformers loads such a model untied and leaves its config
    as it is, so that a model made of that config, pruned or merged, would lose one of them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is head.weight:
        return
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def tied_names(model: nn.Module) -> tuple[str, str] | None:
    """The names of the embedding's and of the head's weight, where those are one; None where they are two."""
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[operator]
    if ends[0] is not ends[1]:
        return None
    first, *rest = [name for name, x in model.named_parameters(remove_duplicate=False) if x is ends[0]]
    return (first, rest[0]) if rest else None


def are_equal(files: Mapping[str, Path], names: tuple[str, str], opened: Callable[[Path], Any]) -> bool:
    """Return whether two tensors of safetensors files hold the same numbers."""
    one, other = (opened(files[name]).get_slice(name) for name in names)
    if one.get_shape() != other.get_shape():
        return False
    starts = range(0, one.get_shape()[0], _ROWS)
    return all(torch.equal(one[start : start + _ROWS], other[start : start + _ROWS]) for start in starts)
