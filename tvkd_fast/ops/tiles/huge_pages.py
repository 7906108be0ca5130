"""Large tensors on a CPU in huge pages, where Linux gives them to who asks.

A fresh page costs a fault, and a gradient of a large vocabulary has thousands: written for the first time in pages of
4 KiB it takes several times as long as in pages of 2 MiB. torch asks for them only under an environment variable that
has to be set before a process starts (THP_MEM_ALLOC_ENABLE).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

HUGE = 2 * 2**20
_ADVICE = 14
"""MADV_HUGEPAGE of Linux's madvise(2)."""


def large_empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, in huge pages if it is large enough to hold any; advice only, and never an error."""
    x = like.new_empty(shape, dtype=like.dtype if dtype is None else dtype)
    start = -(-x.data_ptr() // HUGE) * HUGE if x.device.type == "cpu" else 0
    size = (x.data_ptr() + x.nbytes - start) // HUGE * HUGE if start else 0
    advise = _madvise()
    if advise is not None and size > 0:
        advise(start, size, _ADVICE)
    return x


@lru_cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
