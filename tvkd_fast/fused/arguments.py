"""The refusals of the fused loss before anything is computed. No tensor's numbers are read here.

Letters: P pairs, 2P responses, N response tokens, D hidden, V vocabulary, T tokens of a padded row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvkd_fast.losses import check_discount, check_preference_settings
from tvkd_fast.losses.shaping import TERMINALS
from tvkd_fast.ops import Head, check_kappa
from tvkd_fast.ops.dispatch import check_impl
from tvkd_fast.ops.values import check_value_from


def check_settings(
    beta: float,
    alpha: float,
    gamma: float,
    terminal: str,
    kappa: float,
    value_from: str,
    label_smoothing: float,
    impl: str,
) -> None:
    """Known names, numbers in their ranges."""
    check_impl(impl)
    check_value_from(value_from)
    if terminal not in TERMINALS:
        raise ValueError(f"terminal must be one of {', '.join(TERMINALS)}, got {terminal!r}")
    check_discount(gamma)
    if not torch.compiler.is_compiling():
        # A number that changes from step to step has no value yet where a graph is traced: the ops look at it again.
        check_preference_settings(beta, alpha, label_smoothing)
        check_kappa(kappa)


def check_sources(
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | Head | None,
    cu_states: Tensor | None,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | Head | None,
    psi: Tensor | None,
    ended: Tensor | None,
    alpha: float,
) -> None:
    """Refuse all but one reference, and one teacher, ready or not, or DPO."""
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


def check_form(
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


def check_numbers_a_response(hidden: Tensor, sequences: int, **numbers: Tensor | None) -> None:
    """Each (2P,), boundaries (2P+1,), on hidden's device; `ended` bool."""
    for name, tensor in numbers.items():
        if tensor is None:
            continue
        count = sequences + name.startswith("cu_")
        if tensor.shape != (count,):
            hint = " (sum log-probabilities a token by tvkd_fast.losses.segment_sums)" if name == "ref_logps" else ""
            raise ValueError(f"{name} must be ({count},) for {sequences} responses, got {tuple(tensor.shape)}{hint}")
        if name == "ended" and tensor.dtype != torch.bool:
            raise ValueError(f"ended must be bool, got {tensor.dtype}")
        check_device(name, tensor, hidden)


def check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"policy_hidden is on {hidden.device} and {name} on {tensor.device}: move one of them")
