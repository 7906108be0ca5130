"""What other libraries offer only under a private name, or under one that not every supported release has.

Each function here says what it stands for; tests/test_private.py holds that no other file of the package reaches for
another library's private name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

# A module of a private name, whose class is what torch's documentation tells one to subclass.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which imports all of dynamo (over a second) to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Return whether `x` is a DTensor; its module, over a second's import, is asked for only where `x` may be one."""
    if type(x) in (Tensor, Parameter) or not isinstance(x, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def in_functorch() -> bool:
    """Return whether a torch.func transform (grad, vjp, jvp, vmap) is under way."""
    return torch._C._are_functorch_transforms_active()


def fake_tensors() -> AbstractContextManager[Any]:
    """`torch._subclasses.fake_tensor.FakeTensorMode()`: tensors with a shape and a device, and without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def storage_id(x: Tensor) -> int:
    """The identity of x's storage, which a fake tensor has as well; `data_ptr` asks for memory."""
    return x.untyped_storage()._cdata


def operators(*names: str) -> tuple[Any, ...]:
    """torch's own operators of these names, those that it has of them."""
    found = (getattr(torch.ops.aten, name, None) for name in names)
    return tuple(x.default for x in found if x is not None)


def own_part(shape: torch.Size, mesh: DeviceMesh, placements: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the offset of this process's part of a tensor that is placed so."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)


def collectives_begun(group: Any) -> int:
    """How many collective calls this process has made in a process group."""
    return int(group._get_sequence_number_for_group())


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that are called before and after a module's forward, in their order."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def remove_pre_hook(module: nn.Module, hook: Any) -> None:
    """Take a hook out whose handle is not at hand: it may have been copied along with the module."""
    for key in [key for key, found in module._forward_pre_hooks.items() if found is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def inside_compiled(module: Any) -> Any:
    """The module that `torch.compile(module)` wrapped; the module itself where it wrapped none."""
    return dict(module.named_children()).get("_orig_mod", module) if isinstance(module, nn.Module) else module


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile traces the model or a part of it: by a wrapper, or in place."""
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())


def dropout_of(module: nn.Module) -> float | None:
    """The probability of one of torch's dropout layers, which share no public base; None of another module."""
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else None


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step` leaves everything as it was where the attribute `found_inf` is 1, as `torch.amp.GradScaler`
    asks torch's fused optimizers to do, so that the host need not look."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def attention_of(config: Any) -> str:
    """The name of the attention that a model of transformers runs; "" where the config is of none."""
    return getattr(config, "_attn_implementation", None) or ""


def ignores_adapter_subfolder(folder: Path, subfolder: str) -> bool:
    """Whether transformers takes an adapter in this folder for one of its subfolder, as 5.17 does."""
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(str(folder), subfolder=subfolder) is not None


@cache
def sdpa_drops_softcaps() -> bool:
    """Whether transformers' `sdpa` leaves a layer's softcap out and says nothing, as in 5.17; later releases refuse."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # One query of two keys: without a cap all weight is the second's, with it 1/(1 + exp(−tanh 100)).
    query, keys, values = (torch.tensor(x).view(1, 1, -1, 1) for x in ([10.0], [0.0, 10.0], [0.0, 1.0]))
    try:
        found, _ = sdpa_attention_forward(nn.Module(), query, keys, values, None, scaling=1.0, softcap=1.0)
    except ValueError:
        return False
    return bool(found.flatten()[0] > 0.9)


class _SeenWith:
    """An object with other values of some of its attributes, which itself stays as it is."""

    def __init__(self, seen: Any, **others: Any) -> None:
        vars(self).update(others, seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seen, name)


def with_attention(module: nn.Module, name: str) -> Any:
    """An attention layer whose config names this attention: transformers' flash attention imports what stands there."""
    return _SeenWith(module, config=_SeenWith(module.config, _attn_implementation=name))


def flash_varlen(implementation: str) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    """flash-attn's varlen function as transformers finds it, and transformers' own that makes its keyword arguments.

    Which package has it and which arguments it takes differ between flash-attn's releases. transformers 5.17 returns
    one function of arguments; later releases return several.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (_, varlen, *_), arguments = lazy_import_flash_attention(implementation)
    return varlen, arguments[0] if isinstance(arguments, tuple) else arguments


def blocks_not_to_split(model: PreTrainedModel) -> set[str]:
    """Class names of the model's transformer blocks, which are not to be spread over devices."""
    return set(model._no_split_modules or ())


def recompute_blocks(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """`activation_checkpointing_enable`, which transformers 5.17 calls by another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def filled(parameter: Tensor) -> None:
    """Let `initialize_weights` leave a tensor alone, as it does what `from_pretrained` has read."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def leave_adapters_out(layer: Any, *, off: bool) -> bool:
    """Set whether a layer of peft's leaves its adapters out, and return what was set before.

    peft's own switch, `enable_adapters`, also freezes and thaws their weights, which sharded ones would not outlive.
    """
    before: bool = layer._disable_adapters
    layer._disable_adapters = off
    return before


def moved(module: str, to: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names live elsewhere now: by name, the module that each is in."""

    def find(name: str) -> Any:
        if name not in to:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} has moved: import it from {to[name]}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(to[name]), name)

    return find
