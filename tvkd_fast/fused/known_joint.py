"""Outputs of the joint walk of which a loss is known to be linear, so that their gradient is made in the forward.

Letters: N tokens, D hidden of each model, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.fused.distillation_op import distillation_op
from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.checks import waits
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.joint.backend import left_in
from tvkd_fast.ops.joint.joint_op import TENSORS, joint_gradients_op
from tvkd_fast.ops.joint.pair_input import joint_input
from tvkd_fast.ops.known import are_same, broken_unless, common_factor, scaled
from tvkd_fast.ops.registered import check_differentiated_once, wanted_gradients
from tvkd_fast.ops.tiles.exact import accumulation_dtype

NAME = "linear_joint"
_OF_TEACHER = (False, False, False)
"""No gradient goes to the other model."""


def known_joint(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor | None = None,
    *,
    upstream: Mapping[str, Tensor],
    beta: float = 0.5,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> dict[str, Tensor]:
    """`linear_joint`'s outputs for four products in place of six; `upstream` has dL/doutput, (N,), of each by name.

    What the loss hands down is compared with it, as in `known_logps`: where they differ by more than a common factor
    the gradient is computed anew, and on a GPU inside `unchecked`, which looks at nothing, it becomes NaN. The other
    model is a constant. A second backward through the same graph recomputes the logits.

    Raises:
        ValueError, RuntimeError: as `linear_joint`.
    """
    given = joint_input(
        NAME,
        *(hidden, head, teacher_hidden.detach(), teacher_head, labels, tuple(upstream)),
        beta=beta,
        alpha=0.5,
        temperature=temperature,
        bias=None,
        softcap=None,
        logit_scale=1.0,
        teacher_bias=None,
        teacher_softcap=None,
        teacher_logit_scale=1.0,
        teacher_index=None,
        teacher_lse=None,
        rows=rows,
        ignore_index=ignore_index,
        impl=impl,
        numbers={f"upstream[{name!r}]": x for name, x in upstream.items()},
    )
    kept = left_in(labels, rows, ignore_index)
    dtype = accumulation_dtype(given.hidden.dtype)
    known = _of_kept(torch.stack([x.detach().to(dtype) for x in upstream.values()]), kept)
    found: tuple[Tensor, ...] = _KnownJoint.apply(*given.tensors, known, kept, given.settings)
    return dict(zip(given.outputs.names, found, strict=True))


def _of_kept(upstream: Tensor, kept: Tensor | None) -> Tensor:
    return upstream if kept is None else upstream.masked_fill(~kept, 0.0)


class _KnownJoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, (upstream, kept, settings) = arguments[:TENSORS], arguments[TENSORS:]
        wants = ctx.needs_input_grad[:3]
        _, values, numbers, *grads = distillation_op(*tensors, upstream, *settings, *wants, *_OF_TEACHER)
        ctx.save_for_backward(*tensors, numbers)
        ctx.grads, ctx.upstream, ctx.kept, ctx.settings = wanted_gradients(grads[:3], wants), upstream, kept, settings
        return tuple(values.unbind(0))

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once(NAME)
        *tensors, numbers = ctx.saved_tensors
        wants, others = ctx.needs_input_grad[:3], (None,) * TENSORS
        upstream = _of_kept(torch.stack(given), ctx.kept)
        made, ctx.grads = ctx.grads, None
        if made is not None:
            grads = HeadGradients(*made)
            if not waits(upstream):
                return (*broken_unless(are_same(upstream, ctx.upstream), grads), *others)
            factor = common_factor(upstream, ctx.upstream)
            if factor is not None:
                return (*scaled(grads, factor), *others)
        found = joint_gradients_op(upstream, *tensors, numbers, *ctx.settings, *wants, *_OF_TEACHER)
        return (*wanted_gradients(found[:3], wants), *others)
