"""Tensors that are made on the host and needed on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x.to(device)`, for which the host does not wait: torch's own waits for all that the device was given before.

    A GPU copies from pinned memory alone while the host goes on.
    """
    device = torch.device(device)
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    held = x.pin_memory() if device.type == "cuda" else x
    return held.to(device, non_blocking=True)
