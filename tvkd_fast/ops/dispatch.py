"""Which implementation an op takes, and the dtype it computes in under autocast."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast._compat import constant_in_graphs

Impl = Literal["auto", "torch", "triton"]
IMPLEMENTATIONS = ("auto", "torch", "triton")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("tvkd_fast")


def check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def takes_triton(impl: str, hidden: Tensor) -> bool:
    """Whether the Triton kernels compute this call. "triton" that cannot be had is an error, never another way."""
    if impl == "torch":
        return False
    if impl == "triton":
        refusal = _no_triton(hidden.device, hidden.dtype)
        if refusal:
            raise ValueError(f"impl='triton' cannot be had: {refusal}")
        return True
    return _settled(hidden.device, hidden.dtype)


@constant_in_graphs
def _settled(device: torch.device, dtype: torch.dtype) -> bool:
    """Found out while a graph is traced, and not in it: a graph can neither look for Triton nor say what it took."""
    return _auto(device, dtype)


@lru_cache
def _auto(device: torch.device, dtype: torch.dtype) -> bool:
    """Said once a device and dtype: as information where it is as expected, as a warning where a GPU goes unused."""
    if device.type == "cpu":
        _log.info("impl='auto' computes the head in torch tiles: the tensors are on the CPU")
        return False
    refusal = _no_triton(device, dtype)
    if refusal:
        _log.warning("impl='auto' computes the head in torch tiles: %s", refusal)
    else:
        _log.info("impl='auto' computes the head in Triton kernels: %s tensors of %s", device, dtype)
    return refusal is None


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such tensors, and the remedy; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Linux); take impl='torch'"
    from tvkd_fast.kernels import launch

    if dtype not in _TRITON_DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, got {dtype}; cast, or take impl='torch'"
    if launch.INTERPRETED:
        return None if dtype != torch.bfloat16 else "Triton's interpreter multiplies bfloat16 wrongly; use float32"
    return launch.refusal(device)


def autocast_input(x: Tensor) -> Tensor:
    """Cast to autocast's dtype where it is on, as `torch.nn.functional.linear` does; float64 is left alone."""
    if x.dtype == torch.float64 or not _autocasts(x) or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The ops choose their own precision: autocast would round the float32 tiles."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    # The meta device knows no autocast, and raises where asked for it.
    return torch.amp.is_autocast_available(x.device.type)
