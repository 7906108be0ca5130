"""The registered op whose forward makes the head's gradient; the backward multiplies it by what comes from above.

Letters: P pairs, 2P responses, N response tokens, M teacher states, D hidden, V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tvkd_fast.fused.epilogue import torch_epilogue
from tvkd_fast.fused.known import known_gradients
from tvkd_fast.fused.op import fake_numbers, tensors_of, upstream_by_token
from tvkd_fast.fused.padded import packed_form
from tvkd_fast.kernels.records import Head
from tvkd_fast.losses.segments import check_boundaries
from tvkd_fast.losses.shaping import Terminal
from tvkd_fast.ops.checks import check_finite, check_label_range
from tvkd_fast.ops.logps import gradients_op
from tvkd_fast.ops.registered import Gradients, as_tensors, check_differentiated_once, wanted_gradients


def _known(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    want_hidden: bool,
    want_bias: bool,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`TVKDOutput`'s seven tensors; dL_p/dlogp_t, max z and log Σ exp(z − max z), (N,) each; then the gradients of the
    mean loss by hidden, weight and bias, empty where none is wanted.

    hidden [N, D] of both forms; labels (N,), or [2P, T] where cu_seqlens is None.
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
    head = Head(weight, bias, softcap, logit_scale)
    sums, logps, grads = known_gradients(
        hidden, head, labels, given, ignore_index=ignore_index, want_hidden=want_hidden, want_bias=want_bias
    )
    check_finite(logps, hidden, weight, bias)
    out, coefficients = torch_epilogue(logps, given)
    return (
        *tensors_of(out),
        coefficients,
        sums.maximum,
        sums.log_total,
        *as_tensors(grads, hidden),
    )


known_op = torch.library.custom_op("tvkd_fast::fused_linear_tvkd_known", _known, mutates_args=())


@known_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    want_hidden, want_bias = args[3:5]
    grads = (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight),
        torch.empty_like(bias) if want_bias and bias is not None else hidden.new_empty(0),
    )
    return *fake_numbers(hidden, labels, cu_seqlens), *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, cu_seqlens, *ctx.transforms = inputs[:8]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, *output[7:])


def _backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("fused_linear_tvkd_loss")
    hidden, weight, bias, labels, cu_seqlens, coefficients, maximum, log_total, *made = ctx.saved_tensors
    wants, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    if grad_losses is None:
        assert grad_loss is not None
        grads = [grad * grad_loss for grad in made]
    else:
        # Pairs are weighted otherwise than by their mean: computed anew, from the forward's sums.
        by_token = coefficients * upstream_by_token(grad_loss, grad_losses, labels, cu_seqlens)
        nothing = hidden.new_empty((0, weight.shape[0]))
        sums = (maximum, log_total, nothing)
        found: Gradients = gradients_op(
            by_token, hidden, weight, bias, labels.flatten(), *sums, *ctx.transforms, "torch", *wants
        )
        grads = list(found)
    return (*wanted_gradients(grads, wants), *[None] * len(constants))


known_op.register_autograd(_backward, setup_context=_keep)
