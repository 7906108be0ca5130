"""Students out of teachers, and dropout off."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tvkd_fast.models.lent import dropouts, same_draws
from tvkd_fast.models.load import saved_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_layers(num_layers: int, keep: int) -> list[int]:
    """`keep` of `num_layers` indices, evenly spaced, the first and the last among them."""
    if not 1 <= keep <= num_layers:
        raise ValueError(f"cannot keep {keep} of {num_layers} layers: choose between 1 and {num_layers}")
    if keep == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep - 1)) for i in range(keep)]


def prune_layers(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """A new, shallower model of the same family that keeps evenly spaced layers of `model`, with weights of its own.

    Works for families whose blocks are one list and whose parameters are named by it (`model.layers.7.…`). Raises
    ValueError where they are not, or where `keep` is not between 1 and the number of layers.
    """
    prefix, blocks = block_list(model)
    layers = kept_layers(len(blocks), keep)
    with model.device:
        student = type(model)(config_of_layers(model.config, layers)).to(dtype=model.dtype)
    state = model.state_dict()
    student.load_state_dict({name: state[_in_teacher(name, prefix, layers)] for name in student.state_dict()})
    student.tie_weights()
    # It is in no folder yet, and an adapter beside it is not one beside the teacher.
    student.name_or_path = student.config.name_or_path = ""
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def pruned_from(model: PreTrainedModel, student: PreTrainedModel) -> dict[str, str]:
    """Return the name in `model` of each parameter and buffer of `prune_layers(model, …)`, by its new name."""
    prefix, blocks = block_list(model)
    layers = kept_layers(len(blocks), len(block_list(student)[1]))
    return {name: _in_teacher(name, prefix, layers) for name in saved_tensors(student)}


def few_layers(model: PreTrainedModel) -> PreTrainedModel:
    """An untrained model of the family with one layer of each kind, two at least, and a small vocabulary.

    On the GPU where there is one, since its attention may know no other device.
    """
    kinds = getattr(model.config, "layer_types", None) or []
    last = model.config.num_hidden_layers - 1
    layers = sorted({kinds.index(kind) for kind in kinds} | {0, last})
    config = config_of_layers(model.config, layers)
    config.vocab_size = min(config.vocab_size, 512)
    # Its embedding would have no row for them.
    config.pad_token_id = None
    with same_draws(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return type(model)(config).to(dtype=model.dtype).eval()


def config_of_layers(config: Any, layers: list[int]) -> Any:
    """The config of a model that has only these of the layers."""
    config = copy.deepcopy(config)
    # Lists as long as the model is deep have one value per layer: layer_types, SmolLM3's no_rope_layers.
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and not name.endswith("token_id"):
            setattr(config, name, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)
    return config


def _in_teacher(name: str, prefix: str, layers: list[int]) -> str:
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
    return name if match is None else f"{prefix}.{layers[int(match[1])]}.{match[2]}"


def block_list(model: PreTrainedModel, wanted: str = "to prune") -> tuple[str, nn.ModuleList]:
    """The model's blocks, and the list's name. Raises ValueError, by what they were `wanted` for, without one."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} blocks {wanted}: that takes a decoder whose blocks are one "
        "ModuleList of config.num_hidden_layers; choose another student"
    )


def disable_dropout(model: nn.Module) -> None:
    """Every dropout probability to 0: of modules, and of attributes that families hand to functions."""
    for module in model.modules():
        for name in dropouts(module):
            setattr(module, name, 0.0)
