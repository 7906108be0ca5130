"""States of packed responses as padded rows, so that one call serves responses of any length.

Letters: N tokens of S responses, T the longest's; D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkd_fast.transfer import to_device


def padded(states: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N, D) states of packed responses to [S, T, D], zero behind each response, and [S, T] bool, the places that are
    filled. Differentiable.

    Args:
        states: (N, D) floats.
        lengths: tokens of each response, on the host; they sum to N.

    Raises:
        ValueError: lengths that do not sum to N, or an empty response.
    """
    if sum(lengths) != len(states) or min(lengths, default=1) < 1:
        raise ValueError(f"lengths must be positive and sum to the {len(states)} states, got {list(lengths)}")
    filled = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    places = to_device(filled.flatten().nonzero()[:, 0], states.device)
    rows = states.new_zeros(filled.numel(), states.shape[1]).index_copy(0, places, states)
    return rows.view(*filled.shape, states.shape[1]), to_device(filled, states.device)


def products(x: Tensor, y: Tensor) -> Tensor:
    """[S, n, D] and [S, m, D] to the [S, n, m] x_i·y_j, in their own dtype within autocast too, where a policy's states
    are compared. Differentiable."""
    if not torch.amp.is_autocast_available(x.device.type):
        return x @ y.mT
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT


def means(of_tokens: Tensor, filled: Tensor) -> Tensor:
    """(S,) means over the filled places of [S, T] numbers, which are finite elsewhere. Differentiable."""
    return (of_tokens * filled).sum(-1) / filled.sum(-1)


def check_same_tokens(hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Raise ValueError where the states are not (N, D) and (N, D') of the same tokens."""
    if hidden.dim() != 2 or teacher_hidden.dim() != 2 or len(hidden) != len(teacher_hidden):
        raise ValueError(
            f"states must be (N, D) and (N, D') of the same tokens, got {tuple(hidden.shape)} and "
            f"{tuple(teacher_hidden.shape)}: give both models the same tokens"
        )
