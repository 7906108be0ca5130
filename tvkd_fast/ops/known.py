"""Log-probabilities whose loss is known beforehand, so that the head makes its gradient in the forward.

Letters: N tokens, S responses, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.checks import check_finite, check_label_range, check_labels, check_transforms, waits
from tvkd_fast.ops.dispatch import Impl, resolve
from tvkd_fast.ops.gradient import HeadGradient
from tvkd_fast.ops.inputs import as_head, head_input, is_differentiated, is_trained
from tvkd_fast.ops.logps import gradients_op
from tvkd_fast.ops.registered import Gradients, check_differentiated_once, wanted_gradients
from tvkd_fast.ops.tiles.forward_gradients import Derivative, ForwardGradients, forward_gradients

NAME = "tvkd_fast::known_logps"
"""The name in a profile, as registered ops have one."""
TOLERANCE = 1e-5
"""The relative difference between what a loss hands down and what was known of it, up to which they are the same."""


@dataclass(frozen=True)
class Upstream:
    """The derivative that a loss is going to hand down to the log-probabilities, up to a factor common to all tokens.

    It is compared with what comes, and where the two differ the gradient is computed anew: a wrong one costs time.
    """

    derivative: Derivative
    """(S',) summed log-probabilities of some responses, and which they are, (S',) int64, to (S',) dL/dlogp of each."""
    cu_seqlens: Tensor
    """(S+1,) boundaries of the responses' tokens."""
    paired: bool = True
    """Whether response i is compared with response i + S/2, so that their derivatives need both."""
    lengths: Sequence[int] | None = None
    """(S,) the responses' tokens on the host, where none is ignored. Without it they are read from the device, for
    which the host waits."""

    def times(self, factor: Tensor) -> Upstream:
        """What is handed down where the loss is multiplied by a factor, ()."""

        def derivative(logps: Tensor, responses: Tensor) -> Tensor:
            return self.derivative(logps, responses) * factor

        return replace(self, derivative=derivative)


def makes_in_forward(hidden: Tensor, head: Head, gradient: HeadGradient, impl: str = "auto") -> bool:
    """Whether a known upstream gradient saves the backward's recomputation: that of exact gradients, in Triton, and in
    torch on a CPU where the head is trained. A frozen one streams hidden's gradient there, with no block to hold."""
    if gradient.grad_mode != "exact" or not is_differentiated(hidden, head):
        return False
    return resolve(impl, hidden) == "triton" or (hidden.device.type == "cpu" and is_trained(head))


def known_logps(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    upstream: Upstream,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    workspace_mb: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """`linear_logps` (N,) with exact gradients for three products (two where one is wanted).

    The forward holds `workspace_mb` MiB of logits while it lasts (0: 104 in torch, in Triton up to 1,024 as the device
    has memory), and leaves the gradients for the backward, the float32 sums of 16-bit ones being rounded before. A
    second backward through the same graph, and one with another upstream than was known, recompute the logits.

    Nothing here waits for a GPU inside `unchecked`, if `upstream.lengths` is given, but float16's scale. There another
    upstream than was known, which only the device sees, makes the gradient NaN, and a common factor counts as another.
    """
    head = as_head(weight, bias, softcap, logit_scale)
    check_transforms("linear_logps", hidden, head.weight, head.bias)
    hidden, head = head_input(hidden, head)
    check_labels(labels, hidden)
    check_upstream(upstream, hidden)
    found: Tensor = _KnownLogps.apply(
        hidden,
        head.weight,
        head.bias,
        labels.long(),
        upstream,
        (head.softcap, head.logit_scale, ignore_index, resolve(impl, hidden)),
        workspace_mb,
    )
    return found


def check_upstream(upstream: Upstream, hidden: Tensor) -> None:
    """Its responses cover all of hidden [N, D], and come in pairs where they are compared."""
    bounds, lengths = upstream.cu_seqlens, upstream.lengths
    if lengths is not None:
        if bounds.shape != (len(lengths) + 1,) or sum(lengths) != len(hidden):
            raise ValueError(
                f"upstream.lengths are of {len(lengths)} responses and {sum(lengths)} tokens: cu_seqlens has "
                f"{bounds.numel() - 1} and hidden {len(hidden)}"
            )
    elif (
        bounds.dim() != 1
        or bounds.numel() < 1
        or bounds[0] != 0
        or bounds[-1] != len(hidden)
        or (bounds.diff() < 0).any()
    ):
        raise ValueError(f"upstream.cu_seqlens must rise from 0 to {len(hidden)}, got {bounds.tolist()[:8]}")
    if upstream.paired and bounds.numel() % 2 == 0:
        raise ValueError(
            f"upstream has {bounds.numel() - 1} responses, which are no pairs: give as many rejected as chosen ones, "
            "or paired=False"
        )


class _KnownLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        upstream: Upstream,
        settings: tuple[float | None, float, int, str],
        workspace_mb: int,
    ) -> Tensor:
        softcap, logit_scale, ignore_index, impl = settings
        with record_function(NAME):
            made = gradients_in_forward(
                hidden,
                Head(weight, bias, softcap, logit_scale),
                labels,
                upstream,
                ignore_index=ignore_index,
                workspace_mb=workspace_mb,
                impl=impl,
                wants=ctx.needs_input_grad[:3],
            )
        ctx.save_for_backward(hidden, weight, bias, labels, made.sums.maximum, made.sums.log_total)
        ctx.by_token, ctx.grads, ctx.settings = by_token(made, labels, upstream, ignore_index), made.grads, settings
        return made.logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("linear_logps")
        *inputs, labels, maximum, log_total = ctx.saved_tensors
        wants, others = ctx.needs_input_grad[:3], (None,) * 4
        grads, ctx.grads = ctx.grads, None
        if grads is not None:
            given = grad_logps.masked_fill(labels == ctx.settings[2], 0.0)
            if not waits(given):
                return (*broken_unless(are_same(given, ctx.by_token), grads), *others)
            factor = common_factor(given, ctx.by_token)
            if factor is not None:
                with record_function(NAME):
                    return (*scaled(grads, factor), *others)
        hidden, weight, bias = inputs
        found = recomputed(grad_logps, hidden, weight, bias, labels, maximum, log_total, ctx.settings, wants)
        return (*wanted_gradients(found, wants), *others)


def gradients_in_forward(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    upstream: Upstream,
    *,
    ignore_index: int,
    workspace_mb: int = 0,
    impl: str,
    wants: Sequence[bool],
) -> ForwardGradients:
    """`forward_gradients` of checked numbers, whatever autocast says; `wants` of hidden, weight and bias."""
    check_label_range(labels, head.vocab_size, ignore_index)
    with without_autocast(hidden):
        made = forward_gradients(
            hidden,
            head,
            labels,
            upstream.cu_seqlens,
            upstream.derivative,
            lengths=upstream.lengths,
            paired=upstream.paired,
            ignore_index=ignore_index,
            workspace_mb=workspace_mb,
            impl=impl,
            wants=wants,
        )
    check_finite(made.logps, hidden, head.weight, head.bias)
    return made


def recomputed(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    settings: Sequence[Any],
    wants: Sequence[bool],
) -> Gradients:
    """The gradients under another upstream than was known, from the sums that the forward left.

    `settings` are softcap, logit_scale, ignore_index and the resolved impl.
    """
    no_logits = hidden.new_empty((0, weight.shape[0]))
    found: Gradients = gradients_op(
        grad_logps, hidden, weight, bias, labels, maximum, log_total, no_logits, *settings, *wants
    )
    return found


def by_token(made: ForwardGradients, labels: Tensor, upstream: Upstream, ignore_index: int) -> Tensor:
    """(N,) the upstream gradient that the forward's gradients are under."""
    c = made.upstream.repeat_interleave(upstream.cu_seqlens.diff(), output_size=labels.shape[0])
    return c.masked_fill_(labels == ignore_index, 0.0)


def common_factor(given: Tensor, known: Tensor) -> float | None:
    """The factor that makes `known` (N,) what was `given`; None where no factor does."""
    given, known = given.double(), known.double()
    size = known.square().sum()
    factor = (given * known).sum() / size if float(size) else given.new_ones(())
    return float(factor) if bool(are_same(given, factor * known)) else None


def are_same(given: Tensor, known: Tensor) -> Tensor:
    """() bool: whether two upstream gradients (N,) are the same to `TOLERANCE`."""
    return ((given - known).abs() <= TOLERANCE * known.abs()).all()


def broken_unless(right: Tensor, grads: HeadGradients) -> list[Tensor | None]:
    """The gradients, one of which is NaN all over unless `right`, () bool: the smallest, since it is one more pass."""
    found = [grads.hidden, grads.weight, grads.bias]
    smallest = min((x for x in found if x is not None), key=Tensor.numel)
    smallest.masked_fill_(~right, torch.nan)
    return found


def scaled(grads: HeadGradients, factor: float) -> list[Tensor | None]:
    """The gradients by hidden, weight and bias times a factor, in place; as they are where it is 1 but for rounding."""
    found = (grads.hidden, grads.weight, grads.bias)
    return [x if x is None or abs(factor - 1.0) <= _rounding(x) else x.mul_(factor) for x in found]


def _rounding(x: Tensor) -> float:
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
