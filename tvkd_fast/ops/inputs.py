"""States and a head as the ops take them.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.autocast import autocast_input
from tvkd_fast.ops.checks import check_head, check_tensors


def as_head(
    weight: Tensor | Head, bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0
) -> Head:
    """A head from its loose parts, or the one that was given as a whole."""
    if not isinstance(weight, Head):
        return Head(weight, bias, softcap, logit_scale)
    if bias is not None or softcap is not None or logit_scale != 1.0:
        raise ValueError(
            "weight is a Head, which has a bias, a softcap and a logit_scale of its own: set them there, or give the "
            "weight alone"
        )
    return weight


def head_input(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Hidden [N, D] and head in autocast's dtype where it is on, checked to fit each other."""
    check_tensors(hidden=hidden, weight=head.weight, bias=head.bias)
    hidden, weight = autocast_input(hidden), autocast_input(head.weight)
    bias = None if head.bias is None else autocast_input(head.bias)
    check_head(hidden, weight, bias, head.softcap, head.logit_scale)
    return hidden, replace(head, weight=weight, bias=bias)


def is_differentiated(hidden: Tensor, head: Head) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or is_trained(head))


def is_trained(head: Head) -> bool:
    return head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)


def packed_rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which is how the kernels read it."""
    if x.stride(-1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    # A size of 1 counts as contiguous whatever its stride is, and a descriptor wants the stride all the same.
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def packed(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.contiguous()
    return replace(head, weight=packed_rows(head.weight), bias=bias)
