"""A model's architecture without its weights, for planning."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.models.adapter_folder import resize_for_adapter
from tvkd_fast.models.load import adapter_of, base_name, locate, unreadable
from tvkd_fast.models.lora import adapter_sizes
from tvkd_fast.models.prune import config_of_layers, kept_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B-Instruct": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Llama shapes of models that recipes name and whose repositories are gated: the figures of their published configs."""


@dataclass(frozen=True)
class ModelShape:
    """The figures of a model that a plan needs."""

    name: str
    parameters: int
    hidden: int
    layers: int
    vocab: int
    positions: int
    """The longest sequence that it was made for."""
    tied: bool
    """Whether head and embedding are one weight."""
    adapted: tuple[tuple[str, int], ...]
    """Each layer that can have an adapter: its name, and the parameters of one of rank 1 (rank r has r times as many).
    """
    cached: int
    """Numbers that a cache of keys and values holds of a token, as if no layer had a window."""

    @property
    def head(self) -> int:
        """Parameters of the head's weight."""
        return self.vocab * self.hidden

    @property
    def root(self) -> int:
        """Parameters of head and embedding."""
        return self.head if self.tied else 2 * self.head

    @property
    def blocks(self) -> int:
        """Parameters of neither."""
        return self.parameters - self.root


def model_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's config, published or read; ValueError with the remedy where it cannot be."""
    from transformers import LlamaConfig

    if name in PUBLISHED:
        return LlamaConfig(**PUBLISHED[name])
    return read_config(name, trust_remote_code=trust_remote_code)


def read_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's own config; ValueError with the remedy where it cannot be read."""
    from transformers import AutoConfig

    base, source = base_name(name), locate(name)
    if base != name:
        return model_config(base, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options())
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("config", name, error)) from error


def empty_of_family(name: str, *, layers: int | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of the config of `name`, pruned to `layers` where given, on the meta device: it has no weights."""
    from transformers import AutoModelForCausalLM

    config = model_config(name, trust_remote_code=trust_remote_code)
    if layers is not None:
        config = config_of_layers(config, kept_layers(config.num_hidden_layers, layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if name not in PUBLISHED:
        _resize(model, name)
    return model


def _resize(model: PreTrainedModel, name: str) -> None:
    """Give the model of an adapter's base the vocabulary that it has once the adapter is merged."""
    source = locate(name)
    adapter = adapter_of(source)
    if adapter is None:
        return
    if adapter.base != source.name:
        _resize(model, adapter.base)
    resize_for_adapter(model, adapter)


def model_shape(name: str, *, layers: int | None = None, trust_remote_code: bool = False) -> ModelShape:
    """The shape of `name`, pruned to `layers` where given; parameters are counted on the meta device."""
    model = empty_of_family(name, layers=layers, trust_remote_code=trust_remote_code)
    return ModelShape(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=model.get_output_embeddings().weight.shape[1],
        layers=model.config.get_text_config().num_hidden_layers,
        vocab=model.get_output_embeddings().weight.shape[0],
        positions=longest_sequence(model.config),
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        adapted=adapter_sizes(model),
        cached=_cached(model.config.get_text_config()),
    )


def _cached(config: Any) -> int:
    """Keys and values of a token in all layers; 0 for a family without attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width


def longest_sequence(config: Any) -> int:
    """Positions that a model of this config was made for; a model that numbers none has no end."""
    config = config.get_text_config()
    own: int | None = getattr(config, "max_position_embeddings", None)
    if not own:
        return sys.maxsize
    return max([own, *(_stretched(own, rope) for rope in _ropes(getattr(config, "rope_parameters", None)))])


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Return the rope settings: one for all layers, or one per kind of layer."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _stretched(own: int, rope: dict[str, Any]) -> int:
    """Positions under a scaling that was written into a config beside the positions it was trained on."""
    factor = rope.get("factor") or 1.0
    return int(factor * (rope.get("original_max_position_embeddings") or own))
