"""LoRA: products of low rank beside a frozen policy's own, W + (a/r)·B·A, that learn in its place (arXiv 2106.09685).

The policy without them is its own reference, so that none has to be held. The head stays as it is: a frozen one costs
a product less (docs/sparse.md).

Letters: r rank, a alpha.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tvkd_fast.models.head import FusedLMHead
from tvkd_fast.models.lent import adapters_off, undone
from tvkd_fast.models.policy import PolicyWithHead
from tvkd_fast.models.quantized import dequantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora:
    """Rank, scale and places of the adapters."""

    rank: int
    alpha: float
    targets: Sequence[str] | None = None
    """Names of the linear layers that get one, such as q_proj; all of the backbone where not given."""
    seed: str = "0"
    """What A is drawn by, beside the layer's name."""


def add_lora(policy: PolicyWithHead, lora: Lora) -> None:
    """Freeze the policy, in place, and put adapters beside its products: A drawn by seed and name, B zero.

    Needs peft. Raises ValueError where it is not installed, where no layer has such a name, and for the head.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("LoRA is peft's: pip install 'tvkd_fast[lora]'") from error
    model = policy.model
    head = next(name for name, module in model.named_modules() if module is policy.head)
    if lora.targets is not None and any(head.endswith(target) for target in lora.targets):
        raise ValueError(
            f"the head, {head}, is computed by fused kernels that know no adapter: leave it out of --lora.targets, or "
            "train it whole without LoRA"
        )
    targets = "all-linear" if lora.targets is None else list(lora.targets)
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    try:
        with undone(model, on_error=True):
            policy.requires_grad_(False)
            model.add_adapter(LoraConfig(**options), ADAPTER)
    except ValueError as error:
        said = str(error).splitlines()[0]
        if "version of PEFT" in said:
            raise ValueError(
                f"{said}, as transformers {version('transformers')} asks for, or an older one of it"
            ) from error
        raise ValueError(f"{said} Set --lora.targets to names of linear layers") from error
    _check_can_merge(model)
    draw_adapters(model, lora.seed)
    _check_runs(model)


def adapter_sizes(model: PreTrainedModel) -> tuple[tuple[str, int], ...]:
    """Return the parameters of a rank-1 adapter for every linear layer of the backbone, by the layer's name.

    For experts that are one weight peft determines them; without peft they are left out. The model is changed: give an
    empty one.
    """
    head = model.get_output_embeddings()
    layers = {
        name: sum(module.weight.shape)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }
    fused = any(
        p.dim() == 3 for module in model.modules() if not hasattr(module, "stride") for p in module.parameters(False)
    )
    if not fused or find_spec("peft") is None:
        return tuple(layers.items())
    from peft import LoraConfig

    with warnings.catch_warnings(), suppress(ValueError):
        # Where peft takes no adapter, a run is refused before it begins.
        warnings.simplefilter("ignore")
        model.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules="all-linear"), ADAPTER)
        layers = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            layer = _adapted_weight(model, name.rpartition(".lora_")[0]).removesuffix(".weight")
            layers[layer] = layers.get(layer, 0) + parameter.numel()
    return tuple(layers.items())


def _adapted_weight(model: nn.Module, layer: str) -> str:
    """Return the name that the weight beside this layer's adapter had before adapters were added."""
    parameter = getattr(model.get_submodule(layer), "parameter_name", "weight")
    return without_adapter(f"{layer}.base_layer.{parameter}")


@torch.no_grad()
def draw_adapters(model: nn.Module, seed: str = "0") -> None:
    """Draw A by the seed and its name, so that every process starts from the same one, and set B to zero. Adapters on
    the meta device are left alone."""
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not parameter.is_meta:
            parameter.copy_(adapter_start(name, parameter, seed))


def adapter_start(name: str, like: Tensor, seed: str = "0") -> Tensor:
    """Return the initial value of an adapter's weight, [r, in] or [out, r], whole and on the CPU."""
    if "lora_B" in name:
        return torch.zeros(like.shape, dtype=like.dtype)
    # By the layer's name and the letter: what the run calls its adapter decides nothing.
    of_layer = name.replace(f".{ADAPTER}.", ".default.")
    digest = sha256(f"adapter:{seed}:{of_layer}".encode()).digest()[:7]
    draw = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    # As peft draws it: uniform, as wide as a linear layer's own.
    bound = 1 / math.sqrt(like.shape[1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=draw).to(like.dtype)


class WithoutAdapters(nn.Module):
    """A policy's reference: itself, adapters off and without gradients."""

    def __init__(self, policy: PolicyWithHead) -> None:
        super().__init__()
        # No submodule: it is trained, saved and sharded as the policy.
        self._policy = [policy]

    @torch.no_grad()
    def forward(self, batch: Any, **asked: Any) -> Any:
        (policy,) = self._policy
        with adapters_off(policy):
            return policy(batch, **asked)

    @property
    def head(self) -> FusedLMHead:
        (policy,) = self._policy
        with adapters_off(policy):
            return policy.head


def merged(model: PreTrainedModel, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return an empty model of the family without adapters, and its weights with the adapters merged."""
    layers = _adapted_layers(model)
    whole = {without_adapter(name): x for name, x in dequantized(model).items()}
    found = {without_adapter(name): x for name, x in weights.items() if not is_adapter(name)} | whole
    config = copy.deepcopy(model.config)
    if whole:
        del config.quantization_config
        # Scales of packed weights lie beside them in a state dict, under their names.
        found = {name: x for name, x in found.items() if name.rpartition(".weight.")[0] + ".weight" not in whole}
    for layer, module in layers.items():
        a, b = (weights[f"{layer}.lora_{letter}.{ADAPTER}.weight"].double() for letter in "AB")
        name = _adapted_weight(model, layer)
        base = found[name]
        found[name] = (base.double() + module.scaling[ADAPTER] * _product(module, a, b)).to(base.dtype)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain, found


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter of the run, by name."""
    return {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def _product(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return B·A in the shape of the adapted weight; for experts that are one weight, one product per expert."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        # GPT-2's layers keep their weights the other way round.
        return (b @ a).T if layer.fan_in_fan_out else b @ a
    each = torch.einsum("ore,eri->eoi", b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1]))
    return each.transpose(1, 2) if getattr(layer.get_base_layer(), "is_transposed", False) else each


def _check_can_merge(model: nn.Module) -> None:
    """Raise ValueError where the run's adapters could not be merged at its end, by the name of the layer."""
    layers = _adapted_layers(model)
    odd = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    # Packed weights have no shape of their own, and are those of plain layers.
    shapes = {without_adapter(name): x.shape for name, x in model.named_parameters() if x.is_floating_point()}
    for layer, module in layers.items():
        a, b = (module.get_parameter(f"lora_{letter}.{ADAPTER}.weight") for letter in "AB")
        weight = shapes.get(_adapted_weight(model, layer))
        if a.dim() != 2 or (weight is not None and _product(module, a.to("meta"), b.to("meta")).shape != weight):
            odd.add(layer)
    if odd:
        raise ValueError(
            f"an adapter beside {without_adapter(sorted(odd)[0])} could not be merged into the model: leave it out of "
            "--lora.targets"
        )


def _check_runs(model: PreTrainedModel) -> None:
    """Raise ValueError where the family cannot be called with the adapters; not checked on the meta device."""
    if model.device.type == "meta":
        return
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with these adapters ({str(error).splitlines()[0]}): set "
            "--lora.targets to names of its linear layers, such as [q_proj,v_proj]"
        ) from error


def save_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Save the adapters alone, as `PeftModel.from_pretrained(base, folder)` reads them. A base that is a local folder
    is named by its absolute path, so that it is found from another working directory too."""
    config = copy.copy(model.peft_config[ADAPTER])
    base = config.base_model_name_or_path
    if base and Path(base).exists():
        config.base_model_name_or_path = str(Path(base).absolute())
    config.save_pretrained(folder)
    found = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": x.contiguous()
        for name, x in weights.items()
        if is_adapter(name)
    }
    save_file(found, folder / "adapter_model.safetensors")


ADAPTER = "tvkd_run"
"""Name of a run's own adapter. One that a model came with has another name, and is part of that model."""

_OF_ADAPTER = re.compile(rf".*\.lora_[AB]\.{ADAPTER}\.weight")


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to the adapter that the run itself has added."""
    return _OF_ADAPTER.fullmatch(name) is not None


def without_adapter(name: str) -> str:
    """A parameter's name before an adapter was put beside its layer; a layer of two weights has two around it."""
    return re.sub(r"\.(base_layer\.)+", ".", name)
