"""Causal language models: loading them, calling them without logits, and making students out of teachers."""

from tvkd_fast.models.fingerprint import fingerprint_model, fingerprint_settings, fingerprint_weights
from tvkd_fast.models.head import FusedLMHead, HeadTransforms, head_transforms
from tvkd_fast.models.load import (
    EmptyModel,
    empty_model,
    load_model,
    load_tokenizer,
    once_opened,
    save_model,
    saved_tensors,
)
from tvkd_fast.models.lora import (
    Lora,
    WithoutAdapters,
    adapter_start,
    add_lora,
    is_adapter,
    merged,
    save_adapter,
    without_adapter,
)
from tvkd_fast.models.policy import PolicyWithHead, TeacherWithHead
from tvkd_fast.models.probe import probe_head
from tvkd_fast.models.prune import disable_dropout, prune_layers, pruned_from
from tvkd_fast.models.quantized import BITS_PER_WEIGHT
from tvkd_fast.models.shapes import (
    ModelShape,
    empty_of_family,
    longest_sequence,
    model_config,
    model_shape,
    read_config,
)
from tvkd_fast.models.stop_ids import load_stop_ids, stop_ids_of

__all__ = [
    "BITS_PER_WEIGHT",
    "EmptyModel",
    "FusedLMHead",
    "HeadTransforms",
    "Lora",
    "ModelShape",
    "PolicyWithHead",
    "TeacherWithHead",
    "WithoutAdapters",
    "adapter_start",
    "add_lora",
    "disable_dropout",
    "empty_model",
    "empty_of_family",
    "fingerprint_model",
    "fingerprint_settings",
    "fingerprint_weights",
    "head_transforms",
    "is_adapter",
    "load_model",
    "load_stop_ids",
    "load_tokenizer",
    "longest_sequence",
    "merged",
    "model_config",
    "model_shape",
    "once_opened",
    "probe_head",
    "prune_layers",
    "pruned_from",
    "read_config",
    "save_adapter",
    "save_model",
    "saved_tensors",
    "stop_ids_of",
    "without_adapter",
]
