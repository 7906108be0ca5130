"""`linear_logps`: log-probabilities of labels straight from hidden states, with the exact gradient.

Letters: N tokens, K of them not ignored, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tvkd_fast.ops.checks import check_finite, check_head, check_labels
from tvkd_fast.ops.dispatch import autocast_input, check_impl, without_autocast
from tvkd_fast.ops.tiles import Head, HeadSums, head_gradients, head_sums


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_mode: Literal["exact"] = "exact",
    impl: Literal["auto", "torch"] = "auto",
) -> Tensor:
    """Log-probability of each label, without ever holding [N, V] logits.

    logp_t = z_t[y_t] − LSE(z_t), where z = softcap·tanh(a/softcap) and a = logit_scale·(h·w + bias).

    Args:
        hidden: [N, D] states, packed; `hidden[t]` predicts `labels[t]`. bfloat16, float16, float32 or float64.
        weight: [V, D] rows of the vocabulary head, of hidden's dtype and device.
        labels: (N,) int64 token ids in [0, V), or `ignore_index`.
        bias: (V,) added to the product, or None.
        softcap: Gemma's tanh cap on the logits, or None.
        logit_scale: multiplies product and bias, before the cap (Cohere; Granite's divisor enters as 1/divisor).
        ignore_index: rows with this label are skipped: log-probability 0, no gradient, no arithmetic on a CPU.
        grad_mode: "exact": logits are recomputed tile by tile in the backward, four products in all (three where only
            hidden or only weight wants a gradient, one where nothing does).
        impl: "torch", or "auto" for the best there is.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats. Differentiable once by hidden, weight and bias; what does not
        require a gradient costs none. Memory beyond inputs, result and gradients is bounded by 64 MB whatever N and V
        are (autocast's copy of the weight, where it is on, comes on top, as in any linear layer). Deterministic.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; labels out of range; NaN or inf in hidden or weight, by
            row (these two on CPU tensors; on a GPU, where looking would wait for the device, the result is NaN); a
            DTensor weight, which belongs inside `FusedLMHead`.
    """
    check_impl(impl)
    if grad_mode != "exact":
        raise ValueError(f"grad_mode must be 'exact' in this version, got {grad_mode!r}")
    hidden, weight = autocast_input(hidden), autocast_input(weight)
    bias = None if bias is None else autocast_input(bias)
    check_head(hidden, weight, bias, softcap, logit_scale)
    check_labels(labels, hidden, weight.shape[0], ignore_index)
    with without_autocast(hidden):
        return _LinearLogps.apply(hidden, weight, bias, labels, softcap, logit_scale, ignore_index)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
        ignore_index: int,
    ) -> Tensor:
        kept = _kept_rows(labels, ignore_index)
        kept_labels = labels.long() if kept is None else labels.long()[kept]
        head = Head(weight, bias, softcap, logit_scale)
        sums = head_sums(hidden, head, kept=kept, labels=kept_labels)
        logps = sums.logps
        if kept is None:
            logps = logps.masked_fill_(kept_labels == ignore_index, 0.0)
        else:
            logps = logps.new_zeros(labels.shape).index_copy_(0, kept, logps)
        check_finite(logps, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, labels, kept, sums.maximum, sums.log_total)
        ctx.transforms = (softcap, logit_scale, ignore_index)
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Only create_graph=True comes here with gradients on; a constant would be passed off as a function.
            raise RuntimeError("linear_logps can be differentiated once: its gradient's own gradient is not computed")
        hidden, weight, bias, labels, kept, maximum, log_total = ctx.saved_tensors
        softcap, logit_scale, ignore_index = ctx.transforms
        labels, grad_logps = labels.long(), grad_logps.masked_fill(labels == ignore_index, 0.0)
        if kept is not None:
            labels, grad_logps = labels[kept], grad_logps[kept]
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        with without_autocast(hidden):
            grads = head_gradients(
                hidden,
                Head(weight, bias, softcap, logit_scale),
                labels,
                HeadSums(maximum, log_total),
                grad_logps,
                kept=kept,
                want_hidden=want_hidden,
                want_weight=want_weight,
                want_bias=want_bias,
            )
        return grads.hidden, grads.weight, grads.bias, None, None, None, None


def _kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """(K,) rows to compute, or None for all. A GPU would have to wait for the count, so it computes them all."""
    if labels.device.type != "cpu":
        return None
    kept = labels != ignore_index
    return None if kept.all() else kept.nonzero()[:, 0]
