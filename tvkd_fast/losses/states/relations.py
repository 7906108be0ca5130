"""Distances between the relations of two models' states, which need no common width.

Letters: N tokens of S responses, T the longest's; D hidden of the student, D' of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.losses.states.responses import check_same_tokens, padded, products

Relation = Literal["cosine", "gram", "distance"]
_SMALLEST = 1e-12
"""Squared distances below it have no gradient: that of a square root is infinite at 0."""


def relational_distances(
    hidden: Tensor, teacher_hidden: Tensor, lengths: Sequence[int], *, relation: Relation = "cosine"
) -> Tensor:
    """The distance between how two models relate the states of a response to each other, one per response.

    With R the [T, T] relations of a response's states under one model, h_i its states:

        "cosine"    R_ij = cos(h_i, h_j)                      mean_ij (R − R')²
        "gram"      R_ij = h_i·h_j                            1 − ⟨R, R'⟩ / (‖R‖·‖R'‖), Frobenius
        "distance"  R_ij = ‖h_i − h_j‖ / mean_{i≠j} ‖h_i − h_j‖   mean_{i≠j} huber(R − R')

    "gram" is 1 − CKA (arXiv 1905.00414) without centring; "distance" is RKD's (arXiv 1904.05068), whose Huber loss is
    ½x² up to |x| = 1 and |x| − ½ beyond. All are 0 where the models relate states alike, do not change with rotations
    and scales of either model's states, and are 0 of a response of one token.

    Args:
        hidden: (N, D) the student's states of packed responses.
        teacher_hidden: (N, D') the teacher's of the same tokens; a constant.
        lengths: tokens of each response, on the host.
        relation: by the names above.

    Returns:
        (S,) float32 (float64 for float64 states), differentiable by `hidden`. Relations of all responses are held at
        once: 2·S·T² numbers.

    Raises:
        ValueError: an unknown relation, states of other tokens, lengths that do not fit them.

    Examples:
        >>> import torch
        >>> relational_distances(torch.eye(2, 3), torch.ones(2, 5), [2])
        tensor([0.5000])
        >>> relational_distances(torch.eye(2, 3), 7 * torch.eye(2, 5), [2], relation="distance")
        tensor([0.])
    """
    if relation not in get_args(Relation):
        raise ValueError(f"relation must be one of {', '.join(get_args(Relation))}, got {relation!r}")
    check_same_tokens(hidden, teacher_hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ours, filled = padded(hidden.to(dtype), lengths)
    theirs, _ = padded(teacher_hidden.detach().to(dtype), lengths)
    both = filled[:, :, None] & filled[:, None, :]
    if relation == "cosine":
        errors = (cosines(ours) - cosines(theirs)).square() * both
        return errors.sum((1, 2)) / both.sum((1, 2))
    if relation == "gram":
        ours, theirs = products(ours, ours), products(theirs, theirs)
        product = (ours * theirs).sum((1, 2))
        return 1 - product / (_norms(ours) * _norms(theirs)).clamp(min=_SMALLEST)
    pairs = both & ~torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
    count = pairs.sum((1, 2)).clamp(min=1)
    ours, theirs = (_relative_distances(x, filled, pairs, count) for x in (ours, theirs))
    errors = F.huber_loss(ours, theirs, reduction="none")
    return (errors * pairs).sum((1, 2)) / count


def cosines(states: Tensor) -> Tensor:
    """[S, T, D] states to the [S, T, T] cosines between them; 0 for a state of zeros. Differentiable."""
    units = F.normalize(states, dim=-1)
    return products(units, units)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _relative_distances(states: Tensor, filled: Tensor, pairs: Tensor, count: Tensor) -> Tensor:
    """[S, T, T] Euclidean distances over their mean among `pairs`."""
    # About their mean, so that squares of what all states share do not cancel.
    states = states - states.sum(1, keepdim=True) / filled.sum(1)[:, None, None]
    squares = states.square().sum(-1)
    squared = squares[:, :, None] + squares[:, None, :] - 2 * products(states, states)
    distances = squared.where(pairs, 1.0).clamp(min=_SMALLEST).sqrt() * pairs
    return distances / (distances.sum((1, 2)) / count).clamp(min=_SMALLEST)[:, None, None]
