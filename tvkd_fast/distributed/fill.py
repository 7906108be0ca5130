"""Weights from safetensors straight into the shards that want them: no process ever holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tvkd_fast._compat import filled, own_part
from tvkd_fast.models import adapter_start, is_adapter, once_opened, saved_tensors, without_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fill(
    model: PreTrainedModel, places: Mapping[str, tuple[Path, str]], device: torch.device, *, seed: str = "0"
) -> None:
    """Give a sharded model on the meta device its memory on `device`, and read its own rows of every weight.

    `places` gives the file of each parameter or saved buffer, and its name there, by name; adapters are in
    none, and begin as `add_lora` has them begin under this seed.
    """
    model.to_empty(device=device)
    opened = once_opened()
    for name, target in saved_tensors(model).items():
        if is_adapter(name):
            own = adapter_start(name, target, seed)[_own(target)]
        else:
            path, key = places[without_adapter(name)]
            own = opened(path).get_slice(key)[_own(target)]
        local(target).copy_(own)
        filled(target)
    # What is left are buffers that no file holds, rotary tables above all, which transformers knows how to make.
    model.initialize_weights()


def local(x: Tensor) -> Tensor:
    """Return the part that this process holds, or `x` itself where it is no shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def _own(x: Tensor) -> tuple[slice, ...]:
    """Return the slices of the full tensor that this process holds."""
    if not isinstance(x, DTensor):
        return tuple(slice(0, size) for size in x.shape) or (slice(None),)
    shape, offset = own_part(x.shape, x.device_mesh, x.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
