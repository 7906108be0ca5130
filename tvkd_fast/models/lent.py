"""Models that belong to somebody else: what is done to one for a while, and how it is put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tvkd_fast.models.head import OF_A_FUSED_HEAD, FusedLMHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block lasts; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undone(model: PreTrainedModel, *, on_error: bool = False) -> Iterator[None]:
    """Put back what `PolicyWithHead` changes of a model: its head's class, modes, dropout, attention, requires_grad.

    With `on_error` only where the block raises.
    """
    head = model.get_output_embeddings()
    kept = {name: vars(head)[name] for name in OF_A_FUSED_HEAD if name in vars(head)}
    was_fused = isinstance(head, FusedLMHead)
    modules = [(module, module.training, dropouts(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attention = model.config._attn_implementation
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not on_error:
            if was_fused:
                for name in OF_A_FUSED_HEAD:
                    vars(head).pop(name, None)
                vars(head).update(kept)
            elif isinstance(head, FusedLMHead):
                head.as_linear()
            for module, training, dropout in modules:
                module.training = training
                for name, value in dropout.items():
                    setattr(module, name, value)
            for parameter, requires_grad in trained:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)


def dropouts(module: nn.Module) -> dict[str, float]:
    """A module's own dropout probabilities, by attribute: of dropout layers, and those that are handed to functions."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, float) and "drop" in name}
    if isinstance(module, nn.modules.dropout._DropoutNd):
        found["p"] = module.p
    return found


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of peft's that add something to a layer of the model, or stand in for one."""
    if "peft" not in sys.modules:
        # Whoever put any in has imported it.
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What these layers have of their own, beside what they were put around."""
    for layer in adapter_layers(model):
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters, while the block lasts."""
    # peft's own switch also freezes and thaws their weights, which sharded ones would not outlive.
    layers = [(layer, layer._disable_adapters) for layer in adapter_layers(model)]
    for layer, _ in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in layers:
            layer._disable_adapters = disabled


@contextmanager
def same_draws() -> Iterator[None]:
    """Random draws of the block leave torch's generators, of the CPU and of the current GPU, where they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
