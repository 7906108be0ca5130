"""The whole loss in one call, for another trainer's training step: hidden states in, TVKD's loss out, logits never.

The head's statistics, the loss and its derivative by each log-probability are made in the forward; the backward is the
head's exact gradient with one coefficient a token. Whatever depends on the contents of a tensor lies in the bodies of
two registered ops, so that `torch.compile` sees static shapes.

Letters: P pairs, 2P responses (chosen first, then rejected in the same order), N response tokens, M teacher states, D
hidden (each model's own), V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvkd_fast.kernels.head import Head
from tvkd_fast.losses import (
    TVKDOutput,
    check_discount,
    check_preference_settings,
    segment_sums,
    shaping_returns,
    tvkd_loss,
)
from tvkd_fast.losses.segments import check_boundaries
from tvkd_fast.losses.shaping import TERMINALS, Terminal, check_shaping
from tvkd_fast.ops import check_kappa, linear_logps, soft_values
from tvkd_fast.ops.checks import check_finite, check_label_range, check_labels, check_transforms
from tvkd_fast.ops.dispatch import Impl, check_impl, takes_triton
from tvkd_fast.ops.head import head_input, head_sums
from tvkd_fast.ops.logps import _gradients_op
from tvkd_fast.ops.tiles import accumulation_dtype
from tvkd_fast.ops.values import ValueFrom, check_value_from

_NAMED_ROWS = 8


def fused_linear_tvkd_loss(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    cu_states: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
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
        policy_weight: [V, D] the policy's head, of policy_hidden's dtype and device.
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
        impl: as in `linear_logps`; "triton" takes the head and everything after it in kernels.

    Returns:
        `TVKDOutput`, float32 (float64 from a float64 policy). `loss` and `losses` are differentiable once by
        policy_hidden, policy_weight and policy_bias; what does not require a gradient costs none, and no gradient goes
        to teacher or reference. Memory is bounded as in `linear_logps`. Nothing waits for a GPU. Traces whole under
        `torch.compile`, each set of settings as a graph of its own.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit; a reference or a teacher that is missing or
            given twice; a DTensor. On CPU tensors, where looking waits for nothing, also a row of labels with a hole,
            boundaries that do not rise, a response of under 2 states, labels out of range, NaN or inf.
    """
    _check_settings(beta, alpha, gamma, terminal, kappa, value_from, label_smoothing, impl)
    _check_sources(teacher_hidden, teacher_weight, cu_states, ref_logps, ref_hidden, ref_weight, psi, ended, alpha)
    sequences = _check_form(policy_hidden, labels, cu_seqlens, teacher_hidden, cu_states)
    _check_numbers_a_response(
        policy_hidden, sequences, cu_seqlens=cu_seqlens, cu_states=cu_states, ref_logps=ref_logps, psi=psi, ended=ended
    )
    flat_labels = labels.flatten()
    with _naming("policy"):
        hidden, head = head_input(_rows(policy_hidden), Head(policy_weight, policy_bias, softcap, logit_scale))
        check_labels(flat_labels, hidden)
    check_transforms("fused_linear_tvkd_loss", hidden, head.weight, head.bias)

    ref_token_logps = None
    if ref_hidden is not None and ref_weight is not None:
        _check_device("ref_hidden", ref_hidden, hidden)
        with _naming("reference"), torch.no_grad():
            ref_token_logps = linear_logps(
                _rows(ref_hidden),
                ref_weight,
                flat_labels,
                bias=ref_bias,
                softcap=softcap if ref_softcap == "policy" else ref_softcap,
                logit_scale=logit_scale if ref_logit_scale == "policy" else ref_logit_scale,
                ignore_index=ignore_index,
                impl=impl,
            )

    values = None
    if alpha == 0:
        psi = ended = cu_states = None
    elif teacher_hidden is not None and teacher_weight is not None:
        _check_device("teacher_hidden", teacher_hidden, hidden)
        padded_labels = labels if cu_states is None else None
        with _naming("teacher"), torch.no_grad():
            states, teacher = head_input(
                _rows(teacher_hidden), Head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
            )
            values = _teacher_op(
                states,
                teacher.weight,
                teacher.bias,
                padded_labels,
                teacher.softcap,
                teacher.logit_scale,
                kappa,
                beta if value_scale is None else value_scale,
                value_from,
                ignore_index,
                impl,
            )

    numbers = _fused_op(
        hidden,
        head.weight,
        head.bias,
        labels,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        values,
        cu_states,
        ended,
        psi,
        head.softcap,
        head.logit_scale,
        ignore_index,
        beta,
        alpha,
        gamma,
        terminal,
        label_smoothing,
        impl,
    )
    return TVKDOutput(*numbers[:7])


class FusedLinearTVKDLoss(nn.Module):
    """`fused_linear_tvkd_loss` with its settings in the constructor and its tensors in `forward`. No parameters."""

    def __init__(
        self,
        *,
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
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check_settings(beta, alpha, gamma, terminal, kappa, value_from, label_smoothing, impl)
        self.settings: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "teacher_softcap": teacher_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "ref_softcap": ref_softcap,
            "ref_logit_scale": ref_logit_scale,
            "beta": beta,
            "alpha": alpha,
            "gamma": gamma,
            "terminal": terminal,
            "kappa": kappa,
            "value_scale": value_scale,
            "value_from": value_from,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "impl": impl,
        }

    def forward(
        self,
        policy_hidden: Tensor,
        policy_weight: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        cu_states: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        psi: Tensor | None = None,
        ended: Tensor | None = None,
        policy_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> TVKDOutput:
        return fused_linear_tvkd_loss(
            policy_hidden,
            policy_weight,
            labels,
            cu_seqlens,
            teacher_hidden,
            teacher_weight,
            cu_states,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            psi=psi,
            ended=ended,
            policy_bias=policy_bias,
            teacher_bias=teacher_bias,
            ref_bias=ref_bias,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _teacher_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padded_labels: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    kappa: float,
    value_scale: float,
    value_from: str,
    ignore_index: int,
    impl: str,
) -> Tensor:
    """`linear_soft_values`, but that of padded rows, [2P·(T+1), D], only the responses' states are computed."""
    states = None
    if padded_labels is not None:
        # To the head a state to leave out is a row whose label is ignored.
        states = response_states(padded_labels, ignore_index).flatten().long() - 1
    sums = head_sums(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        impl,
        labels=states,
        ignore_index=-1,
        kappa=None if kappa == 1.0 else kappa,
    )
    lse = sums.lse
    check_finite(lse, hidden, weight, bias)
    return soft_values(
        lse,
        lse if sums.lse_kappa is None else sums.lse_kappa,
        kappa=kappa,
        value_scale=value_scale,
        value_from=cast(ValueFrom, value_from),
    )


def _fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    values: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    psi: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    beta: float,
    alpha: float,
    gamma: float,
    terminal: str,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`TVKDOutput`'s seven tensors; then (N,) each for the backward: max z, log Σ exp(z − max z), dL_p/dlogp_t."""
    if cu_seqlens is None:
        check_runs(labels, ignore_index)
        cu_seqlens = torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1]
        if values is not None:
            values, cu_states, ended = _packed_states(values, labels, ignore_index, ended)
    check_boundaries("cu_seqlens", cu_seqlens, hidden.shape[0])
    labels = labels.flatten().long()
    check_label_range(labels, weight.shape[0], ignore_index)
    sums = head_sums(hidden, Head(weight, bias, softcap, logit_scale), impl, labels=labels, ignore_index=ignore_index)
    logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    epilogue = _triton_epilogue if takes_triton(impl, hidden) else _torch_epilogue
    out, coefficients = epilogue(
        logps,
        cu_seqlens,
        ref_token_logps,
        ref_logps,
        values,
        cu_states,
        ended,
        psi,
        beta=beta,
        alpha=alpha,
        gamma=gamma,
        terminal=cast(Terminal, terminal),
        label_smoothing=label_smoothing,
    )
    return (
        out.loss,
        out.losses,
        out.chosen_rewards,
        out.rejected_rewards,
        out.margins,
        out.accuracy,
        out.shaping_margins,
        sums.maximum,
        sums.log_total,
        coefficients,
    )


def _triton_epilogue(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    values: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    psi: Tensor | None,
    *,
    beta: float,
    alpha: float,
    gamma: float,
    terminal: Terminal,
    label_smoothing: float,
) -> tuple[TVKDOutput, Tensor]:
    """The loss, and (N,) dL_p/dlogp_t. Of cu_states and ended what is more than 2P responses' is not read."""
    from tvkd_fast.kernels.preference_epilogue import preference_epilogue

    check_preference_settings(beta, alpha, label_smoothing)
    if values is not None and cu_states is not None:
        check_shaping(values, cu_states, gamma, terminal, ended)
    out = preference_epilogue(
        logps,
        cu_seqlens,
        ref_token_logps=ref_token_logps,
        ref_logps=ref_logps,
        values=values,
        cu_states=None if cu_states is None else cu_states[: cu_seqlens.numel()],
        ended=None if ended is None else ended[: cu_seqlens.numel() - 1],
        psi=psi,
        beta=beta,
        alpha=alpha,
        gamma=gamma,
        terminal=terminal,
        label_smoothing=label_smoothing,
    )
    result = TVKDOutput(
        loss=out.losses.mean(),
        losses=out.losses,
        chosen_rewards=out.chosen_rewards,
        rejected_rewards=out.rejected_rewards,
        margins=out.margins,
        accuracy=(out.margins > 0).to(out.margins.dtype).mean(),
        shaping_margins=out.shaping_margins,
    )
    return result, out.coefficients


def _torch_epilogue(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    values: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    psi: Tensor | None,
    *,
    beta: float,
    alpha: float,
    gamma: float,
    terminal: Terminal,
    label_smoothing: float,
) -> tuple[TVKDOutput, Tensor]:
    """The same by the losses' own functions, and their derivative by its formula."""
    if ref_token_logps is not None:
        ref_logps = segment_sums(ref_token_logps, cu_seqlens)
    assert ref_logps is not None
    if values is not None and cu_states is not None:
        psi = shaping_returns(values, cu_states, gamma=gamma, terminal=terminal, ended=ended)
        psi = psi[: cu_seqlens.numel() - 1]
    out = tvkd_loss(
        segment_sums(logps, cu_seqlens), ref_logps, psi, beta=beta, alpha=alpha, label_smoothing=label_smoothing
    )
    m = out.margins - out.shaping_margins
    by_chosen = -beta * ((1 - label_smoothing) * torch.sigmoid(-m) - label_smoothing * torch.sigmoid(m))
    by_response = torch.cat([by_chosen, -by_chosen])
    return out, by_response.repeat_interleave(cu_seqlens.diff(), output_size=logps.shape[0])


def check_runs(labels: Tensor, ignore_index: int) -> None:
    """Each row of labels [2P, T] holds its tokens in one run; looked at on a CPU only."""
    if labels.device.type != "cpu":
        return
    kept = labels != ignore_index
    begins = kept & ~F.pad(kept, (1, -1)) if kept.shape[1] else kept
    rows = (begins.sum(1) > 1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"labels must hold one contiguous run of tokens a row, ignore_index={ignore_index} around it; rows with "
            f"holes: {', '.join(map(str, rows[:_NAMED_ROWS]))}{' and more' if len(rows) > _NAMED_ROWS else ''}. Pack "
            "such responses: cu_seqlens (and cu_states) say which tokens (and states) are whose, whatever is ignored"
        )


def response_states(labels: Tensor, ignore_index: int) -> Tensor:
    """[2P, T+1] bool: of a run labels[i, a:b] the states a to b, which are one more."""
    kept = labels != ignore_index
    return F.pad(kept, (0, 1)) | F.pad(kept, (1, 0))


def _packed_states(
    values: Tensor, labels: Tensor, ignore_index: int, ended: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded values packed without counting them, which a GPU would have to wait for: one response more takes the rest.

    values (2P·(T+1),) become (2P·(T+1) + 2,), since no response may have less than two states; boundaries and `ended`
    become one more as well.
    """
    kept = response_states(labels, ignore_index)
    order = kept.flatten().logical_not().byte().argsort(stable=True)
    packed = F.pad(values[order], (0, 2))
    cu_states = F.pad(kept.sum(1).cumsum(0), (1, 1))
    cu_states[-1:] = packed.shape[0]
    return packed, cu_states, None if ended is None else F.pad(ended, (0, 1))


_teacher_op = torch.library.custom_op("tvkd_fast::fused_teacher_values", _teacher_values, mutates_args=())
_fused_op = torch.library.custom_op("tvkd_fast::fused_linear_tvkd", _fused, mutates_args=())


@_teacher_op.register_fake
def _(hidden: Tensor, *args: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))


@_fused_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    tokens = (hidden.shape[0],)
    pairs = ((labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2,)
    dtype = accumulation_dtype(hidden.dtype)
    shapes: list[tuple[int, ...]] = [(), pairs, pairs, pairs, pairs, (), pairs, tokens, tokens, tokens]
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, cu_seqlens = inputs[:5]
    softcap, logit_scale, ignore_index = inputs[11:14]
    ctx.settings = (softcap, logit_scale, ignore_index, inputs[-1])
    ctx.mark_non_differentiable(*output[2:])
    # What no gradient reaches comes as None, and the tokens are spared its zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, *output[-3:])


def _backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Only create_graph=True comes here with gradients on; a constant would be passed off as a function.
        raise RuntimeError("fused_linear_tvkd_loss can be differentiated once: its gradient's own is not computed")
    hidden, weight, bias, labels, cu_seqlens, maximum, log_total, coefficients = ctx.saved_tensors
    by_token = coefficients * _upstream(grad_loss, grad_losses, labels, cu_seqlens)
    wants = ctx.needs_input_grad[:3]
    grads = _gradients_op(by_token, hidden, weight, bias, labels.flatten(), maximum, log_total, *ctx.settings, *wants)
    return (*(grad if want else None for grad, want in zip(grads, wants, strict=True)), *[None] * 17)


def _upstream(
    grad_loss: Tensor | None, grad_losses: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """What a token's dL_p/dlogp is multiplied by: one number where `losses` was not used, else its pair's, (N,)."""
    pairs = (labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2
    if grad_losses is None:
        assert grad_loss is not None
        return grad_loss / pairs
    by_pair = grad_losses if grad_loss is None else grad_losses + grad_loss / pairs
    by_response = by_pair.repeat(2)
    if cu_seqlens is None:
        return by_response.repeat_interleave(labels.shape[1])
    return by_response.repeat_interleave(cu_seqlens.diff(), output_size=labels.shape[0])


_fused_op.register_autograd(_backward, setup_context=_keep)


def _check_settings(
    beta: float,
    alpha: float,
    gamma: float,
    terminal: str,
    kappa: float,
    value_from: str,
    label_smoothing: float,
    impl: str,
) -> None:
    check_impl(impl)
    check_value_from(value_from)
    if terminal not in TERMINALS:
        raise ValueError(f"terminal must be one of {', '.join(TERMINALS)}, got {terminal!r}")
    check_discount(gamma)
    if not torch.compiler.is_compiling():
        # A number that changes from step to step has no value yet where a graph is traced: the ops look at it again.
        check_preference_settings(beta, alpha, label_smoothing)
        check_kappa(kappa)


def _check_sources(
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    cu_states: Tensor | None,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    psi: Tensor | None,
    ended: Tensor | None,
    alpha: float,
) -> None:
    """One reference; one teacher, ready or not, or DPO."""
    if (ref_logps is None) == (ref_hidden is None):
        raise ValueError(
            "give one reference: ref_logps, (2P,) sums over the responses, or ref_hidden with ref_weight, the "
            "reference's states and head"
        )
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight go together: the reference's states and its head [V, D]")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight go together: the teacher's states and its head [V, D]")
    if teacher_hidden is not None and psi is not None:
        raise ValueError("give teacher_hidden, from which Ψ is computed, or a ready psi, not both")
    if teacher_hidden is None and (cu_states is not None or ended is not None):
        raise ValueError(
            "cu_states and ended go with teacher_hidden: a ready psi, or DPO, has no states; leave them out"
        )
    if teacher_hidden is None and psi is None and alpha != 0:
        raise ValueError(
            f"alpha={alpha} shapes the loss and nothing says by what: give teacher_hidden and teacher_weight, or psi, "
            "(2P,) shaping returns; alpha=0 is plain DPO"
        )


def _check_form(
    policy_hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    teacher_hidden: Tensor | None,
    cu_states: Tensor | None,
) -> int:
    """2P, where all inputs are packed or all are padded."""
    if cu_seqlens is not None:
        if policy_hidden.dim() != 2 or (teacher_hidden is not None and teacher_hidden.dim() != 2):
            raise ValueError("with cu_seqlens all states are packed, [N, D]; padded ones [2P, T, D] come without")
        if teacher_hidden is not None and cu_states is None:
            raise ValueError("packed teacher_hidden needs cu_states, (2P+1,) boundaries of the responses' states")
        sequences = cu_seqlens.numel() - 1
    else:
        if policy_hidden.dim() != 3 or labels.shape != policy_hidden.shape[:2]:
            raise ValueError(
                "without cu_seqlens policy_hidden must be [2P, T, D] and labels [2P, T], got "
                f"{tuple(policy_hidden.shape)} and {tuple(labels.shape)}; packed ones [N, D] and (N,) need cu_seqlens"
            )
        if cu_states is not None:
            raise ValueError("cu_states goes with cu_seqlens: pack both, or neither")
        states = (labels.shape[0], labels.shape[1] + 1)
        if teacher_hidden is not None and tuple(teacher_hidden.shape[:-1]) != states:
            raise ValueError(
                f"teacher_hidden must be {[*states, 'D']}, one state a row more than labels, got "
                f"{tuple(teacher_hidden.shape)}: it is not shifted. A teacher with its own tokens comes packed"
            )
        sequences = labels.shape[0]
    if sequences < 2 or sequences % 2:
        raise ValueError(f"responses come in pairs, chosen first, then as many rejected, got {sequences}")
    return sequences


def _check_numbers_a_response(hidden: Tensor, sequences: int, **numbers: Tensor | None) -> None:
    for name, tensor in numbers.items():
        if tensor is None:
            continue
        count = sequences + name.startswith("cu_")
        if tensor.shape != (count,):
            hint = " (sum log-probabilities a token by tvkd_fast.losses.segment_sums)" if name == "ref_logps" else ""
            raise ValueError(f"{name} must be ({count},) for {sequences} responses, got {tuple(tensor.shape)}{hint}")
        if name == "ended" and tensor.dtype != torch.bool:
            raise ValueError(f"ended must be bool, got {tensor.dtype}")
        _check_device(name, tensor, hidden)


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"policy_hidden is on {hidden.device} and {name} on {tensor.device}: move one of them")


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Three heads pass the same checks: a refusal says whose it was."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the {model}'s {error}") from error


def _rows(hidden: Tensor) -> Tensor:
    return hidden.flatten(0, 1) if hidden.dim() == 3 else hidden
