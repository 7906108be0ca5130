"""`linear_logps`: log-probabilities of labels straight from hidden states, with the exact gradient.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadSums
from tvkd_fast.ops.checks import check_finite, check_label_range, check_labels, check_transforms
from tvkd_fast.ops.dispatch import Impl, backend, check_impl, resolve
from tvkd_fast.ops.gradient import GradMode, HeadGradient, HeadStats, Tail
from tvkd_fast.ops.inputs import as_head, head_input, is_differentiated, is_trained
from tvkd_fast.ops.registered import Gradients, Kept, as_tensors, differentiate, fake_gradients
from tvkd_fast.ops.sparse_logps import sparse_logps
from tvkd_fast.ops.tiles.exact import accumulation_dtype

_SCALED_FLOATS = 2**20


def linear_logps(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_mode: GradMode = "exact",
    eps: float | None = None,
    row_cap: int | None = None,
    tail: Tail = "even",
    seed: int | None = None,
    max_tail: float = 0.1,
    workspace_mb: int = 0,
    stats: HeadStats | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of each label, without ever holding [N, V] logits.

    logp_t = z_t[y_t] − LSE(z_t), where z = softcap·tanh(a/softcap) and a = logit_scale·(h·w + bias).

    Args:
        hidden: [N, D] states, packed; `hidden[t]` predicts `labels[t]`. bfloat16, float16, float32 or float64.
        weight: [V, D] rows of the vocabulary head, of hidden's dtype and device; or a `Head`, which has bias, softcap
            and logit_scale with it.
        labels: (N,) int64 token ids in [0, V), or `ignore_index`.
        bias: (V,) added to the product, or None.
        softcap: Gemma's tanh cap on the logits, or None.
        logit_scale: multiplies product and bias, before the cap (Cohere; Granite's divisor enters as 1/divisor).
        ignore_index: rows with this label are skipped: log-probability 0, no gradient; no arithmetic on a CPU, and none
            on a GPU for a row tile that holds nothing else. On a GPU their states must be finite all the same: weight's
            gradient multiplies them by 0.
        grad_mode: "exact": logits are recomputed tile by tile in the backward, four products in all; three where hidden
            wants no gradient, one where nothing does. Two where only hidden wants one (a frozen head): the forward then
            makes and keeps dlogp/dh, [N, D] float32, and the backward multiplies it by its upstream gradient.
            "sparse": the log-probabilities are the same, the gradient is made of the softmax's entries from `eps` up
            and the label's, which the forward finds; what remains is spread evenly, so that the gradient sums to what
            the exact one sums to. One product and what is gathered; docs/numerics.md has its cost in learning.
            "auto": sparse, and exact for a call with more entries than pay, as timed once per shape and process.
        eps: ε in [0, 2⁻⁴]; None is 2⁻¹⁶ for float32 and float64 inputs, 2⁻¹⁴ for 16-bit ones. 0 keeps everything.
        row_cap: a row with more entries gets the exact gradient, recomputed; None is V/16.
        tail: "even", or "unbiased": an entry p < ε is kept with probability p/ε as ε, by a hash of `seed`, row and
            column, so that each is right on average over seeds.
        seed: of the unbiased tail; None draws one per call from torch's generator (give one under `torch.compile`).
        max_tail: where the mean of what is left out passes this probability, every row gets the exact gradient.
        workspace_mb: MiB that an exact gradient may hold from forward to backward: logits of as many rows as fit, 4·V
            bytes each, are kept and not computed again, which saves one of four products for them; in torch of whole
            blocks of up to 1,024 rows, or of all rows. Triton keeps exponentials in hidden's dtype, in three quarters
            of it, and makes them by the vendor's products.
        stats: a `HeadStats` that a sparse call adds its numbers to.
        impl: "triton" (CUDA and ROCm; no float64), "torch" (anywhere), or "auto": Triton where available. What
            "auto" took, and why, is logged once by the logger "tvkd_fast". Triton's sparse gradient is exact for up to
            8,192 columns of the batch's labels and likeliest tokens, and sparse for the rest.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats. Differentiable once by hidden, weight and bias; what does not
        require a gradient costs none. Deterministic. Memory beyond inputs, result and gradients is bounded by 64 MB
        whatever N and V are, sparse modes' entries (docs/sparse.md) and `workspace_mb` apart; the Triton backward takes
        a 64th of the device's memory, from 32 MiB to 1 GiB, and copies a weight whose rows are not contiguous.
        (Autocast's copy of the weight, where it is on, comes on top, as in any linear layer.)

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; labels out of range; NaN or inf in hidden or
            weight, by row (these two on CPU tensors; on a GPU, where looking would wait for the device, the result is
            NaN); a DTensor weight, which belongs inside `FusedLMHead`; "triton" where it cannot be had.
        RuntimeError: a second derivative, a forward-mode one, a torch.func transform.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(3, 4), torch.eye(5, 4)
        >>> linear_logps(hidden, weight, torch.tensor([0, 4, -100]))
        tensor([-0.9048, -1.9048,  0.0000])
    """
    check_impl(impl)
    settings = HeadGradient(
        grad_mode=grad_mode,
        eps=eps,
        row_cap=row_cap,
        tail=tail,
        seed=seed,
        max_tail=max_tail,
        workspace_mb=workspace_mb,
    )
    head = as_head(weight, bias, softcap, logit_scale)
    check_transforms("linear_logps", hidden, head.weight, head.bias)
    hidden, head = head_input(hidden, head)
    check_labels(labels, hidden)
    resolved = resolve(impl, hidden)
    if grad_mode != "exact" and is_differentiated(hidden, head):
        logps, numbers = sparse_logps(hidden, head, labels, settings, ignore_index=ignore_index, impl=resolved)
        if stats is not None:
            stats.add(numbers)
        return logps
    workspace_mb, streamed = left_for_backward(hidden, head, settings)
    return _logps_op(
        hidden,
        head.weight,
        head.bias,
        labels,
        head.softcap,
        head.logit_scale,
        ignore_index,
        resolved,
        workspace_mb,
        streamed,
    )[0]


def left_for_backward(hidden: Tensor, head: Head, settings: HeadGradient) -> tuple[int, bool]:
    """MiB of logits that the forward may keep; whether it streams, which makes hidden's gradient and keeps that alone.

    It streams where only hidden is differentiated.
    """
    if not is_differentiated(hidden, head):
        return 0, False
    return (settings.workspace_mb, False) if is_trained(head) else (0, True)


def _logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    impl: str,
    workspace_mb: int,
    streamed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (N,); for the backward max z, log Σ exp(z − max z), (N,) each, and dlogp/dh or logits."""
    labels = labels.long()
    check_label_range(labels, weight.shape[0], ignore_index)
    sums, left = backend(impl).logps_forward(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        streamed=streamed,
    )
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    return logps, sums.maximum, sums.log_total, left


def _logps_gradients(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    logits: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    grads = backend(impl).logps_gradients(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        labels.long(),
        HeadSums(maximum, log_total),
        grad_logps,
        logits=logits,
        ignore_index=ignore_index,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )
    return as_tensors(grads, hidden)


def _scaled_derivatives(
    dlogp_dhidden: Tensor, grad_logps: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """grad_logps_t·dlogp_t/dh_t [N, D], rounded once to `dtype`, a block of rows at a time."""
    factors = grad_logps.masked_fill(labels == ignore_index, 0.0)
    out = dlogp_dhidden.new_empty(dlogp_dhidden.shape, dtype=dtype)
    rows = max(1, _SCALED_FLOATS // max(dlogp_dhidden.shape[1], 1))
    for start in range(0, dlogp_dhidden.shape[0], rows):
        block = slice(start, start + rows)
        torch.mul(dlogp_dhidden[block], factors[block, None], out=out[block])
    return out


_logps_op = torch.library.custom_op("tvkd_fast::linear_logps", _logps, mutates_args=())
gradients_op = torch.library.custom_op("tvkd_fast::linear_logps_gradients", _logps_gradients, mutates_args=())
scaled_op = torch.library.custom_op("tvkd_fast::scaled_slopes", _scaled_derivatives, mutates_args=())
gradients_op.register_fake(fake_gradients)


@_logps_op.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = (hidden.shape[0],), accumulation_dtype(hidden.dtype)
    numbers = tuple(hidden.new_empty(shape, dtype=dtype) for _ in range(3))
    return *numbers, fake_left(hidden, weight, *args[-3:])  # type: ignore[return-value]


def fake_left(hidden: Tensor, weight: Tensor, impl: str, workspace_mb: int, streamed: bool) -> Tensor:
    """Return the unwritten tensor that `logps_forward` leaves for the backward."""
    dtype = accumulation_dtype(hidden.dtype)
    if streamed:
        return hidden.new_empty(hidden.shape, dtype=dtype)
    rows = torch.library.get_ctx().new_dynamic_size(min=0) if workspace_mb else 0
    if impl == "triton" and workspace_mb:
        dtype = hidden.dtype
    return hidden.new_empty((rows, weight.shape[0]), dtype=dtype)


@scaled_op.register_fake
def _(dlogp_dhidden: Tensor, *args: Any) -> Tensor:
    return dlogp_dhidden.new_empty(dlogp_dhidden.shape, dtype=args[-1])


def _kept(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
    hidden, weight, bias, labels, *settings, _, streamed = inputs
    _, maximum, log_total, left = output
    if streamed:
        *_, ignore_index, _ = settings
        return (left, labels), (streamed, ignore_index, hidden.dtype)
    return (hidden, weight, bias, labels, maximum, log_total, left), (streamed, *settings)


def _derivative(
    grad_logps: Tensor, kept: Sequence[Any], settings: Sequence[Any], wants: Sequence[bool]
) -> Sequence[Tensor | None]:
    streamed, *settings = settings
    if streamed:
        dlogp_dhidden, labels = kept
        return scaled_op(dlogp_dhidden, grad_logps, labels, *settings), None, None
    grads: Gradients = gradients_op(grad_logps, *kept, *settings, *wants)
    return grads


differentiate(_logps_op, _kept, _derivative)
