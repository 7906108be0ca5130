"""The resources that a run uses: memory by part, and arithmetic.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.distributed import local
from tvkd_fast.models import PolicyWithHead

_M_MMAP_THRESHOLD = -3
"""A constant of glibc's <malloc.h>."""
_MAPPED = 2**20


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held at once: of the device's allocator, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_bytes(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Memory that this process holds now, or has held at most, by Linux; 0 where the system does not report it."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """Have the C library map every tensor of `_MAPPED` bytes or more apart, and unmap it as soon as it is freed.

    Left alone, glibc raises that size to 32 MiB as such tensors are freed, and what it holds then has holes that the
    next tensors do not fit into. Raises ValueError where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        raise ValueError("memory is returned by a setting of glibc, which is not here: leave --model.return_memory out")
    done = ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    assert done == 1


def memory_by_part(policy: PolicyWithHead, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of what this process keeps from step to step; gradients as they are at the end of a backward."""
    parameters = list(policy.parameters())
    return {
        "policy weights": _bytes(parameters),
        "gradients": _bytes(p for p in parameters if p.requires_grad),
        "AdamW's two moments": _bytes(x for state in optimizer.state.values() for x in state.values()),
    }


class StepFlops:
    """Floating-point operations of a training step by its products with weights: attention's own are left out.

    A weight takes 2 per token forward, 2 for the gradient of its input, and 2 for its own unless it is frozen. The
    head, D·V, sees response tokens alone; what is recomputed counts once.
    """

    def __init__(self, policy: PolicyWithHead) -> None:
        apart = {id(policy.head.weight), id(policy.model.get_input_embeddings().weight)}
        rest = [p for p in policy.parameters() if p.dim() > 1 and id(p) not in apart]
        self.per_token = sum(_per_token(p) for p in rest)
        self.per_response_token = _per_token(policy.head.weight)

    def of(self, tokens: int, response_tokens: int) -> int:
        return self.per_token * tokens + self.per_response_token * response_tokens


def _per_token(weight: Tensor) -> int:
    return (6 if weight.requires_grad else 4) * weight.numel()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in map(local, tensors))
