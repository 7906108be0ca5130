"""A model's identity, for caches that must not be read with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tvkd_fast._compat import is_dtensor
from tvkd_fast.models.load import saved_tensors
from tvkd_fast.models.lora import ADAPTER, is_adapter, without_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHANGES_NO_NUMBER = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a config that no log-probability hangs on. Dtypes are those of the weights, which are hashed with them."""


def fingerprint_model(model: PreTrainedModel) -> str:
    """`model:` and the sha256 (hex) of all that decides a model's numbers: its weights (`fingerprint_weights`), what
    its config says of how they are used, and the scales of the adapters that it came with; not the run's own adapter.
    """
    text = f"{fingerprint_weights(model)};{fingerprint_settings(model)}"
    return f"model:{hashlib.sha256(text.encode()).hexdigest()}"


def fingerprint_settings(model: PreTrainedModel) -> str:
    """sha256 (hex) of how a model uses its weights: what `fingerprint_model` holds beside `fingerprint_weights`."""
    used = {"config": _of_config(model.config.to_diff_dict()), "adapters": _of_adapters(model)}
    return hashlib.sha256(json.dumps(used, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_weights(model: nn.Module) -> str:
    """sha256 (hex) over the name, dtype, shape and bytes of every parameter and saved buffer, in order of name; tied
    ones count once, and the run's own adapter, beside which a model is what it was, does not.

    Sharded ones are gathered one by one: every process asks, and all have the same answer.
    """
    digest = hashlib.sha256()
    named = {without_adapter(name): x for name, x in saved_tensors(model).items() if not is_adapter(name)}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        digest.update(whole.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's fields that change results, nested configs' too; dropout is off in every evaluation."""
    return {
        name: _of_config(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in _CHANGES_NO_NUMBER and "drop" not in name
    }


def _of_adapters(model: nn.Module) -> dict[str, Any]:
    """Return by layer the scales of adapters that a model came with, which of them are on, and which are merged."""
    found = {}
    module: Any
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        scales = {key: scale for key, scale in module.scaling.items() if key != ADAPTER}
        if scales:
            on = [] if module.disable_adapters else [key for key in module.active_adapters if key != ADAPTER]
            found[without_adapter(f"{name}.")] = [scales, on, list(module.merged_adapters)]
    return found
