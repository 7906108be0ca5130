"""Memory around what a kernel reads and writes: poisoned, and looked at afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GUARD = 4096
"""Bytes before and after each tensor; whole lines, so that a tensor's own alignment is as it was."""
POISON = 0xFF
"""Of bytes: a float of them is NaN in every format, an integer −1."""
UNINITIALISED = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
FILLED = (torch.zeros, torch.Tensor.new_zeros, torch.Tensor.new_full)


class Guarded(TorchFunctionMode):
    """In the block, what torch makes lies between two guards, and is NaN where it is made without a value.

    A kernel that leaves an entry unwritten, or reads one, shows as NaN in its results; `touched` finds what was written
    outside. The interpreter copies a tensor with its storage and back, guards included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[tuple[str, Tensor, int]] = []
        """What was made, its bytes with both guards, and the bytes of its own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in UNINITIALISED:
            return self.surrounded(made)
        return self.copied(made) if func in FILLED else made

    def surrounded(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape and strides between guards; on a device that has memory."""
        if like.is_meta or not like.numel():
            return like
        count = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        size = count * like.element_size()
        held = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=like.device)
        self.guarded.append((f"{list(like.shape)} {like.dtype}", held, size))
        own = held[GUARD : GUARD + size].view(like.dtype)
        return own.as_strided(like.shape, like.stride())

    def copied(self, tensor: Tensor) -> Tensor:
        """An input between guards: what is read past its ends is NaN."""
        own = self.surrounded(tensor)
        return own.copy_(tensor) if own is not tensor else tensor

    def touched(self) -> list[str]:
        """Guards that do not hold their poison any more."""
        found = []
        for name, held, size in self.guarded:
            sides: Mapping[str, Tensor] = {"before": held[:GUARD], "after": held[GUARD + size :]}
            found += [f"written {side} {name}" for side, guard in sides.items() if bool((guard != POISON).any())]
        return found
