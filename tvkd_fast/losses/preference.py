"""TVKD's loss; DPO is the same line without shaping.

Letters: P pairs, 2P sequences, chosen rows first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.losses.margins import sigmoid_losses


@dataclass(frozen=True)
class TVKDOutput:
    """The loss and what a trainer shows of it. Only `loss` and `losses` carry gradients.

    Examples:
        >>> import torch
        >>> out = dpo_loss(torch.tensor([-5.0, -9.0]), torch.tensor([-6.0, -8.0]), beta=0.5)
        >>> out.chosen_rewards, out.rejected_rewards, out.accuracy
        (tensor([0.5000]), tensor([-0.5000]), tensor(1.))
    """

    loss: Tensor
    """Scalar: mean over pairs."""
    losses: Tensor
    """(P,): one per pair; sum them and divide by the global number of pairs where gradients are accumulated."""
    chosen_rewards: Tensor
    """(P,): β ρ_w, unshaped."""
    rejected_rewards: Tensor
    """(P,): β ρ_l, unshaped."""
    margins: Tensor
    """(P,): β (ρ_w − ρ_l), unshaped."""
    accuracy: Tensor
    """Scalar: share of pairs with a margin above 0."""
    shaping_margins: Tensor
    """(P,): α (Ψ_w − Ψ_l), what shaping takes from the margin; zeros in DPO."""


def tvkd_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    psi: Tensor | None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> TVKDOutput:
    """Preference loss shaped by a teacher's potential (arXiv 2509.16965):

        m = β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l],   ρ = log π_θ(y) − log π_ref(y)
        L = −(1−λ) log σ(m) − λ log σ(−m), mean over pairs

    so that dL/dlog π_θ(y_t) = ∓β[(1−λ)σ(−m) − λσ(m)]/P for chosen/rejected: one number per pair. Under the minus before
    α the policy's implicit reward carries the shaped reward; a negative α gives the other sign.

    Args:
        policy_logps: (2P,) summed response log-probabilities under the policy, chosen first, then rejected in the same
            order. Differentiable.
        ref_logps: (2P,) the same under the frozen reference; no gradient goes to it, nor to psi.
        psi: (2P,) shaping returns (`shaping_returns`); None is DPO, and so is alpha=0.
        beta: β > 0, strength of the KL term.
        alpha: α, strength and sign of the shaping.
        label_smoothing: λ in [0, 0.5): the share of labels taken to be wrong (conservative DPO).

    Returns:
        `TVKDOutput`, in policy_logps' dtype.

    Raises:
        ValueError: β ≤ 0, λ outside [0, 0.5), α not finite, shapes that differ or an odd number of rows.

    Examples:
        A pair whose policy is its reference: the margin is what the teacher takes from it.

        >>> import torch
        >>> logps = torch.tensor([-5.0, -9.0])
        >>> tvkd_loss(logps, logps, psi=None).loss
        tensor(0.6931)
        >>> tvkd_loss(logps, logps, psi=torch.tensor([0.4, 0.1])).shaping_margins
        tensor([0.3000])
    """
    check_preference_settings(beta, alpha, label_smoothing)
    _check_shapes(policy_logps, ref_logps, psi)
    log_ratios = policy_logps - ref_logps.detach().to(policy_logps.dtype)
    rho_chosen, rho_rejected = log_ratios.chunk(2)
    margins = beta * (rho_chosen - rho_rejected)
    if psi is None or alpha == 0:
        shaping_margins = torch.zeros_like(margins)
    else:
        psi_chosen, psi_rejected = psi.detach().to(margins.dtype).chunk(2)
        shaping_margins = alpha * (psi_chosen - psi_rejected)
    shaped = margins - shaping_margins
    losses = sigmoid_losses(shaped, label_smoothing=label_smoothing)
    margins = margins.detach()
    return TVKDOutput(
        loss=losses.mean(),
        losses=losses,
        chosen_rewards=beta * rho_chosen.detach(),
        rejected_rewards=beta * rho_rejected.detach(),
        margins=margins,
        accuracy=(margins > 0).to(margins.dtype).mean(),
        shaping_margins=shaping_margins.detach(),
    )


def dpo_loss(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> TVKDOutput:
    """DPO (arXiv 2305.18290): `tvkd_loss` without shaping. Arguments, result and errors as there.

    Examples:
        >>> import torch
        >>> dpo_loss(torch.tensor([-5.0, -9.0]), torch.tensor([-6.0, -8.0]), beta=0.5).loss
        tensor(0.3133)
    """
    return tvkd_loss(policy_logps, ref_logps, None, beta=beta, alpha=0.0, label_smoothing=label_smoothing)


def check_preference_settings(beta: float, alpha: float, label_smoothing: float) -> None:
    """β > 0, α finite, λ in [0, 0.5), or a ValueError that names the one that is not."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number (0.1 is usual), got {beta}: at 0 the policy is never moved")
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha must be finite (0 is DPO), got {alpha}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}: at 0.5 a label says nothing")


def _check_shapes(policy_logps: Tensor, ref_logps: Tensor, psi: Tensor | None) -> None:
    if policy_logps.dim() != 1 or policy_logps.shape[0] == 0 or policy_logps.shape[0] % 2:
        raise ValueError(
            f"policy_logps must be (2P,), chosen rows first, then as many rejected, got {tuple(policy_logps.shape)}"
        )
    for name, tensor in (("ref_logps", ref_logps), ("psi", psi)):
        if tensor is not None and tensor.shape != policy_logps.shape:
            raise ValueError(f"{name} must be {tuple(policy_logps.shape)} like policy_logps, got {tuple(tensor.shape)}")
