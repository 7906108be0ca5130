"""What the registered ops share: an op returns tensors only, and is differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients

Gradients = tuple[Tensor, Tensor, Tensor]
"""By hidden, weight and bias; an empty tensor where none is wanted, since an op returns tensors only."""


def as_tensors(grads: HeadGradients, hidden: Tensor) -> Gradients:
    found = [hidden.new_empty(0) if x is None else x for x in (grads.hidden, grads.weight, grads.bias)]
    return found[0], found[1], found[2]


def fake_gradients(inputs: Sequence[Tensor | None], wants: Sequence[bool]) -> Gradients:
    """Of hidden, weight and bias, unwritten, where they are wanted."""
    hidden = inputs[0]
    assert hidden is not None
    wanted = zip(inputs, wants, strict=True)
    found = [hidden.new_empty(x.shape if want and x is not None else (0,)) for x, want in wanted]
    return found[0], found[1], found[2]


def asked_for(grads: Gradients, wants: Sequence[bool]) -> list[Tensor | None]:
    """The same as autograd takes them: None where none is wanted."""
    return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


def differentiates_first(ctx: Any, output: Sequence[Tensor]) -> None:
    """Only the first output has a gradient, None where nothing reached it: of the others autograd would write zeros."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def check_differentiated_once(op: str) -> None:
    """Only create_graph=True comes to a backward with gradients on; a constant would be passed off as a function."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} can be differentiated once: its gradient's own gradient is not computed")
