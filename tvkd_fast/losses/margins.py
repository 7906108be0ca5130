"""Losses of a pair by its margin, and the odds of a response.

Letters: P pairs, S responses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid_losses(margins: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """−(1−λ) log σ(m) − λ log σ(−m) (P,) of margins m (P,): DPO's loss, conservative where λ > 0. Differentiable.

    Examples:
        >>> import torch
        >>> sigmoid_losses(torch.tensor([0.0, 2.0]), label_smoothing=0.1)
        tensor([0.6931, 0.3269])
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def robust_losses(margins: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """[−(1−λ) log σ(m) + λ log σ(−m)] / (1−2λ) (P,) of margins m (P,): robust DPO (arXiv 2403.00409). Differentiable.

    Its mean over labels that are flipped with probability λ is −log σ(m) under the true ones. It is not bounded below:
    at large margins it falls by λ/(1−2λ) per nat.

    Examples:
        >>> import torch
        >>> robust_losses(torch.tensor([0.0, 2.0]), label_smoothing=0.1)
        tensor([ 0.6931, -0.1231])
    """
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)
    return losses / (1 - 2 * label_smoothing)


def distillation_errors(margins: Tensor, rewards: Tensor) -> Tensor:
    """(Δr_k − m)² [K, P] of margins m (P,) and of K rewards [K, 2P] of the responses, chosen ones first.

    Differentiable by the margins alone.

    Examples:
        >>> import torch
        >>> distillation_errors(torch.tensor([2.0]), torch.tensor([[5.0, 1.0], [3.0, 2.0]]))
        tensor([[4.],
                [1.]])
    """
    chosen, rejected = rewards.detach().to(margins.dtype).chunk(2, dim=1)
    return (chosen - rejected - margins).square()


def labelled_losses(margins: Tensor, desirable: Tensor) -> Tensor:
    """1 − σ(m) where desirable, 1 − σ(−m) elsewhere (P,), of single responses' margins m (P,) over a baseline, and of
    their labels (P,) bool: KTO (arXiv 2402.01306). Differentiable by the margins.

    Examples:
        >>> import torch
        >>> labelled_losses(torch.tensor([2.0, 2.0]), torch.tensor([True, False]))
        tensor([0.1192, 0.8808])
    """
    return torch.sigmoid(torch.where(desirable, -margins, margins))


def log_odds(logps: Tensor) -> Tensor:
    """log p − log(1 − p) (S,) of log-probabilities log p < 0 (S,); +inf at 0. Differentiable.

    Examples:
        >>> import torch
        >>> log_odds(torch.tensor([0.5, 0.9]).log())
        tensor([0.0000, 2.1972])
    """
    # log(1 − p) by the form that keeps the digits; the other is given a number whose gradient is finite.
    near = logps > -math.log(2)
    likely = torch.expm1(logps.where(near, -1.0)).neg().log()
    unlikely = torch.log1p(-torch.exp(logps.where(~near, -1.0)))
    return logps - likely.where(near, unlikely)


def on_policy_weights(logps: Tensor, log_collisions: Tensor, lengths: Tensor) -> Tensor:
    """min(1, Π_y exp(mean over tokens of log p_y − log Σ_v p_v²)) (P,) of pairs' responses y: WPO (arXiv 2406.11827).

    Args:
        logps: (2P,) log-probabilities summed over each response's tokens, chosen ones first.
        log_collisions: (2P,) likewise log Σ_v p_v², by which a token that is sampled weighs 1 on average.
        lengths: (2P,) tokens of each response.

    Returns:
        (P,), without a gradient.

    Examples:
        >>> import torch
        >>> on_policy_weights(torch.tensor([-4.0, -9.0]), torch.tensor([-3.0, -7.0]), torch.tensor([2, 4]))
        tensor([0.3679])
    """
    chosen, rejected = ((logps.detach() - log_collisions) / lengths).chunk(2)
    return torch.exp(chosen + rejected).clamp(max=1.0)
