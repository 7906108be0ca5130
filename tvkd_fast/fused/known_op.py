"""The registered op whose forward makes the head's gradient; the backward multiplies it by what comes from above.

Letters: P pairs, 2P responses, N response tokens, M teacher states, D hidden, V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from tvkd_fast.fused.epilogue import Preference, by_response, torch_epilogue
from tvkd_fast.fused.op import fake_numbers, pairs_of, tensors_of, upstream_by_token
from tvkd_fast.fused.padded import packed_form
from tvkd_fast.kernels.records import Head
from tvkd_fast.losses.segments import check_boundaries
from tvkd_fast.losses.shaping import Terminal
from tvkd_fast.ops.known import Upstream, gradients_in_forward, recomputed
from tvkd_fast.ops.registered import as_tensors, check_differentiated_once, unwritten, wanted_gradients
from tvkd_fast.ops.tiles.forward_gradients import Derivative


def derivative_of(given: Preference) -> Derivative:
    """The derivative of the mean loss by each response's log-probability."""
    ref_logps, psi = by_response(given)
    pairs = (given.cu_seqlens.numel() - 1) // 2
    alone = replace(given, ref_token_logps=None, values=None, cu_states=None, ended=None)

    def derivative(logps: Tensor, responses: Tensor) -> Tensor:
        block = replace(
            alone,
            cu_seqlens=torch.arange(len(logps) + 1, device=logps.device),
            ref_logps=ref_logps[responses],
            psi=None if psi is None else psi[responses],
        )
        return torch_epilogue(logps, block)[1] / pairs

    return derivative


def _known(
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
    want_hidden: bool,
    want_weight: bool,
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
    """`TVKDOutput`'s seven tensors; dL_p/dlogp_t and LSE(z) in two parts, (N,) each; then the mean loss's gradients by
    hidden, weight and bias, empty where none is wanted.

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
    made = gradients_in_forward(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        labels,
        Upstream(derivative_of(given), given.cu_seqlens),
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        impl=impl,
        wants=(want_hidden, want_weight, want_bias),
    )
    out, coefficients = torch_epilogue(made.logps, given)
    return (
        *tensors_of(out),
        coefficients,
        made.sums.maximum,
        made.sums.log_total,
        *as_tensors(made.grads, hidden),
    )


known_op = torch.library.custom_op("tvkd_fast::fused_linear_tvkd_known", _known, mutates_args=())


@known_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return *fake_numbers(hidden, labels, cu_seqlens), *unwritten((hidden, weight, bias), args[5:8])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, cu_seqlens, *ctx.settings = inputs[:9]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, *output[7:10])
    # Not saved but held, so that the first backward can scale them where they lie.
    ctx.made = output[10:]


def _backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("fused_linear_tvkd_loss")
    hidden, weight, bias, labels, cu_seqlens, coefficients, maximum, log_total = ctx.saved_tensors
    wants, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    made, ctx.made = ctx.made, None
    grads: Sequence[Tensor]
    if grad_losses is None and made is not None:
        assert grad_loss is not None
        grads = [grad.mul_(grad_loss) for grad in made]
    else:
        by_token = upstream_by_token(grad_loss, grad_losses, labels, cu_seqlens)
        if made is not None and not any(wants[1:]):
            # Each token's dH is its own, and was made under 1/P for what comes now.
            pairs = pairs_of(labels, cu_seqlens)
            grads = (made[0] * (by_token * pairs)[:, None], *made[1:])
        else:
            # Pairs are weighted otherwise than by their mean, or it is the second time: computed anew.
            sums = (maximum, log_total)
            upstream = coefficients * by_token
            grads = recomputed(upstream, hidden, weight, bias, labels.flatten(), *sums, ctx.settings, wants)
    return (*wanted_gradients(grads, wants), *[None] * len(constants))


known_op.register_autograd(_backward, setup_context=_keep)
