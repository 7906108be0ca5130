"""Soft values: the worth of a state by the teacher's logits, one float per state, without logits in memory.

Letters: M states, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.checks import check_finite, no_vmap
from tvkd_fast.ops.dispatch import Impl, backend, check_impl, resolve
from tvkd_fast.ops.inputs import as_head, head_input
from tvkd_fast.ops.tiles.exact import accumulation_dtype

ValueFrom = Literal["logits", "logprobs"]


@torch.no_grad()
def linear_lse(
    hidden: Tensor,
    weight: Tensor | Head,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """LSE(z) and LSE(κz) of each state's logits in one pass over the vocabulary: two (M,) float32, no gradient.

    The two sums are all that a soft value is made of (`soft_values`), so they are what a score cache keeps. Arguments
    as for `linear_soft_values`; at κ=1 the two results are one tensor.
    """
    check_impl(impl)
    check_kappa(kappa)
    hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    _check_rows(rows, hidden)
    lse, lse_kappa = _lse_op(
        hidden, head.weight, head.bias, head.softcap, head.logit_scale, kappa, resolve(impl, hidden), rows
    )
    return lse, lse if kappa == 1.0 else lse_kappa


def _lse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    kappa: float,
    impl: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LSE(z) and LSE(κz), the second empty at κ=1: an op's results must not be one tensor."""
    sums = backend(impl).head_sums(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        # To the head a row to leave out is one whose label is ignored; the kept rows' label, 0, is any token.
        labels=None if rows is None else rows.long() - 1,
        ignore_index=-1,
        kappa=None if kappa == 1.0 else kappa,
    )
    lse, lse_kappa = sums.lse, sums.lse_kappa
    check_finite(lse, hidden, weight, bias)
    if rows is not None:
        lse = torch.where(rows, lse, 0.0)
        lse_kappa = None if lse_kappa is None else torch.where(rows, lse_kappa, 0.0)
    return lse, lse.new_empty(0) if lse_kappa is None else lse_kappa


_lse_op = torch.library.custom_op("tvkd_fast::linear_lse", _lse, mutates_args=())
_lse_op.register_vmap(no_vmap("linear_lse"))


@_lse_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    kappa: float,
    impl: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    count = 0 if kappa == 1.0 else hidden.shape[0]
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(count, dtype=dtype)


@torch.no_grad()
def linear_entropy(
    hidden: Tensor,
    weight: Tensor | Head,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """−Σ_a p_a log p_a of each state's softmax, nats, in one pass over the vocabulary: (M,) float32, no gradient.

    Arguments and errors as for `linear_soft_values`.
    """
    check_impl(impl)
    hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    return _entropy_op(hidden, head.weight, head.bias, head.softcap, head.logit_scale, resolve(impl, hidden))


def _entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, impl: str
) -> Tensor:
    entropy = backend(impl).head_sums(hidden, Head(weight, bias, softcap, logit_scale), entropy=True).entropy
    assert entropy is not None
    check_finite(entropy, hidden, weight, bias)
    return entropy


_entropy_op = torch.library.custom_op("tvkd_fast::linear_entropy", _entropy, mutates_args=())
_entropy_op.register_vmap(no_vmap("linear_entropy"))


@_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, impl: str
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))


def linear_soft_values(
    hidden: Tensor,
    weight: Tensor | Head,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    value_scale: float = 1.0,
    value_from: ValueFrom = "logits",
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The teacher's soft value of each state, without ever holding [M, V] logits. No gradient.

    V = b·LSE(κz)/κ from "logits"; V = b·(LSE(κz) − κ·LSE(z))/κ from "logprobs", which is 0 everywhere at κ=1.
    With κ=1 and b the teacher's DPO β the first is V_φ(s) = β log Σ_a exp(Q_φ(s, a)/β) of arXiv 2509.16965, Q_φ = βz.

    Args:
        hidden: [M, D] the teacher's states, s_0 of each response first.
        weight: [V, D] the teacher's head, of hidden's dtype and device; or a `Head`, with all that follows.
        bias: (V,) or None.
        softcap: tanh cap on the logits, or None.
        logit_scale: multiplies product and bias, before the cap.
        kappa: κ > 0, inverse temperature.
        value_scale: b.
        value_from: "logits" or "logprobs".
        rows: (M,) bool, the states to compute; the others' values are 0 and cost what ignored labels cost in
            `linear_logps`. All where None.
        impl: as in `linear_logps`.

    Returns:
        (M,) float32 (float64 for float64 inputs). Memory beyond inputs and result is bounded by 64 MB; on a GPU, whose
        library's products take a workspace, by a 64th of the device's memory, 1 GiB at most.

    Raises:
        ValueError: as `linear_logps`; κ ≤ 0; an unknown value_from; rows that are no (M,) bool on hidden's device.

    Examples:
        >>> import torch
        >>> linear_soft_values(torch.zeros(2, 4), torch.randn(8, 4), value_scale=0.1)  # 0.1·log 8
        tensor([0.2079, 0.2079])
    """
    check_value_from(value_from)
    lse, lse_kappa = linear_lse(
        hidden, weight, bias=bias, softcap=softcap, logit_scale=logit_scale, kappa=kappa, rows=rows, impl=impl
    )
    return soft_values(lse, lse_kappa, kappa=kappa, value_scale=value_scale, value_from=value_from)


def soft_values(
    lse: Tensor, lse_kappa: Tensor, *, kappa: float = 1.0, value_scale: float = 1.0, value_from: ValueFrom = "logits"
) -> Tensor:
    """V from the two sums that `linear_lse` returns or a score cache holds: (M,) and (M,) to (M,)."""
    check_kappa(kappa)
    check_value_from(value_from)
    if not -math.inf < value_scale < math.inf:
        raise ValueError(f"value_scale must be finite (the teacher's DPO β in the paper), got {value_scale}")
    free_energy = lse_kappa if value_from == "logits" else lse_kappa - kappa * lse
    return free_energy * (value_scale / kappa)


def check_kappa(kappa: float) -> None:
    """κ > 0, or a ValueError."""
    if not 0 < kappa < math.inf:
        raise ValueError(f"kappa must be a positive number (an inverse temperature; 1 is the paper's), got {kappa}")


def check_value_from(value_from: str) -> None:
    if value_from not in ("logits", "logprobs"):
        raise ValueError(f"value_from must be 'logits' or 'logprobs', got {value_from!r}")


def _check_rows(rows: Tensor | None, hidden: Tensor) -> None:
    if rows is None:
        return
    if rows.shape != hidden.shape[:1] or rows.dtype != torch.bool:
        raise ValueError(
            f"rows must be ({hidden.shape[0]},) bool, whether to compute each row of hidden, got {tuple(rows.shape)} "
            f"{rows.dtype}"
        )
    if rows.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and rows on {rows.device}: move one of them")
