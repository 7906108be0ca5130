"""The fused loss as a function: it checks, computes reference and teacher by the ops, and calls the registered op.

Letters: P pairs, 2P responses (chosen first, then rejected in the same order), N response tokens, M teacher states, D
hidden (each model's own), V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.fused.arguments import (
    check_device,
    check_form,
    check_numbers_a_response,
    check_settings,
    check_sources,
)
from tvkd_fast.fused.epilogue import torch_epilogue
from tvkd_fast.fused.known_op import known_op
from tvkd_fast.fused.op import fused_op
from tvkd_fast.fused.padded import packed_form, response_states, rows_of
from tvkd_fast.kernels.records import Head
from tvkd_fast.losses import TVKDOutput
from tvkd_fast.losses.shaping import Terminal
from tvkd_fast.ops import HeadGradient, HeadStats, linear_logps, linear_soft_values
from tvkd_fast.ops.checks import check_labels, check_transforms, naming
from tvkd_fast.ops.dispatch import Impl, resolve
from tvkd_fast.ops.inputs import as_head, head_input
from tvkd_fast.ops.known import makes_in_forward
from tvkd_fast.ops.logps import left_for_backward
from tvkd_fast.ops.values import ValueFrom

EXACT = HeadGradient()


def fused_linear_tvkd_loss(
    policy_hidden: Tensor,
    policy_weight: Tensor | Head,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | Head | None = None,
    cu_states: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | Head | None = None,
    psi: Tensor | None = None,
    ended: Tensor | None = None,
    policy_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    ref_softcap: float | Literal["policy"] | None = "policy",
    ref_logit_scale: float | Literal["policy"] = "policy",
    beta: float = 0.1,
    alpha: float = 1.0,
    gamma: float = 1.0,
    terminal: Terminal = "last_content",
    kappa: float = 1.0,
    value_scale: float | None = None,
    value_from: ValueFrom = "logits",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gradient: HeadGradient = EXACT,
    stats: HeadStats | None = None,
    impl: Impl = "auto",
) -> TVKDOutput:
    """TVKD's loss (arXiv 2509.16965) from hidden states, without ever holding logits of policy, reference or teacher.

        V = b·LSE(κz)/κ of each teacher state z,   Ψ = Σ_t (γ V(s_{t+1}) − V(s_t)),   ρ = log π_θ(y) − log π_ref(y)
        L = −(1−λ) log σ(m) − λ log σ(−m),   m = β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l],   mean over pairs

    It is `linear_logps`, `linear_soft_values`, `shaping_returns` and `tvkd_loss` put together: their numbers, in fewer
    launches. `hidden[t]` predicts `labels[t]`: the caller shifts.

    Packed inputs carry boundaries, and ignored labels may stand anywhere. Padded inputs come without `cu_seqlens` and
    `cu_states`: of row i the labels outside one contiguous run labels[i, a:b] are `ignore_index`, and the response's
    states are teacher_hidden[i, a:b+1]. What lies outside does not count, though it must be finite.

    Args:
        policy_hidden: [N, D] packed, or [2P, T, D]. bfloat16, float16, float32 or float64, as all states here.
        policy_weight: [V, D] the policy's head, of policy_hidden's dtype and device. Here and for teacher and reference
            a `Head` may stand, which has bias, softcap and logit_scale with it.
        labels: (N,) or [2P, T] int64 token ids in [0, V), or `ignore_index`.
        cu_seqlens: (2P+1,) int boundaries of the packed responses; None for padded inputs.
        teacher_hidden: [M, D] packed, s_0 of each response first, or [2P, T+1, D]. The teacher's tokens may be its own
            where packed. None where psi is given, and in plain DPO (alpha=0).
        teacher_weight: [V, D] the teacher's head.
        cu_states: (2P+1,) int boundaries of the responses' states, at least 2 each; None for padded inputs.
        ref_logps: (2P,) the reference's log-probabilities summed over each response.
        ref_hidden, ref_weight: in place of ref_logps: the reference's states, shaped like policy_hidden, and its head.
        psi: (2P,) shaping returns in place of a teacher.
        ended: (2P,) bool, whether each response ends with an end-of-sequence token (`shaping_returns`).
        policy_bias, teacher_bias, ref_bias: (V,) or None.
        softcap, logit_scale: of the policy's logits, as in `linear_logps`.
        teacher_softcap, teacher_logit_scale: of the teacher's.
        ref_softcap, ref_logit_scale: of the reference's; "policy": the policy's.
        beta, alpha, label_smoothing: as in `tvkd_loss`. At alpha=0, DPO, a teacher is not passed through.
        gamma, terminal: as in `shaping_returns`.
        kappa, value_from: as in `linear_soft_values`.
        value_scale: b; beta where None, which is the paper's.
        gradient: how the policy's head is differentiated: exactly, or sparse (`linear_logps`), by `HeadGradient`.
        stats: a `HeadStats` that a sparse call adds its numbers to.
        impl: as in `linear_logps`; "triton" takes the head and everything after it in kernels (with a sparse gradient
            the head alone).

    Returns:
        `TVKDOutput`, float32 (float64 from a float64 policy). `loss` and `losses` are differentiable once by
        policy_hidden, policy_weight and policy_bias; what does not require a gradient costs none, and no gradient goes
        to teacher or reference. In Triton, and on a CPU, the exact gradient of `loss` is made in the forward, pair by
        pair in a block of `gradient.workspace_mb` MiB (0: 104 on a CPU; more rows take less time): three products and
        not four, two where head or states want none; that of `losses`, and of a second backward, is recomputed.
        16-bit gradients are summed in float32 beside it. Elsewhere memory is bounded as in `linear_logps`. Nothing
        waits for a GPU. Traces whole under `torch.compile`, each set of settings as a graph of its own.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; a reference or a teacher that is missing or
            given twice; a DTensor. On CPU tensors, where looking waits for nothing, also a row of labels with a hole,
            boundaries that do not rise, a response of under 2 states, labels out of range, NaN or inf.

    Examples:
        One pair, a response of 3 tokens and one of 2, packed; their states are one more each.

        >>> import torch
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
        >>> teacher_hidden, teacher_weight = torch.randn(7, 16), torch.randn(20, 16)
        >>> cu_seqlens, cu_states = torch.tensor([0, 3, 5]), torch.tensor([0, 4, 7])
        >>> labels = torch.randint(20, (5,))
        >>> out = fused_linear_tvkd_loss(
        ...     hidden, weight, labels, cu_seqlens, teacher_hidden, teacher_weight, cu_states, ref_logps=torch.zeros(2)
        ... )
        >>> out.loss.backward()
        >>> hidden.grad.shape
        torch.Size([5, 8])
    """
    check_settings(beta, alpha, gamma, terminal, kappa, value_from, label_smoothing, impl)
    check_sources(teacher_hidden, teacher_weight, cu_states, ref_logps, ref_hidden, ref_weight, psi, ended, alpha)
    sequences = check_form(policy_hidden, labels, cu_seqlens, teacher_hidden, cu_states)
    check_numbers_a_response(
        policy_hidden, sequences, cu_seqlens=cu_seqlens, cu_states=cu_states, ref_logps=ref_logps, psi=psi, ended=ended
    )
    flat_labels = labels.flatten()
    with naming("policy"):
        hidden, head = head_input(rows_of(policy_hidden), as_head(policy_weight, policy_bias, softcap, logit_scale))
        check_labels(flat_labels, hidden)
    check_transforms("fused_linear_tvkd_loss", hidden, head.weight, head.bias)

    ref_token_logps = None
    if ref_hidden is not None and ref_weight is not None:
        check_device("ref_hidden", ref_hidden, hidden)
        with naming("reference"), torch.no_grad():
            ref_token_logps = linear_logps(
                rows_of(ref_hidden),
                _reference_head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, head),
                flat_labels,
                ignore_index=ignore_index,
                impl=impl,
            )

    values = None
    if alpha == 0:
        psi = ended = cu_states = None
    elif teacher_hidden is not None and teacher_weight is not None:
        check_device("teacher_hidden", teacher_hidden, hidden)
        with naming("teacher"):
            values = linear_soft_values(
                rows_of(teacher_hidden),
                as_head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale),
                kappa=kappa,
                value_scale=beta if value_scale is None else value_scale,
                value_from=value_from,
                rows=response_states(labels, ignore_index).flatten() if cu_states is None else None,
                impl=impl,
            )

    if gradient.grad_mode != "exact":
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
            terminal=terminal,
            label_smoothing=label_smoothing,
        )
        logps = linear_logps(
            hidden,
            head,
            flat_labels,
            ignore_index=ignore_index,
            stats=stats,
            impl=impl,
            **gradient.options(),
        )
        return torch_epilogue(logps, given)[0]
    resolved = resolve(impl, hidden)
    if makes_in_forward(hidden, head, gradient, resolved):
        known = known_op(
            hidden,
            head.weight,
            head.bias,
            labels,
            cu_seqlens,
            head.softcap,
            head.logit_scale,
            ignore_index,
            resolved,
            gradient.workspace_mb,
            hidden.requires_grad,
            head.weight.requires_grad,
            head.bias is not None and head.bias.requires_grad,
            ref_token_logps,
            ref_logps,
            values,
            cu_states,
            ended,
            psi,
            beta,
            alpha,
            gamma,
            terminal,
            label_smoothing,
        )
        return TVKDOutput(*known[:7])
    workspace, streamed = left_for_backward(hidden, head, gradient)
    numbers = fused_op(
        hidden,
        head.weight,
        head.bias,
        labels,
        cu_seqlens,
        head.softcap,
        head.logit_scale,
        ignore_index,
        resolved,
        workspace,
        streamed,
        ref_token_logps,
        ref_logps,
        values,
        cu_states,
        ended,
        psi,
        beta,
        alpha,
        gamma,
        terminal,
        label_smoothing,
    )
    return TVKDOutput(*numbers[:7])


def _reference_head(
    weight: Tensor | Head,
    bias: Tensor | None,
    softcap: float | Literal["policy"] | None,
    logit_scale: float | Literal["policy"],
    policy: Head,
) -> Head:
    """The reference's head; what is "policy" is the policy's, but where a whole `Head` was given."""
    if isinstance(weight, Head):
        return as_head(
            weight,
            bias,
            None if softcap == "policy" else softcap,
            1.0 if logit_scale == "policy" else logit_scale,
        )
    return Head(
        weight,
        bias,
        policy.softcap if softcap == "policy" else softcap,
        policy.logit_scale if logit_scale == "policy" else logit_scale,
    )
