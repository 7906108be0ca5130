"""A patched model: its `forward`, which finds all that it needs on the instance it is called with, and how it travels.

Two entries in the model's own attributes are all that there is: the patch, and `forward` as a bound method of a
function that belongs to no model. A deep copy binds it to the copy, and so does a pickle; what wraps the method, as
accelerate does, calls the function with the model it wrapped; and where nothing can be taken out from under such a
wrapper, the function finds no patch and is the class's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from tvkd_fast.integrations.answer import HeadSettings, answer

if TYPE_CHECKING:
    from collections.abc import Mapping

PATCH = "_tvkd_fast_patch"
_HOLDERS = ("forward", "_old_forward", "_original_forward")
"""Attributes of an instance that hold a forward: its own, and those that accelerate's hooks and its mixed precision
wrapped."""
_FORWARDS: dict[type, Callable[..., Any]] = {}


@dataclass(eq=False)
class Patch:
    """What a model carries while it is patched."""

    model: PreTrainedModel
    settings: HeadSettings | None
    """None once it was taken out from under a wrapper that cannot be opened."""
    own: Callable[..., Any] | None
    """The forward that the instance had of its own; None where it had its class's."""
    names: tuple[str, ...]
    """Of the arguments of the class's forward, by position."""
    within: bool = False
    """While `own` is called, which may have this forward beneath it."""

    def named(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        by_place = dict(zip(self.names, args, strict=False))
        twice = sorted(by_place.keys() & options.keys())
        if twice or len(args) > len(self.names):
            what = f"{', '.join(twice)} twice" if twice else f"{len(args)} arguments by position"
            raise TypeError(f"{type(self.model).__name__}.forward was given {what}")
        return by_place | dict(options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        model, settings = copy.deepcopy(self.model, memo), copy.deepcopy(self.settings, memo)
        return Patch(model, settings, copy.deepcopy(self.own, memo), self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        # A method is pickled by its name, under which a model that is read finds its class's: so is a wrapper lost.
        own = None if isinstance(self.own, MethodType) else self.own
        return _read, (self.model, self.settings, own, self.names)


def _read(model: PreTrainedModel, *carried: Any) -> Patch:
    """A pickled patch. It comes before the forwards among the model's attributes: their names lead to this one."""
    patch = Patch(model, *carried)
    vars(model).update({PATCH: patch, "forward": MethodType(forward_of(type(model)), model)})
    return patch


def forward_of(kind: type) -> Callable[..., Any]:
    """The function that stands as `forward` in patched models of a class, with its signature."""
    if kind not in _FORWARDS:

        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
            patch: Patch | None = getattr(self, PATCH, None)
            if patch is None or patch.settings is None:
                # Taken out: the argument is whoever's it was before.
                return plain(self, args, options | {"fused_lm_head": True} if fused_lm_head else options)
            if fused_lm_head:
                named = patch.named(args, options)
                if named.get("labels") is not None or named.get("shift_labels") is not None:
                    return answer(self, patch.settings, **named)
            return plain(self, args, options)

        # `generate` and transformers.Trainer look for arguments in it.
        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        forward.__doc__ = kind.forward.__doc__  # type: ignore[attr-defined]
        _FORWARDS[kind] = forward
    return _FORWARDS[kind]


def plain(model: PreTrainedModel, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The model's call without a patch: by its class's forward, or by what the instance had in its place."""
    patch: Patch | None = getattr(model, PATCH, None)
    if patch is None or patch.own is None or patch.within:
        return type(model).forward(model, *args, **options)
    patch.within = True
    try:
        return patch.own(*args, **options)
    finally:
        patch.within = False


def model_inside(model: nn.Module) -> PreTrainedModel:
    """The transformers model in what torch.compile, data parallelism, PEFT or an average of weights put around it."""
    found: Any = model
    while True:
        if "_orig_mod" in dict(found.named_children()):
            found = found._orig_mod
        elif isinstance(found, DataParallel | DistributedDataParallel | AveragedModel):
            found = found.module
        elif isinstance(found, PreTrainedModel):
            return found
        elif hasattr(found, "get_base_model"):
            found = found.get_base_model()
        else:
            raise ValueError(f"a {type(found).__name__} is no transformers model: give the model that it holds")


def patch_of(model: PreTrainedModel) -> Patch | None:
    """What the model was patched with, if it is."""
    patch: Patch | None = vars(model).get(PATCH)
    return None if patch is None or patch.settings is None else patch


def put_in(model: PreTrainedModel, settings: HeadSettings, autocast: torch.dtype | None) -> None:
    """Patch the model, under what accelerate put around its forward; `autocast` is the dtype that this brings."""
    carried = vars(model)
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    patch: Patch | None = carried.get(PATCH)
    if _reached(carried.get("_old_forward", carried.get("forward"))):
        # It stands where it should: patched anew, or left under a wrapper when the patch was taken out.
        carried[PATCH] = Patch(model, settings, None if patch is None else patch.own, names)
        return
    holder = next(
        name for name in ("_old_forward", "_original_forward", "forward") if name in carried or name == "forward"
    )
    own = carried.get(holder)
    if own is not None and getattr(own, "__func__", None) in (type(model).forward, *_FORWARDS.values()):
        own = None
    ours = MethodType(forward_of(type(model)), model)
    held = {name: carried.pop(name) for name in _HOLDERS if name in carried} | {holder: ours}
    if holder == "_original_forward":
        # accelerate's mixed precision is a closure over the forward it found: the same, over this one.
        from accelerate.utils import convert_outputs_to_fp32

        inside = torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None)(ours.__func__)
        held["forward"] = MethodType(convert_outputs_to_fp32(inside), model)
    # Before the forwards: `_read`.
    carried[PATCH] = Patch(model, settings, own, names)
    carried.update(held)


def take_out(model: PreTrainedModel) -> None:
    """Undo `put_in`."""
    carried = vars(model)
    patch: Patch = carried.pop(PATCH)
    for name in ("forward", "_old_forward"):
        if _is_ours(carried.get(name)):
            if patch.own is not None:
                carried[name] = patch.own
            elif name == "forward":
                del carried[name]
            else:
                carried[name] = MethodType(type(model).forward, model)
            return
    if patch.own is not None:
        carried[PATCH] = Patch(model, None, patch.own, patch.names)


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__func__", forward) in _FORWARDS.values()


def _reached(forward: Any) -> bool:
    """Whether a forward is ours, or says that it is wrapped around ours."""
    while forward is not None and not _is_ours(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None
