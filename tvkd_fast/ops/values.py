"""Soft values: what the teacher's logits say a state is worth, one float a state, without logits.

Letters: M states, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.ops.checks import check_finite, check_head
from tvkd_fast.ops.dispatch import autocast_input, check_impl, without_autocast
from tvkd_fast.ops.tiles import Head, head_sums

ValueFrom = Literal["logits", "logprobs"]


@torch.no_grad()
def linear_lse(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    impl: Literal["auto", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """LSE(z) and LSE(κz) of each state's logits in one pass over the vocabulary: two (M,) float32, no gradient.

    The two sums are all that a soft value is made of (`soft_values`), so they are what a score cache keeps. Arguments
    as for `linear_soft_values`; at κ=1 the two results are one tensor.
    """
    check_impl(impl)
    check_kappa(kappa)
    hidden, weight = autocast_input(hidden), autocast_input(weight)
    bias = None if bias is None else autocast_input(bias)
    check_head(hidden, weight, bias, softcap, logit_scale)
    with without_autocast(hidden):
        sums = head_sums(hidden, Head(weight, bias, softcap, logit_scale), kappa=None if kappa == 1.0 else kappa)
    lse = sums.lse
    check_finite(lse, hidden, weight, bias)
    return lse, lse if sums.lse_kappa is None else sums.lse_kappa


def linear_soft_values(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    value_scale: float = 1.0,
    value_from: ValueFrom = "logits",
    impl: Literal["auto", "torch"] = "auto",
) -> Tensor:
    """The teacher's soft value of each state, without ever holding [M, V] logits. No gradient.

    V = b·LSE(κz)/κ from "logits"; V = b·(LSE(κz) − κ·LSE(z))/κ from "logprobs", which is 0 everywhere at κ=1.
    With κ=1 and b the teacher's DPO β the first is V_φ(s) = β log Σ_a exp(Q_φ(s, a)/β) of arXiv 2509.16965, Q_φ = βz.

    Args:
        hidden: [M, D] the teacher's states, s_0 of each response first.
        weight: [V, D] the teacher's head, of hidden's dtype and device.
        bias: (V,) or None.
        softcap: tanh cap on the logits, or None.
        logit_scale: multiplies product and bias, before the cap.
        kappa: κ > 0, inverse temperature.
        value_scale: b.
        value_from: "logits" or "logprobs".
        impl: "torch", or "auto" for the best there is.

    Returns:
        (M,) float32 (float64 for float64 inputs). Memory beyond inputs and result is bounded by 64 MB.

    Raises:
        ValueError: as `linear_logps`; κ ≤ 0; an unknown value_from.
    """
    check_value_from(value_from)
    lse, lse_kappa = linear_lse(
        hidden, weight, bias=bias, softcap=softcap, logit_scale=logit_scale, kappa=kappa, impl=impl
    )
    return soft_values(lse, lse_kappa, kappa=kappa, value_scale=value_scale, value_from=value_from)


def soft_values(
    lse: Tensor, lse_kappa: Tensor, *, kappa: float = 1.0, value_scale: float = 1.0, value_from: ValueFrom = "logits"
) -> Tensor:
    """V from the two sums that `linear_lse` returns or a score cache holds: (M,) and (M,) to (M,)."""
    check_kappa(kappa)
    check_value_from(value_from)
    if not math.isfinite(value_scale):
        raise ValueError(f"value_scale must be finite (the teacher's DPO β in the paper), got {value_scale}")
    free_energy = lse_kappa if value_from == "logits" else lse_kappa - kappa * lse
    return free_energy * (value_scale / kappa)


def check_kappa(kappa: float) -> None:
    """κ > 0, or a ValueError."""
    if not (kappa > 0 and math.isfinite(kappa)):
        raise ValueError(f"kappa must be a positive number (an inverse temperature; 1 is the paper's), got {kappa}")


def check_value_from(value_from: str) -> None:
    if value_from not in ("logits", "logprobs"):
        raise ValueError(f"value_from must be 'logits' or 'logprobs', got {value_from!r}")
