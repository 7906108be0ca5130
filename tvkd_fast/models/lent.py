"""Temporary changes of models that belong to the caller, and how they are undone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tvkd_fast._compat import attention_of, dropout_of, leave_adapters_out
from tvkd_fast.models.head import OF_A_FUSED_HEAD

PATCH = "_tvkd_fast_patch"
"""Attribute that holds what a patched model was patched with."""
REPLICATE = "_replicate_for_data_parallel"
"""torch's method by which DataParallel copies a module."""
FORWARDS = ("forward", "_old_forward", "_original_forward")
"""Attributes of an instance that hold a forward: its own, and those that accelerate's hooks and its mixed precision
wrapped."""
_OF_A_PATCH = (PATCH, REPLICATE, *FORWARDS)
_OF_A_HEAD = (*OF_A_FUSED_HEAD, *FORWARDS)
_REGISTERED = ("_modules", "_parameters", "_buffers")


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
def undone(model: nn.Module, *, on_error: bool = False) -> Iterator[None]:
    """Put back what the block changed: heads, patches, forwards, hooks, modes, dropout, attention, requires_grad.

    With `on_error` only where the block raises. Whatever raises, submodules, parameters, buffers and all other
    attributes of modules are put back too; no tensor is copied, so that values stay what they became.
    """
    config: Any = getattr(model, "config", None)
    attention = attention_of(config)
    modules = [_ModuleState(module) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not on_error:
            for module in modules:
                module.restore(everything=failed)
            for parameter, requires_grad in trained:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            if attention_of(config) != attention:
                model.set_attn_implementation(attention)  # type: ignore[operator]


class _ModuleState:
    """One module's class, attributes, hooks and registered tensors and submodules."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.attributes = module, type(module), dict(vars(module))
        self.changed = _changed(module)
        self.tables = {
            name: (table, dict(table))
            for name, table in self.attributes.items()
            if isinstance(table, dict) and ("_hooks" in name or name in _REGISTERED)
        }

    def restore(self, *, everything: bool) -> None:
        own = vars(self.module)
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        if everything:
            if not _same(own, self.attributes):
                own.clear()
                own.update(self.attributes)
        elif not _same(now := _changed(self.module), self.changed):
            for name in now:
                del own[name]
            own.update(self.changed)
        for name, (table, before) in self.tables.items():
            # Nearly all tables are empty.
            if (table or before) and (everything or name not in _REGISTERED) and not _same(table, before):
                table.clear()
                table.update(before)


def _changed(module: nn.Module) -> dict[str, Any]:
    """The attributes that this library sets on a module, as they are now and in their order, which pickles need."""
    names = {"training", *dropouts(module), *(_OF_A_HEAD if isinstance(module, nn.Linear) else _OF_A_PATCH)}
    return {name: value for name, value in vars(module).items() if name in names}


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return list(now) == list(before) and all(now[name] is value for name, value in before.items())


def dropouts(module: nn.Module) -> dict[str, float]:
    """A module's own dropout probabilities, by attribute: of dropout layers, and those that are handed to functions."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, float) and "drop" in name}
    own = dropout_of(module)
    return found if own is None else found | {"p": own}


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of peft's that add something to a layer of the model, or stand in for one."""
    if "peft" not in sys.modules:
        # Whoever put any in has imported it.
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of these layers, without those of the layers inside them."""
    for layer in adapter_layers(model):
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters, while the block lasts."""
    layers = [(layer, leave_adapters_out(layer, off=True)) for layer in adapter_layers(model)]
    try:
        yield
    finally:
        for layer, disabled in layers:
            leave_adapters_out(layer, off=disabled)


def on_base_of(lent: nn.Module, policy: nn.Module) -> bool:
    """Return whether a lent model contains the policy's adapters, because it is the policy's base or shares its
    layers."""
    ours = {id(module) for module in policy.modules()}
    return any(id(layer) in ours for layer in adapter_layers(lent))


def moves_with(lent: nn.Module, policy: nn.Module) -> bool:
    """Return whether training the policy changes weights of a lent model other than its adapters."""
    trained = _ids(parameter for parameter in policy.parameters() if parameter.requires_grad)
    return not (trained - _ids(adapter_parameters(lent))).isdisjoint(_ids(lent.parameters()))


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


@contextmanager
def same_draws() -> Iterator[None]:
    """Random draws of the block leave torch's generators, of the CPU and of the current GPU, where they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
