"""The registered op: the policy's head, the epilogue, and the head's exact gradient with one coefficient a token.

Letters: P pairs, 2P responses, N response tokens, M teacher states, D hidden, V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tvkd_fast.fused.epilogue import torch_epilogue, triton_epilogue
from tvkd_fast.fused.padded import packed_form
from tvkd_fast.kernels.records import Head
from tvkd_fast.losses import TVKDOutput
from tvkd_fast.losses.segments import check_boundaries
from tvkd_fast.losses.shaping import Terminal
from tvkd_fast.ops.checks import check_finite, check_label_range
from tvkd_fast.ops.dispatch import backend
from tvkd_fast.ops.logps import fake_left, gradients_op, scaled_op
from tvkd_fast.ops.registered import check_differentiated_once, wanted_gradients
from tvkd_fast.ops.tiles.exact import accumulation_dtype

_STREAMED = 10
"""The place of `streamed` among the op's arguments; the backward may need those before it."""


def _fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    impl: str,
    workspace_mb: int,
    streamed: bool,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    values: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    psi: Tensor | None,
    beta: float,
    alpha: float,
    gamma: float,
    terminal: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`TVKDOutput`'s seven tensors; then for the backward dL_p/dlogp_t, max z and log Σ exp(z − max z), (N,) each, and
    what `logps_forward` leaves.

    hidden [N, D] of both forms; impl resolved; labels (N,), or [2P, T] where cu_seqlens is None.
    """
    given = packed_form(
        labels,
        ignore_index,
        cu_seqlens=cu_seqlens,
        ref_token_logps=ref_token_logps,
        ref_logps=ref_logps,
        values=values,
        cu_states=cu_states,
        ended=ended,
        psi=psi,
        beta=beta,
        alpha=alpha,
        gamma=gamma,
        terminal=cast(Terminal, terminal),
        label_smoothing=label_smoothing,
    )
    check_boundaries("cu_seqlens", given.cu_seqlens, hidden.shape[0])
    labels = labels.flatten().long()
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
    epilogue = triton_epilogue if impl == "triton" else torch_epilogue
    out, coefficients = epilogue(logps, given)
    return (
        *tensors_of(out),
        coefficients,
        sums.maximum,
        sums.log_total,
        left,
    )


fused_op = torch.library.custom_op("tvkd_fast::fused_linear_tvkd", _fused, mutates_args=())


@fused_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return *fake_numbers(hidden, labels, cu_seqlens), fake_left(hidden, weight, *args[_STREAMED - 7 : _STREAMED - 4])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, cu_seqlens, *ctx.settings, _, ctx.streamed = inputs[: _STREAMED + 1]
    coefficients, maximum, log_total, left = output[-4:]
    ctx.mark_non_differentiable(*output[2:])
    # What no gradient reaches comes as None, and the tokens are spared its zeros.
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    passed = (left,) if ctx.streamed else (hidden, weight, bias, maximum, log_total, left)
    ctx.save_for_backward(labels, cu_seqlens, coefficients, *passed)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("fused_linear_tvkd_loss")
    labels, cu_seqlens, coefficients, *passed = ctx.saved_tensors
    by_token = coefficients * upstream_by_token(grad_loss, grad_losses, labels, cu_seqlens)
    wants, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    labels = labels.flatten()
    if ctx.streamed:
        *_, ignore_index, _ = ctx.settings
        return scaled_op(*passed, by_token, labels, ignore_index, ctx.dtype), None, None, *[None] * len(constants)
    hidden, weight, bias, *sums = passed
    grads = gradients_op(by_token, hidden, weight, bias, labels, *sums, *ctx.settings, *wants)
    return (*wanted_gradients(grads, wants), *[None] * len(constants))


fused_op.register_autograd(_backward, setup_context=_keep)


def upstream_by_token(
    grad_loss: Tensor | None, grad_losses: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Return the factor of a token's dL_p/dlogp: one number where `losses` was not used, else its pair's, (N,)."""
    pairs = pairs_of(labels, cu_seqlens)
    if grad_losses is None:
        assert grad_loss is not None
        return grad_loss / pairs
    by_pair = grad_losses if grad_loss is None else grad_losses + grad_loss / pairs
    by_response = by_pair.repeat(2)
    if cu_seqlens is None:
        return by_response.repeat_interleave(labels.shape[1])
    return by_response.repeat_interleave(cu_seqlens.diff(), output_size=labels.shape[0])


def tensors_of(out: TVKDOutput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `TVKDOutput` in their order."""
    return (
        out.loss,
        out.losses,
        out.chosen_rewards,
        out.rejected_rewards,
        out.margins,
        out.accuracy,
        out.shaping_margins,
    )


def fake_numbers(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Empty tensors like `tensors_of` and the three of tokens, (N,), that both ops return after them."""
    tokens, pairs = (hidden.shape[0],), (pairs_of(labels, cu_seqlens),)
    shapes: list[tuple[int, ...]] = [(), pairs, pairs, pairs, pairs, (), pairs, tokens, tokens, tokens]
    dtype = accumulation_dtype(hidden.dtype)
    return [hidden.new_empty(shape, dtype=dtype) for shape in shapes]


def pairs_of(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    return (labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2
