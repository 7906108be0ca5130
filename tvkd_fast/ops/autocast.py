"""The dtype that an op computes in where autocast is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """Cast to autocast's dtype where it is on, as `torch.nn.functional.linear` does; float64 is left alone."""
    if x.dtype == torch.float64 or not _autocasts(x) or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The ops choose their own precision: autocast would round the float32 tiles."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    # The meta device knows no autocast, and raises where asked for it. torch.amp.is_autocast_available says so as well,
    # which torch 2.11 cannot trace.
    return x.device.type != "meta"
