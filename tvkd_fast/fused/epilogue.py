"""Log-probabilities to the loss and its derivative by each of them, by the losses' own functions or in one kernel.

Letters: P pairs, 2P responses, N response tokens, M teacher states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.losses import TVKDOutput, check_preference_settings, segment_sums, shaping_returns, tvkd_loss
from tvkd_fast.losses.shaping import Terminal, check_shaping


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The inputs of a loss beside the policy's log-probabilities: one reference; values, psi or neither; settings."""

    cu_seqlens: Tensor
    """(2P+1,) boundaries of the responses' tokens."""
    ref_token_logps: Tensor | None
    """(N,)"""
    ref_logps: Tensor | None
    """(2P,)"""
    values: Tensor | None
    """(M,); states that are nobody's follow as one response more, in `cu_states` and `ended` too."""
    cu_states: Tensor | None
    ended: Tensor | None
    psi: Tensor | None
    """(2P,)"""
    beta: float
    alpha: float
    gamma: float
    terminal: Terminal
    label_smoothing: float


def torch_epilogue(logps: Tensor, given: Preference) -> tuple[TVKDOutput, Tensor]:
    """The loss of (N,) log-probabilities, and (N,) dL_p/dlogp_t by its formula.

    dL_p/dlog π_θ(y_t) = ∓β[(1−λ)σ(−m) − λσ(m)] of the chosen and of the rejected response.
    """
    beta, smoothing = given.beta, given.label_smoothing
    ref_logps, psi = by_response(given)
    out = tvkd_loss(
        segment_sums(logps, given.cu_seqlens), ref_logps, psi, beta=beta, alpha=given.alpha, label_smoothing=smoothing
    )
    m = out.margins - out.shaping_margins
    by_chosen = -beta * ((1 - smoothing) * torch.sigmoid(-m) - smoothing * torch.sigmoid(m))
    coefficients = torch.cat([by_chosen, -by_chosen])
    return out, coefficients.repeat_interleave(given.cu_seqlens.diff(), output_size=logps.shape[0])


def by_response(given: Preference) -> tuple[Tensor, Tensor | None]:
    """Return the reference's log-probabilities and the shaping returns, (2P,) each, from whichever form was given."""
    ref_logps, psi = given.ref_logps, given.psi
    if given.ref_token_logps is not None:
        ref_logps = segment_sums(given.ref_token_logps, given.cu_seqlens)
    assert ref_logps is not None
    if given.values is not None and given.cu_states is not None:
        psi = shaping_returns(
            given.values, given.cu_states, gamma=given.gamma, terminal=given.terminal, ended=given.ended
        )[: given.cu_seqlens.numel() - 1]
    return ref_logps, psi


def triton_epilogue(logps: Tensor, given: Preference) -> tuple[TVKDOutput, Tensor]:
    """The same in one kernel, which reads nothing of the response that is nobody's."""
    from tvkd_fast.kernels.preference_epilogue import preference_epilogue

    responses = given.cu_seqlens.numel() - 1
    check_preference_settings(given.beta, given.alpha, given.label_smoothing)
    if given.values is not None and given.cu_states is not None:
        check_shaping(given.values, given.cu_states, given.gamma, given.terminal, given.ended)
    out = preference_epilogue(
        logps,
        given.cu_seqlens,
        ref_token_logps=given.ref_token_logps,
        ref_logps=given.ref_logps,
        values=given.values,
        cu_states=None if given.cu_states is None else given.cu_states[: responses + 1],
        ended=None if given.ended is None else given.ended[:responses],
        psi=given.psi,
        beta=given.beta,
        alpha=given.alpha,
        gamma=given.gamma,
        terminal=given.terminal,
        label_smoothing=given.label_smoothing,
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
