"""TVKD's loss after the head, in one launch: ragged sums, shaping returns, losses and their derivatives.

Letters: N tokens, M states, P pairs; 2P sequences, chosen first, then rejected in the same order: pair p is sequences p
and P + p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels.configs import UNTILED
from tvkd_fast.kernels.launch import INTERPRETED, launch, target_of

TERMINALS = ("last_content", "eos", "zero")

_BLOCK = 64 if INTERPRETED else 1024
"""Lanes of a running sum; few in the interpreter, so that short sequences have whole blocks and a partial one."""


@triton.jit
def sequence_sum(per_token_ptr, cu_seqlens_ptr, sequence, BLOCK: tl.constexpr):
    """Σ over one sequence in float64: per lane, then over the lanes, so the other sequences do not change its bits."""
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        token = first + lanes
        total += tl.load(per_token_ptr + token, mask=token < stop, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def shaping_return(
    values_ptr,
    cu_states_ptr,
    ended_ptr,
    sequence,
    gamma,
    TERMINAL: tl.constexpr,
    HAS_ENDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ (γ V(s_{t+1}) − V(s_t)), each state read once: by γ where a step arrives in it, by −1 where one leaves it.

    At γ=1 the states between cancel to a weight of 0, and what is left is V(last kept state) − V(s_0) itself.
    """
    start = tl.load(cu_states_ptr + sequence).to(tl.int64)
    last = tl.load(cu_states_ptr + sequence + 1).to(tl.int64) - 1
    if TERMINAL == "last_content":
        if HAS_ENDED:
            last -= tl.load(ended_ptr + sequence).to(tl.int64)
        else:
            last -= 1
    # Under "zero" the last state has V = 0 by definition: a step leads to it, and it is not read.
    stop = last if TERMINAL == "zero" else last + 1
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        state = first + lanes
        value = tl.load(values_ptr + state, mask=state < stop, other=0.0).to(tl.float64)
        total += value * (gamma * (state > start).to(tl.float64) - (state < last).to(tl.float64))
    return tl.sum(total, 0)


@triton.jit
def fill_sequence(per_token_ptr, cu_seqlens_ptr, sequence, number, BLOCK: tl.constexpr):
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for first in range(start, stop, BLOCK):
        token = first + lanes
        tl.store(per_token_ptr + token, number, mask=token < stop)


@triton.jit
def preference_epilogue_kernel(
    logps_ptr,
    ref_ptr,
    values_ptr,
    ended_ptr,
    cu_seqlens_ptr,
    cu_states_ptr,
    psi_ptr,
    policy_sums_ptr,
    ref_sums_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    margins_ptr,
    shaping_margins_ptr,
    coefficients_ptr,
    beta: tl.float64,
    alpha: tl.float64,
    gamma: tl.float64,
    label_smoothing: tl.float64,
    REF_PER_TOKEN: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_PSI: tl.constexpr,
    HAS_ENDED: tl.constexpr,
    TERMINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Summed log-probabilities of the pair's two sequences, by policy and reference.
    chosen = tl.program_id(0)
    rejected = tl.num_programs(0) + chosen

    policy_w = sequence_sum(logps_ptr, cu_seqlens_ptr, chosen, BLOCK)
    policy_l = sequence_sum(logps_ptr, cu_seqlens_ptr, rejected, BLOCK)
    tl.store(policy_sums_ptr + chosen, policy_w)
    tl.store(policy_sums_ptr + rejected, policy_l)
    if REF_PER_TOKEN:
        ref_w = sequence_sum(ref_ptr, cu_seqlens_ptr, chosen, BLOCK)
        ref_l = sequence_sum(ref_ptr, cu_seqlens_ptr, rejected, BLOCK)
        tl.store(ref_sums_ptr + chosen, ref_w)
        tl.store(ref_sums_ptr + rejected, ref_l)
    else:
        ref_w = tl.load(ref_ptr + chosen).to(tl.float64)
        ref_l = tl.load(ref_ptr + rejected).to(tl.float64)
    rho_w = policy_w - ref_w
    rho_l = policy_l - ref_l
    margin = beta * (rho_w - rho_l)

    # 2. Ψ of both: from the teacher's values, or as it was given; without either this is DPO.
    shaping = tl.full((), 0.0, tl.float64)
    if HAS_VALUES:
        psi_w = shaping_return(values_ptr, cu_states_ptr, ended_ptr, chosen, gamma, TERMINAL, HAS_ENDED, BLOCK)
        psi_l = shaping_return(values_ptr, cu_states_ptr, ended_ptr, rejected, gamma, TERMINAL, HAS_ENDED, BLOCK)
        tl.store(psi_ptr + chosen, psi_w)
        tl.store(psi_ptr + rejected, psi_l)
    if HAS_PSI:
        psi_w = tl.load(psi_ptr + chosen).to(tl.float64)
        psi_l = tl.load(psi_ptr + rejected).to(tl.float64)
    if HAS_VALUES or HAS_PSI:
        # α=0 is DPO whatever Ψ holds, NaN included.
        shaping = tl.where(alpha == 0.0, 0.0, alpha * (psi_w - psi_l))
    m = margin - shaping

    # 3. The loss and its derivative.
    # −log σ(±m) = max(∓m, 0) + log(1 + e), e = exp(−|m|). Triton has no log1p: where 1 + e would drop e's last digits,
    # two terms of the series are right to 5e-12, and on the other side the logarithm is right to 3e-11.
    e = tl.exp(-tl.abs(m))
    log1p_e = tl.where(e < 2.0**-18, e - 0.5 * e * e, tl.log(1.0 + e))
    loss = (1.0 - label_smoothing) * tl.maximum(-m, 0.0) + label_smoothing * tl.maximum(m, 0.0) + log1p_e
    sigma_m = tl.where(m < 0.0, e, 1.0) / (1.0 + e)
    sigma_minus_m = tl.where(m < 0.0, 1.0, e) / (1.0 + e)
    coefficient = beta * ((1.0 - label_smoothing) * sigma_minus_m - label_smoothing * sigma_m)

    # 4. The pair's numbers, and the derivative as the coefficient of each of its tokens.
    tl.store(losses_ptr + chosen, loss)
    tl.store(chosen_rewards_ptr + chosen, beta * rho_w)
    tl.store(rejected_rewards_ptr + chosen, beta * rho_l)
    tl.store(margins_ptr + chosen, margin)
    tl.store(shaping_margins_ptr + chosen, shaping)
    fill_sequence(coefficients_ptr, cu_seqlens_ptr, chosen, -coefficient, BLOCK)
    fill_sequence(coefficients_ptr, cu_seqlens_ptr, rejected, coefficient, BLOCK)


@dataclass(frozen=True)
class EpilogueResult:
    """Numbers of P pairs for a step and its log, float32, without gradients."""

    psi: Tensor | None
    """(2P,): Ψ; the one that was given, as it came; None without shaping."""
    policy_logps: Tensor
    """(2P,): summed log π_θ(y)."""
    ref_logps: Tensor
    """(2P,): summed log π_ref(y); the ones that were given, as they came."""
    losses: Tensor
    """(P,)"""
    chosen_rewards: Tensor
    """(P,): β ρ_w, unshaped."""
    rejected_rewards: Tensor
    """(P,): β ρ_l, unshaped."""
    margins: Tensor
    """(P,): β (ρ_w − ρ_l), unshaped."""
    shaping_margins: Tensor
    """(P,): α (Ψ_w − Ψ_l); zeros without shaping and at α=0."""
    coefficients: Tensor
    """(N,): dL_p/dlog π_θ(y_t), not divided by P."""


def preference_epilogue(
    logps: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    values: Tensor | None = None,
    cu_states: Tensor | None = None,
    ended: Tensor | None = None,
    psi: Tensor | None = None,
    beta: float,
    alpha: float,
    gamma: float,
    terminal: Literal["last_content", "eos", "zero"],
    label_smoothing: float,
) -> EpilogueResult:
    """Token log-probabilities to TVKD's losses and their derivatives, one program a pair:

        Ψ = Σ_t (γ V(s_{t+1}) − V(s_t))
        m = β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l],   ρ = log π_θ(y) − log π_ref(y)
        L_p = −(1−λ) log σ(m) − λ log σ(−m),   dL_p/dlog π_θ(y_t) = ∓β[(1−λ)σ(−m) − λσ(m)], chosen/rejected

    All of it is `segment_sums`, `shaping_returns` and `tvkd_loss` of `tvkd_fast.losses`, with one rounding: everything
    between what is read and what is written is float64. Sums are taken in a fixed order, without atomics: the same bits
    every time, whatever the other pairs of the batch. An infinite m gives the NaN or the infinity that torch gives.

    Args:
        logps: (N,) float32 log π_θ of the kept tokens, packed.
        cu_seqlens: (2P+1,) int32 or int64 boundaries of the sequences; a sequence without tokens sums to 0.
        ref_token_logps, ref_logps: one of the two: the reference's (N,) a token, or (2P,) summed. float32.
        values, cu_states, ended: (M,) float32 teacher values, (2P+1,) int32 or int64 boundaries of the responses'
            states, at least two each, and (2P,) bool, whether a response ends with an end-of-sequence token (None:
            all do).
        psi: (2P,) float32 Ψ in place of values; neither is DPO.
        beta, alpha, label_smoothing: as in `tvkd_loss`; gamma and terminal: as in `shaping_returns`.

    The host reads no tensor: the caller has to check the boundaries.

    Traffic: logps, ref_token_logps and values once each, coefficients written once; a sequence's boundaries and (P,)
    results besides.

    Raises:
        ValueError: arguments that exclude or lack one another, shapes that differ, an unknown terminal, tensors that no
            kernel reads (`target_of`).
    """
    ref = _one_reference(ref_token_logps, ref_logps)
    _check_shaping(values, cu_states, ended, psi, terminal)
    sequences = cu_seqlens.numel() - 1
    _check_shapes(logps.numel(), sequences, ref_token_logps, ref_logps, cu_states, ended, psi)
    target_of(logps)
    pairs = sequences // 2

    def floats(count: int) -> Tensor:
        return logps.new_empty(count, dtype=torch.float32)

    result = EpilogueResult(
        psi=psi if values is None else floats(sequences),
        policy_logps=floats(sequences),
        ref_logps=floats(sequences) if ref_logps is None else ref_logps,
        losses=floats(pairs),
        chosen_rewards=floats(pairs),
        rejected_rewards=floats(pairs),
        margins=floats(pairs),
        shaping_margins=floats(pairs),
        coefficients=floats(logps.numel()),
    )
    launch(
        preference_epilogue_kernel,
        pairs,
        on=logps,
        options=UNTILED,
        logps_ptr=logps.contiguous(),
        ref_ptr=ref.contiguous(),
        values_ptr=None if values is None else values.contiguous(),
        ended_ptr=None if ended is None else ended.contiguous(),
        cu_seqlens_ptr=cu_seqlens.contiguous(),
        cu_states_ptr=None if cu_states is None else cu_states.contiguous(),
        psi_ptr=result.psi if psi is None else psi.contiguous(),
        policy_sums_ptr=result.policy_logps,
        ref_sums_ptr=result.ref_logps if ref_logps is None else None,
        losses_ptr=result.losses,
        chosen_rewards_ptr=result.chosen_rewards,
        rejected_rewards_ptr=result.rejected_rewards,
        margins_ptr=result.margins,
        shaping_margins_ptr=result.shaping_margins,
        coefficients_ptr=result.coefficients,
        beta=beta,
        alpha=alpha,
        gamma=gamma,
        label_smoothing=label_smoothing,
        REF_PER_TOKEN=ref_logps is None,
        HAS_VALUES=values is not None,
        HAS_PSI=psi is not None,
        HAS_ENDED=ended is not None,
        TERMINAL=terminal,
        BLOCK=_BLOCK,
    )
    return result


def _one_reference(per_token: Tensor | None, summed: Tensor | None) -> Tensor:
    given = [x for x in (per_token, summed) if x is not None]
    if len(given) != 1:
        raise ValueError("give either ref_token_logps, (N,) a token, or ref_logps, (2P,) summed")
    return given[0]


def _check_shaping(
    values: Tensor | None, cu_states: Tensor | None, ended: Tensor | None, psi: Tensor | None, terminal: str
) -> None:
    if terminal not in TERMINALS:
        raise ValueError(f"terminal must be one of {', '.join(TERMINALS)}, got {terminal!r}")
    if values is not None and psi is not None:
        raise ValueError("give either values, from which Ψ is computed, or psi")
    if (values is None) != (cu_states is None):
        raise ValueError("values and cu_states, their boundaries, go together")
    if ended is not None and (values is None or ended.dtype != torch.bool):
        raise ValueError(f"ended goes with values and is bool, got {ended.dtype}")


def _check_shapes(
    tokens: int,
    sequences: int,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    psi: Tensor | None,
) -> None:
    if sequences < 2 or sequences % 2:
        raise ValueError(f"cu_seqlens must be (2P+1,), chosen first, then as many rejected, got ({sequences + 1},)")
    for name, tensor, count in (
        ("ref_token_logps", ref_token_logps, tokens),
        ("ref_logps", ref_logps, sequences),
        ("cu_states", cu_states, sequences + 1),
        ("ended", ended, sequences),
        ("psi", psi, sequences),
    ):
        if tensor is not None and tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), got {tuple(tensor.shape)}")
