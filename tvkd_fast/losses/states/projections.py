"""Distances between the teacher's states and a linear map of the student's.

Letters: N tokens of S responses; D hidden of the student, D' of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.losses.states.responses import check_same_tokens, means, padded

Measure = Literal["cosine", "squared"]


def projected_distances(
    hidden: Tensor, projection: Tensor, teacher_hidden: Tensor, lengths: Sequence[int], *, measure: Measure = "cosine"
) -> Tensor:
    """The mean distance between the teacher's states and the projected student's, one per response.

    With v = W·h a token's projected state and u the teacher's:

        "cosine"   mean_t 1 − cos(v_t, u_t)
        "squared"  Σ_t ‖v_t − u_t‖² / Σ_t ‖u_t‖²    (FitNets, arXiv 1412.6550, relative to the teacher's size)

    Args:
        hidden: (N, D) the student's states of packed responses.
        projection: [D', D] W.
        teacher_hidden: (N, D') the teacher's states of the same tokens; a constant.
        lengths: tokens of each response, on the host.
        measure: by the names above.

    Returns:
        (S,) float32 (float64 for float64 states), differentiable by `hidden` and `projection`.

    Raises:
        ValueError: an unknown measure, a projection of other widths, states of other tokens, lengths that do not fit.

    Examples:
        >>> import torch
        >>> projected_distances(torch.eye(2), torch.eye(3, 2), torch.eye(2, 3) + torch.eye(2, 3).roll(1, 1), [2])
        tensor([0.2929])
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
    check_same_tokens(hidden, teacher_hidden)
    if projection.shape != (teacher_hidden.shape[1], hidden.shape[1]):
        raise ValueError(
            f"the projection must be [{teacher_hidden.shape[1]}, {hidden.shape[1]}], from the student's width to the "
            f"teacher's, got {list(projection.shape)}"
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    found, wanted = F.linear(hidden, projection).to(dtype), teacher_hidden.detach().to(dtype)
    if measure == "cosine":
        of_tokens, filled = padded(1 - F.cosine_similarity(found, wanted, dim=1)[:, None], lengths)
        return means(of_tokens[:, :, 0], filled)
    sizes = torch.stack([(found - wanted).square().sum(1), wanted.square().sum(1)], 1)
    errors, norms = padded(sizes, lengths)[0].sum(1).unbind(1)
    return errors / norms.clamp(min=torch.finfo(dtype).tiny)
