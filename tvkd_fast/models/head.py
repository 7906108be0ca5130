"""The vocabulary head as a module, and what each family does to its logits afterwards.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tvkd_fast.ops import HeadGradient, HeadStats, linear_logps, linear_lse


@dataclass(frozen=True)
class HeadTransforms:
    """z = softcap·tanh(a/softcap), a = logit_scale·(h·w + bias)."""

    softcap: float | None = None
    logit_scale: float = 1.0


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = {"logit_scale": ("cohere",), "logits_scaling": ("hyperclovax",), "lm_head_multiplier": ("falcon_h1",)}
_DIVISORS = {"logits_scaling": ("granite",)}


def head_transforms(config: Any) -> HeadTransforms:
    """What a family's config says it does after its head: Gemma's cap, Cohere's scale, Granite's divisor, and so on.

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
    with this head's transforms and without logits. `gradient` says how the first is differentiated, and `stats`
    collects what its sparse gradients were made of, where it is set.
    """

    transforms: HeadTransforms
    gradient: HeadGradient = HeadGradient()
    stats: HeadStats | None = None

    @classmethod
    def from_linear(cls, linear: nn.Module, transforms: HeadTransforms) -> FusedLMHead:
        """The same parameters (the very same objects, so ties stay ties) under the fused module."""
        if isinstance(linear, cls):
            linear.transforms = transforms
            return linear
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"the head is a {type(linear).__name__}, not a plain nn.Linear: merge a LoRA adapter on the head first "
                "(merge_and_unload), leave lm_head out of target_modules, or load the head unquantised"
            )
        with torch.device("meta"):
            fused = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        fused.weight, fused.bias, fused.transforms = linear.weight, linear.bias, transforms
        return fused.train(linear.training)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, *, kappa: float | None = None
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
        return linear_logps(hidden, self.weight, labels, **options, **self.gradient_options())

    def gradient_options(self) -> dict[str, Any]:
        """How `linear_logps` is to be differentiated."""
        return {**asdict(self.gradient), "stats": self.stats}
