"""The state and the `forward` of a patched model, and how both follow copies, pickles and wrappers of it.

The patch and its `forward`, a bound method of a function that belongs to no model, are entries in the model's own
attributes. A deep copy binds it to the copy, and so does a pickle; what wraps the method, as accelerate does, calls the
function with the model it wrapped; and where nothing can be taken out from under such a wrapper, the function finds no
patch and is the class's own. A shallow copy has the method of the original, and gets its own when it is called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from tvkd_fast._compat import forward_hooks, inside_compiled, remove_pre_hook
from tvkd_fast.integrations.answer import HeadSettings, answer, fuse
from tvkd_fast.models.head import OF_A_FUSED_HEAD, FusedLMHead
from tvkd_fast.models.lent import FORWARDS, PATCH, REPLICATE

if TYPE_CHECKING:
    from collections.abc import Mapping

_CALLED = "_tvkd_fast_called"
"""Argument by which the original's forward learns that a shallow copy was called."""
_KINDS: dict[type, Callable[..., Any]] = {}
"""The patched forward of each class of models."""


@dataclass(eq=False)
class Patch:
    """State that a model carries while it is patched."""

    model: PreTrainedModel
    settings: HeadSettings | None
    """None after unpatching where a wrapper around the forward cannot be opened, or through a wrapper of the model."""
    own: Callable[..., Any] | None
    """The forward that the instance had of its own; None where it had its class's."""
    names: tuple[str, ...]
    """The arguments of the class's forward, by position."""
    loss_function: Any = None
    """The model's loss when it was patched, with which the fused one was compared."""
    heads: dict[FusedLMHead, dict[str, Any]] = field(default_factory=dict)
    """Heads that were fused before the model was patched, and their settings then."""
    outside: bool = False
    """Whether it was unpatched through a wrapper of the model, so that unpatching the model itself is no error."""
    within: bool = False
    """Whether `own` is running, which may call this forward again."""

    def named(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        by_place = dict(zip(self.names, args, strict=False))
        twice = sorted(by_place.keys() & options.keys())
        if twice or len(args) > len(self.names):
            what = f"{', '.join(twice)} twice" if twice else f"{len(args)} arguments by position"
            raise TypeError(f"{type(self.model).__name__}.forward was given {what}")
        return by_place | dict(options)

    def check_loss(self) -> None:
        """Raise ValueError where the model was given another loss since it was patched."""
        if getattr(self.model, "loss_function", None) is not self.loss_function:
            raise ValueError(
                f"{type(self.model).__name__} was given another loss (loss_function, loss_type) after it was patched: "
                "call patch_lm_head again, which compares that loss with the fused one"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        model, settings = copy.deepcopy(self.model, memo), copy.deepcopy(self.settings, memo)
        own, loss_function = copy.deepcopy(self.own, memo), copy.deepcopy(self.loss_function, memo)
        heads = {copy.deepcopy(head, memo): dict(held) for head, held in self.heads.items()}
        return Patch(model, settings, own, self.names, loss_function, heads, self.outside)

    def __reduce__(self) -> tuple[Any, ...]:
        # A method is pickled by its name, under which a model that is read finds its class's: so is a wrapper lost.
        own = None if isinstance(self.own, MethodType) else self.own
        heads = list(self.heads.items())
        return _read, (self.model, self.settings, own, self.names, self.loss_function, heads, self.outside)


def _read(model: PreTrainedModel, settings: Any, own: Any, names: Any, loss: Any, heads: Any, outside: bool) -> Patch:
    """A pickled patch. It comes before the forwards among the model's attributes: their names lead to this one."""
    patch = Patch(model, settings, own, names, loss, dict(heads), outside)
    vars(model)[PATCH] = patch
    if settings is not None:
        vars(model).update({"forward": MethodType(forward_of(type(model)), model), REPLICATE: _replicating(model)})
    return patch


def forward_of(kind: type) -> Callable[..., Any]:
    """The function that stands as `forward` in patched models of a class, with its signature."""
    if kind not in _KINDS:

        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
            if _CALLED in options:
                return options.pop(_CALLED).forward(*args, fused_lm_head=fused_lm_head, **options)
            patch: Patch | None = getattr(self, PATCH, None)
            if patch is None or patch.settings is None:
                # Taken out: the argument is whoever's it was before.
                return plain(self, args, options | {"fused_lm_head": True} if fused_lm_head else options)
            if fused_lm_head:
                named = patch.named(args, options)
                if named.get("labels") is not None or named.get("shift_labels") is not None:
                    patch.check_loss()
                    return answer(self, patch.settings, **named)
            return plain(self, args, options)

        # `generate` and transformers.Trainer look for arguments in it.
        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        forward.__doc__ = kind.forward.__doc__  # type: ignore[attr-defined]
        _KINDS[kind] = forward
    return _KINDS[kind]


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in what torch.compile, data parallelism or an average of weights put around it."""
    found: Any = model
    while True:
        if (inner := inside_compiled(found)) is not found:
            found = inner
        elif isinstance(found, DataParallel | DistributedDataParallel | AveragedModel):
            found = found.module
        else:
            return found


def model_inside(model: nn.Module) -> PreTrainedModel:
    """The transformers model in what PEFT and `unwrapped`'s wrappers put around it."""
    found: Any = unwrapped(model)
    while not isinstance(found, PreTrainedModel):
        if not hasattr(found, "get_base_model"):
            raise ValueError(f"a {type(found).__name__} is no transformers model: give the model that it holds")
        found = unwrapped(found.get_base_model())
    return found


def patch_of(model: PreTrainedModel) -> Patch | None:
    """The model's patch, None where it has none."""
    rebind_copy(model)
    patch: Patch | None = vars(model).get(PATCH)
    return None if patch is None or patch.settings is None else patch


def put_in(model: PreTrainedModel, settings: HeadSettings, autocast: torch.dtype | None) -> None:
    """Fuse the model's head and patch its forward, under what accelerate put around it; `autocast` is the dtype that
    this brings."""
    carried, before = vars(model), patch_of(model)
    heads = _fused_heads(model) if before is None else before.heads
    fuse(model, settings)
    left: Patch | None = carried.get(PATCH)
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    patch = Patch(model, settings, None, names, getattr(model, "loss_function", None), heads)
    if _reached(carried.get("_old_forward", carried.get("forward"))):
        # It stands where it should: patched anew, or left under a wrapper when the patch was taken out.
        carried[PATCH] = replace(patch, own=None if left is None else left.own)
        _watch_copies(model)
        return
    holder = next(
        name for name in ("_old_forward", "_original_forward", "forward") if name in carried or name == "forward"
    )
    own = carried.get(holder)
    if own is not None and getattr(own, "__func__", None) in (type(model).forward, *_KINDS.values()):
        own = None
    ours = MethodType(forward_of(type(model)), model)
    held = {name: carried.pop(name) for name in FORWARDS if name in carried} | {holder: ours}
    if holder == "_original_forward":
        # accelerate's mixed precision is a closure over the forward it found: the same, over this one.
        from accelerate.utils import convert_outputs_to_fp32

        inside = torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None)(ours.__func__)
        held["forward"] = MethodType(convert_outputs_to_fp32(inside), model)
    # Before the forwards: `_read`.
    carried[PATCH] = replace(patch, own=own)
    carried.update(held)
    _watch_copies(model)


def take_out(model: PreTrainedModel, *, outside: bool) -> None:
    """Undo `put_in`; `outside` where the caller gave a wrapper of the model."""
    rebind_copy(model)
    carried = vars(model)
    patch: Patch = carried.pop(PATCH)
    for module in model.modules():
        if module in patch.heads:
            for name in OF_A_FUSED_HEAD:
                vars(module).pop(name, None)
            vars(module).update(patch.heads[module])
        elif isinstance(module, FusedLMHead):
            module.as_linear()
    _forget_copies(model)
    holder = next((name for name in ("forward", "_old_forward") if _is_ours(carried.get(name))), None)
    if holder is None:
        left = patch.own
    elif patch.own is not None:
        carried[holder], left = patch.own, None
    elif holder == "forward":
        del carried[holder]
        left = None
    else:
        carried[holder], left = MethodType(type(model).forward, model), None
    if left is not None or outside:
        carried[PATCH] = Patch(model, None, left, patch.names, outside=outside)


def taken_out_outside(model: PreTrainedModel) -> bool:
    """Return whether the model was unpatched through a wrapper; the answer is True once."""
    patch: Patch | None = vars(model).get(PATCH)
    if patch is None or not patch.outside:
        return False
    patch.outside = False
    if patch.own is None:
        del vars(model)[PATCH]
    return True


def rebind_copy(model: PreTrainedModel) -> None:
    """Give a shallow copy of a patched model a patch and a forward of its own in place of the original's."""
    patch: Patch | None = vars(model).get(PATCH)
    if patch is None or patch.model is model:
        return
    original, own = patch.model, _rebound(patch.own, patch.model, model)
    vars(model)[PATCH] = replace(patch, model=model, own=own, heads=dict(patch.heads), within=False)
    for name in (*FORWARDS, REPLICATE):
        if name in vars(model):
            vars(model)[name] = _rebound(vars(model)[name], original, model)


def _rebound(function: Any, original: PreTrainedModel, model: PreTrainedModel) -> Any:
    """A method of the original, or what accelerate's hooks make of one, for another model."""
    if isinstance(function, MethodType) and function.__self__ is original:
        return MethodType(function.__func__, model)
    if isinstance(function, partial) and function.args[:1] == (original,):
        found = partial(function.func, model, *function.args[1:], **function.keywords)
        vars(found).update(vars(function))
        return found
    return function


def _watch_copies(model: PreTrainedModel) -> None:
    """Let shallow copies of the model, DataParallel's among them, answer with their own weights."""
    vars(model)[REPLICATE] = _replicating(model)
    if _rebind_called not in forward_hooks(model):
        model.register_forward_pre_hook(_rebind_called, with_kwargs=True)


def _forget_copies(model: PreTrainedModel) -> None:
    vars(model).pop(REPLICATE, None)
    remove_pre_hook(model, _rebind_called)


def _rebind_called(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A pre-hook, which is given the instance that is called, where a forward is given the one it was bound to."""
    patch: Patch | None = getattr(model, PATCH, None)
    if patch is None or patch.model is model:
        return None
    rebind_copy(model)
    return args, options | {_CALLED: model}


def _replicating(model: PreTrainedModel) -> MethodType:
    return MethodType(_replicate_for_data_parallel, model)


def _replicate_for_data_parallel(self: Any) -> Any:
    # Pickled by torch's own name for it.
    replica = getattr(type(self), REPLICATE)(self)
    rebind_copy(replica)
    return replica


def _fused_heads(model: PreTrainedModel) -> dict[FusedLMHead, dict[str, Any]]:
    return {
        module: {name: vars(module)[name] for name in OF_A_FUSED_HEAD if name in vars(module)}
        for module in model.modules()
        if isinstance(module, FusedLMHead)
    }


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__func__", forward) in _KINDS.values()


def _reached(forward: Any) -> bool:
    """Return whether a forward is ours, or wraps ours by `functools.wraps`."""
    while forward is not None and not _is_ours(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None
