"""A model's identity, for caches that must not be read with another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tvkd_fast.models.adapters import is_adapter, without_adapter


def fingerprint_weights(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, dtype, shape and bytes, in order of name; tied ones count once, and
    adapters, beside which a model is what it was, do not.

    Sharded ones are gathered one by one: every process asks, and all have the same answer.
    """
    digest = hashlib.sha256()
    named = {without_adapter(name): x for name, x in model.named_parameters() if not is_adapter(name)}
    for name, parameter in sorted(named.items()):
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)};".encode())
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(whole.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
