"""Supervised fine-tuning's loss, in the same terms as the preference losses.

Letters: S sequences.
"""

from __future__ import annotations

from torch import Tensor


def sft_loss(policy_logps: Tensor, num_tokens: int | Tensor) -> Tensor:
    """−Σ log π_θ(y) / num_tokens: the mean negative log-likelihood a token, a scalar.

    Args:
        policy_logps: (S,) summed log-probabilities of the responses to imitate, nats.
        num_tokens: the tokens to divide by: those of these responses, or of the whole global batch where this is one
            micro-batch of it.

    Raises:
        ValueError: num_tokens is an int below 1.

    Examples:
        >>> import torch
        >>> sft_loss(torch.tensor([-3.0, -5.0]), num_tokens=4)
        tensor(2.)
    """
    if isinstance(num_tokens, int) and num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}: there is no response to learn from")
    return -policy_logps.sum() / num_tokens
