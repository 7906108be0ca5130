"""The common rules of the registered ops: an op returns tensors only, and is differentiated once.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients

Gradients = tuple[Tensor, Tensor, Tensor]
"""The gradients by hidden, weight and bias; an empty tensor where none is wanted, since an op returns tensors only."""
Kept = tuple[Sequence[Tensor | None], Sequence[Any]]
"""The tensors and settings that a forward keeps for its backward."""


def as_tensors(grads: HeadGradients, hidden: Tensor) -> Gradients:
    found = [hidden.new_empty(0) if x is None else x for x in (grads.hidden, grads.weight, grads.bias)]
    return found[0], found[1], found[2]


def fake_gradients(grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Gradients:
    """Unwritten gradients of hidden, weight and bias, by the three `wants` that end the op's arguments."""
    found = unwritten((hidden, weight, bias), args[-3:])
    return found[0], found[1], found[2]


def unwritten(inputs: Sequence[Tensor | None], wants: Sequence[bool]) -> list[Tensor]:
    """Unwritten gradients of an op's inputs, the first of which is hidden; empty where none is wanted."""
    hidden = inputs[0]
    assert hidden is not None
    pairs = zip(inputs, wants, strict=True)
    return [(hidden if x is None else x).new_empty((0,) if x is None or not want else x.shape) for x, want in pairs]


def wanted_gradients(grads: Sequence[Tensor | None], wants: Sequence[bool]) -> list[Tensor | None]:
    """The same as autograd takes them: None where none is wanted."""
    return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


def differentiate(
    op: Any,
    keep: Callable[[tuple[Any, ...], tuple[Tensor, ...]], Kept],
    gradients: Callable[[Tensor, Sequence[Any], Sequence[Any], Sequence[bool]], Sequence[Tensor | None]],
    *,
    name: str = "linear_logps",
    count: int = 3,
) -> None:
    """Register the derivative of an op whose first `count` arguments, hidden, weight and bias of one model or two, and
    whose first result alone are differentiated.

    `keep(inputs, output)` returns what the backward needs; `gradients(grad, tensors, settings, wants)` gets it.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        # A result that no gradient reached hands None down, where autograd would write zeros.
        ctx.set_materialize_grads(False)
        tensors, ctx.settings = keep(inputs, output)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        check_differentiated_once(name)
        inputs = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * inputs
        wants = ctx.needs_input_grad[:count]
        grads = gradients(grad, ctx.saved_tensors, ctx.settings, wants)
        return (*wanted_gradients(grads, wants), *[None] * (inputs - count))

    op.register_autograd(backward, setup_context=setup)


def differentiate_by_hidden(op: Any, left_in: Callable[[tuple[Any, ...]], Tensor | None], *, name: str) -> None:
    """Register the derivative of an op whose second result is the first one's by hidden, [N, D].

    `left_in(inputs)` is (N,) bool, true of the rows that count, or None where all do: the derivative of others is 0,
    which an infinite upstream gradient must not meet.
    """

    def keep(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
        return (output[1], left_in(inputs)), (inputs[0].dtype,)

    def gradients(
        upstream: Tensor, kept: Sequence[Any], settings: Sequence[Any], wants: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (derivative, counted), (dtype,) = kept, settings
        c = upstream.flatten()
        if counted is not None:
            c = c.masked_fill(~counted, 0.0)
        return ((derivative * c[:, None]).to(dtype),)

    differentiate(op, keep, gradients, name=name, count=1)


def check_differentiated_once(op: str) -> None:
    """Refuse create_graph=True, which runs a backward with gradients on: its result would be treated as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} can be differentiated once: its gradient's own gradient is not computed")
