"""A model's identity, for caches that must not be read with another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint_weights(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, dtype, shape and bytes, in order of name; tied ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
