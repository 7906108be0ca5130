"""The vocabulary head as a module, and what each family does to its logits afterwards.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tvkd_fast.ops import (
    Head,
    HeadGradient,
    HeadStats,
    Upstream,
    known_logps,
    linear_logps,
    linear_lse,
    makes_in_forward,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadTransforms:
    """z = softcap·tanh(a/softcap), a = logit_scale·(h·w + bias)."""

    softcap: float | None = None
    logit_scale: float = 1.0


OF_A_FUSED_HEAD = ("transforms", "gradient", "stats")
"""Attributes that a linear layer has while it is a `FusedLMHead`."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = {"logit_scale": ("cohere",), "logits_scaling": ("hyperclovax",), "lm_head_multiplier": ("falcon_h1",)}
_DIVISORS = {"logits_scaling": ("granite",)}


def head_transforms(config: Any) -> HeadTransforms:
    """The transforms after the head in a family's config: Gemma's cap, Cohere's scale, Granite's divisor, and so on.

    The names mean different things in different families (`logits_scaling` divides in Granite and multiplies in
    HyperCLOVA X), so they are read by model type; `probe_head` holds the answer to the model's own logits.
    """
    text = config.get_text_config()
    softcap = next((float(getattr(text, key)) for key in _SOFTCAPS if getattr(text, key, None)), None)
    scale = 1.0
    for key, families in _MULTIPLIERS.items():
        if text.model_type.startswith(families) and getattr(text, key, None) is not None:
            scale *= float(getattr(text, key))
    for key, families in _DIVISORS.items():
        if text.model_type.startswith(families) and getattr(text, key, None) is not None:
            scale /= float(getattr(text, key))
    return HeadTransforms(softcap, scale)


class FusedLMHead(nn.Linear):
    """An `nn.Linear` head that also answers with log-probabilities, so that FSDP2's hooks gather and reduce its weight.

    `forward(hidden)` returns the plain product, as the layer it replaces did: the model applies its own transforms.
    `forward(hidden, labels)` returns `linear_logps` (N,), and `forward(hidden, kappa=κ)` returns `linear_lse`, both
    with this head's transforms and without logits. `gradient` sets how the first is differentiated, and `stats`
    collects what its sparse gradients were made of, where it is set. With `upstream`, what the loss will hand down, an
    exact gradient is made in the forward where that saves a product.
    """

    transforms: HeadTransforms
    gradient: HeadGradient = HeadGradient()
    stats: HeadStats | None = None

    @classmethod
    def from_linear(cls, linear: nn.Module, transforms: HeadTransforms) -> FusedLMHead:
        """The very same module as a fused head: parameters, ties, hooks and FSDP2's state stay. `as_linear` undoes it.

        Raises ValueError, with nothing changed, for a module that is not a plain `nn.Linear`.
        """
        if not isinstance(linear, cls):
            _turn(linear, nn.Linear, cls)
        assert isinstance(linear, cls)
        linear.transforms = transforms
        return linear

    def as_linear(self) -> nn.Linear:
        """This module as the plain `nn.Linear` that `from_linear` was given; a subclass's own stays as it is."""
        if turned(type(self), FusedLMHead, nn.Linear) is not None:
            _turn(self, FusedLMHead, nn.Linear)
            for name in OF_A_FUSED_HEAD:
                vars(self).pop(name, None)
        return self

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        kappa: float | None = None,
        upstream: Upstream | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None and kappa is None:
            return super().forward(hidden)
        options: dict[str, Any] = {
            "bias": self.bias,
            "softcap": self.transforms.softcap,
            "logit_scale": self.transforms.logit_scale,
        }
        if kappa is not None:
            return linear_lse(hidden, self.weight, kappa=kappa, **options)
        assert labels is not None
        if torch.compiler.is_compiling():
            upstream = None
        if upstream is not None and makes_in_forward(hidden, Head(self.weight, self.bias), self.gradient):
            return known_logps(
                hidden, self.weight, labels, upstream, workspace_mb=self.gradient.workspace_mb, **options
            )
        return linear_logps(hidden, self.weight, labels, **options, **self.gradient_options())

    def log_collisions(self, hidden: Tensor) -> Tensor:
        """(N,) log Σ_v p(v)² of every state's distribution, without a gradient, by one product."""
        with torch.no_grad():
            lse, lse_2 = self(hidden.detach(), kappa=2.0)
        return lse_2 - 2 * lse

    @property
    def whole(self) -> Head:
        """The projection of the whole vocabulary and its transforms, for ops of several models' heads: a plain weight,
        which under FSDP2 it is inside its root's forward alone."""
        return Head(self.weight, self.bias, self.transforms.softcap, self.transforms.logit_scale)

    def gathered(self, device: torch.device | None = None) -> Head:
        """`whole` outside a forward, and detached; of a sharded weight a copy that every process has: a collective.

        It is on `device`, where given: that of the states, while offloaded shards are on the host.
        """
        head = self.whole
        weight, bias = (None if x is None else _full(x.detach()).to(device) for x in (head.weight, head.bias))
        assert weight is not None
        return replace(head, weight=weight, bias=bias)

    def gradient_options(self) -> dict[str, Any]:
        """Return the arguments of `linear_logps` that select its gradient."""
        return {**self.gradient.options(), "stats": self.stats}


def _full(x: Tensor) -> Tensor:
    full_tensor = getattr(x, "full_tensor", None)
    return x if full_tensor is None else full_tensor()


def fuse_head(model: PreTrainedModel) -> list[FusedLMHead]:
    """Turn a model's head, and the copies that peft trains in its place, into fused heads in place.

    Raises ValueError, with nothing changed, where one of them is no plain `nn.Linear`.
    """
    layers, transforms = head_layers(model.get_output_embeddings()), head_transforms(model.config)
    for layer in layers:
        check_head_layer(layer, model)
    return [FusedLMHead.from_linear(layer, transforms) for layer in layers]


def head_layers(head: Any) -> list[Any]:
    """The head; or, where peft trains a copy of it in its place (`modules_to_save`), it and its copies."""
    copies = getattr(head, "modules_to_save", None)
    own = getattr(head, "original_module", None)
    return [own, *copies.values()] if isinstance(copies, nn.ModuleDict) and own is not None else [head]


def answering_layer(head: Any) -> Any:
    """The one of `head_layers` that is called now: the active adapter's copy, or the head where adapters are off."""
    layers = head_layers(head)
    if len(layers) == 1:
        return layers[0]
    active = head.active_adapters
    off = head.disable_adapters or not active or any(name not in head.modules_to_save for name in active)
    return layers[0] if off else head.modules_to_save[active[0]]


def check_head_layer(layer: nn.Module, model: nn.Module) -> None:
    """Raise ValueError, naming the layer of the model and the remedy, where it cannot become a fused head."""
    try:
        if isinstance(layer, FusedLMHead):
            _holder(layer, type(layer))
        else:
            _check(layer, nn.Linear, FusedLMHead)
    except ValueError as error:
        name = next((name for name, module in model.named_modules() if module is layer), "the head")
        raise ValueError(f"{name} of {type(model).__name__}: {error}") from error


def turned(kind: type, old: type, new: type) -> type | None:
    """`new` where `kind` is `old`, FSDP2's class of `new` where it is FSDP2's of `old`, and None for all others."""
    if kind is old:
        return new
    mixin, *rest = kind.__bases__
    if rest == [old] and mixin.__module__.startswith("torch.distributed."):
        # As fully_shard makes them, one for each class of module.
        own = {name: value for name, value in vars(kind).items() if name == "__deepcopy__"}
        return type(kind.__name__.replace(old.__name__, new.__name__), (mixin, new), own)
    return None


def _turn(module: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> None:
    """Make an `old` module a `new` one where it stands."""
    kind, held = _check(module, old, new)
    module.__class__ = kind
    if held in vars(module):
        vars(module)[held] = MethodType(new.forward, module)


def _check(module: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> tuple[type, str]:
    """The class that an `old` module is to have as a `new` one, and the attribute that holds a forward of its own."""
    kind = turned(type(module), old, new)
    if kind is None:
        raise ValueError(f"the head is a {type(module).__name__}, not a plain nn.Linear: {_remedy(module)}")
    return kind, _holder(module, old)


def _remedy(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__name__}".lower()
    if "peft." in kind or "lora" in kind:
        return "merge a LoRA adapter on the head first (merge_and_unload), or leave lm_head out of its target_modules"
    if "bit" in kind or "quant" in kind:
        return "load the head unquantised (llm_int8_skip_modules=['lm_head'] in a BitsAndBytesConfig)"
    return "put an nn.Linear of its weights there (set_output_embeddings), or use a trainer that keeps its logits"


def _holder(module: nn.Module, kind: type[nn.Linear]) -> str:
    """The attribute that holds a forward of the module's own, where it has one: its class's, bound."""
    # accelerate's hooks for offloaded and placed weights keep the forward that they call under this name.
    held = "_old_forward" if "_old_forward" in vars(module) else "forward"
    found = vars(module).get(held)
    if found is not None and getattr(found, "__func__", None) is not kind.forward:
        raise ValueError(
            f"the head's forward was replaced by {getattr(found, '__qualname__', type(found).__name__)}, which a fused "
            "head would bypass: take it off first, or put it on afterwards"
        )
    return held
