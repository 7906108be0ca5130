"""Functions that torch offers only under a private name, or at a cost that every start would pay; and moved names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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


def moved(module: str, to: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names live elsewhere now: by name, the module that each is in."""

    def find(name: str) -> Any:
        if name not in to:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} has moved: import it from {to[name]}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(to[name]), name)

    return find
