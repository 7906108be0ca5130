"""`linear_logps`: log-probabilities of labels straight from hidden states, with the exact gradient.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tvkd_fast.kernels.head import Head, HeadSums
from tvkd_fast.ops.checks import check_finite, check_label_range, check_labels, check_transforms
from tvkd_fast.ops.dispatch import Impl, check_impl
from tvkd_fast.ops.head import head_gradients, head_input, head_sums
from tvkd_fast.ops.tiles import accumulation_dtype


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
    impl: Impl = "auto",
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
        ignore_index: rows with this label are skipped: log-probability 0, no gradient; no arithmetic on a CPU, and none
            on a GPU for a row tile that holds nothing else. On a GPU their states must be finite all the same: weight's
            gradient multiplies them by 0.
        grad_mode: "exact": logits are recomputed tile by tile in the backward, four products in all (three where only
            hidden or only weight wants a gradient, one where nothing does).
        impl: "triton" (CUDA and ROCm; no float64), "torch" (anywhere), or "auto": Triton where it can be had. What
            "auto" took, and why, is logged once by the logger "tvkd_fast".

    Returns:
        (N,) float32 (float64 for float64 inputs), nats. Differentiable once by hidden, weight and bias; what does not
        require a gradient costs none. Deterministic. Memory beyond inputs, result and gradients is bounded by 64 MB
        whatever N and V are; the Triton backward of 16-bit inputs takes up to 256 MiB more for float32 sums of hidden's
        gradient, and copies a weight whose rows are not contiguous. (Autocast's copy of the weight, where it is on,
        comes on top, as in any linear layer.)

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; labels out of range; NaN or inf in hidden or weight, by
            row (these two on CPU tensors; on a GPU, where looking would wait for the device, the result is NaN); a
            DTensor weight, which belongs inside `FusedLMHead`; "triton" where it cannot be had.
        RuntimeError: a second derivative, a forward-mode one, a torch.func transform.
    """
    check_impl(impl)
    if grad_mode != "exact":
        raise ValueError(f"grad_mode must be 'exact' in this version, got {grad_mode!r}")
    check_transforms("linear_logps", hidden, weight, bias)
    hidden, head = head_input(hidden, Head(weight, bias, softcap, logit_scale))
    check_labels(labels, hidden)
    logps, _, _ = _logps_op(hidden, head.weight, head.bias, labels, softcap, logit_scale, ignore_index, impl)
    return logps


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and max z and log Σ exp(z − max z) for the backward: (N,) each."""
    labels = labels.long()
    check_label_range(labels, weight.shape[0], ignore_index)
    head = Head(weight, bias, softcap, logit_scale)
    sums = head_sums(hidden, head, impl, labels=labels, ignore_index=ignore_index)
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    return logps, sums.maximum, sums.log_total


def _logps_gradients(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; an empty tensor where none is wanted, since an op returns tensors only."""
    grads = head_gradients(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        impl,
        labels.long(),
        HeadSums(maximum, log_total),
        grad_logps,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )
    return tuple(hidden.new_empty(0) if x is None else x for x in (grads.hidden, grads.weight, grads.bias))  # type: ignore[return-value]


_logps_op = torch.library.custom_op("tvkd_fast::linear_logps", _logps, mutates_args=())
_gradients_op = torch.library.custom_op("tvkd_fast::linear_logps_gradients", _logps_gradients, mutates_args=())


@_logps_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (hidden.shape[0],), accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(shape, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


@_gradients_op.register_fake
def _(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip((hidden, weight, bias), args[-3:], strict=True)
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(x.shape if want and x is not None else (0,)) for x, want in wanted
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *ctx.settings = inputs
    _, maximum, log_total = output
    ctx.mark_non_differentiable(maximum, log_total)
    ctx.save_for_backward(hidden, weight, bias, labels, maximum, log_total)


def _backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Only create_graph=True comes here with gradients on; a constant would be passed off as a function.
        raise RuntimeError("linear_logps can be differentiated once: its gradient's own gradient is not computed")
    wants = ctx.needs_input_grad[:3]
    grads = _gradients_op(grad_logps, *ctx.saved_tensors, *ctx.settings, *wants)
    return (*(grad if want else None for grad, want in zip(grads, wants, strict=True)), *[None] * 5)


_logps_op.register_autograd(_backward, setup_context=_keep)
