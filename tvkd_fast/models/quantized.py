"""A frozen backbone in four bits, for adapters to learn beside (QLoRA, arXiv 2305.14314): bitsandbytes' NF4.

Head, embedding and norms keep their dtype, since log-probabilities are made by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS_PER_WEIGHT = 4 + 32 / 64
"""Four, and a float32 scale for every 64 weights."""


def nf4_options(device: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """Return the options of `from_pretrained` for NF4. Raises ValueError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "a backbone in four bits is bitsandbytes': pip install 'tvkd_fast[qlora]', or leave --lora.quantize out"
        ) from error
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_packed(model: nn.Module) -> None:
    """Have bitsandbytes leave the weights as they are packed.

    On CPUs with bfloat16 products it packs them anew for inference, in place and for good, as soon as a model in eval
    mode runs: a policy that is evaluated between its steps would continue with other weights' rounding.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(model: PreTrainedModel) -> dict[str, Tensor]:
    """[out, in] weights of the linear layers that are packed, in the model's dtype, by the name of the parameter."""
    return {f"{name}.weight": _whole(module, model.dtype) for name, module in _packed(model)}


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            yield name, module


def _whole(module: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return found.to(dtype).cpu()
