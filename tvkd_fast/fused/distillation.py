"""Distillation in one call: a weighted mixture of log-likelihood and divergences, its gradient made in the forward.

Token weights are given before anything is computed, so that one visit of a block of rows makes its logits, the numbers
and the gradient: as many products as student and teacher have for a forward, and two.

Letters: N tokens, D hidden of the student, D' of the teacher, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tvkd_fast.fused.distillation_op import distillation_op
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.gradient import GradMode, HeadGradient, HeadStats
from tvkd_fast.ops.joint.backend import left_in
from tvkd_fast.ops.joint.joint_op import SIX
from tvkd_fast.ops.joint.pair_input import JointInput, joint_input
from tvkd_fast.ops.joint.sparse_joint_op import is_sparse, sparse_joint
from tvkd_fast.ops.tiles.exact import accumulation_dtype


class DistillationOutput(NamedTuple):
    """The loss, and what it is made of.

    Examples:
        >>> import torch
        >>> states, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> out = fused_linear_distillation_loss(states, weight, states, weight, mixture={"jsd": 1.0})
        >>> out.outputs["jsd"]
        tensor([0., 0.])
    """

    loss: Tensor
    """(), differentiable."""
    outputs: dict[str, Tensor]
    """(N,) each, by name: without a gradient, and 0 in rows that are left out."""


def fused_linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    labels: Tensor | None = None,
    *,
    mixture: Mapping[str, float | Tensor],
    token_weights: Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_index: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    grad_mode: GradMode = "exact",
    eps: float | None = None,
    row_cap: int | None = None,
    max_tail: float = 0.1,
    stats: HeadStats | None = None,
    impl: Impl = "auto",
) -> DistillationOutput:
    """A weighted mixture of log-likelihood and divergences of all tokens, in one walk over both vocabularies.

        L = Σ_t c_t Σ_o λ_o·output_o(t),   outputs as `linear_joint` names them

    DCKD's loss (arXiv 2502.17927) on a chosen response is `mixture={"logps": -1.0, "forward_kl": 0.1}`, GKD's
    `mixture={"jsd": 1.0}`.

    Args:
        hidden, weight, teacher_hidden, teacher_weight, labels: as in `linear_joint`; "logps" needs labels.
        mixture: λ by output, each a number or (N,). A log-likelihood to be maximised has a negative one.
        token_weights: (N,) c, constants; the mean over the rows that are computed where None.

    All others are `linear_joint`'s.

    Returns:
        `DistillationOutput`. `loss` is differentiable once by hidden, weight and bias of the student, and by the
        teacher's where they require a gradient. The gradient is made in the forward: four products for a teacher of the
        student's width, three where hidden or weight wants none. A second backward recomputes it. Memory beyond inputs
        and gradients is 128 MB by count, float32 sums of 16-bit gradients apart; in Triton a 64th of the device's
        memory, 1 GiB at most. There a teacher that learns, or none, takes numbers first and gradients after, as
        `linear_divergence` does. A sparse gradient (`grad_mode`) is made in the backward of the
        entries that the forward keeps, 16 bytes each: two products.

    Raises:
        ValueError, RuntimeError: as `linear_joint`.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4, requires_grad=True), torch.eye(5, 4)
        >>> out = fused_linear_distillation_loss(
        ...     hidden, weight, torch.zeros(2, 8), torch.ones(5, 8), torch.tensor([0, 1]),
        ...     mixture={"logps": -1.0, "forward_kl": 0.5},
        ... )
        >>> out.loss.backward()
        >>> out.loss.detach(), hidden.grad.shape
        (tensor(0.9525), torch.Size([2, 4]))
    """
    if not isinstance(mixture, Mapping):
        raise ValueError(f"mixture must map outputs to weights, {{'forward_kl': 1.0}}, got a {type(mixture).__name__}")
    gradient = HeadGradient(grad_mode=grad_mode, eps=eps, row_cap=row_cap, max_tail=max_tail)
    per_row = {f"mixture[{name!r}]": x for name, x in mixture.items() if isinstance(x, Tensor) and x.dim()}
    given = joint_input(
        "fused_linear_distillation_loss",
        *(hidden, weight, teacher_hidden, teacher_weight, labels, tuple(mixture)),
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        teacher_bias=teacher_bias,
        teacher_softcap=teacher_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_index=teacher_index,
        teacher_lse=teacher_lse,
        rows=rows,
        ignore_index=ignore_index,
        impl=impl,
        numbers={"token_weights": token_weights, **per_row},
    )
    upstream = _upstream(mixture, token_weights, left_in(labels, rows, ignore_index), given.hidden)
    if is_sparse(given, gradient):
        values = sparse_joint(given, gradient, stats, impl)
        loss = (values.double() * upstream.double()).sum().to(values.dtype)
        return DistillationOutput(loss, _by_name(given, values.detach()))
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in given.tensors[:SIX]]
    loss, values, *_ = distillation_op(*given.tensors, upstream, *given.settings, *wants)
    return DistillationOutput(loss, _by_name(given, values))


def _by_name(given: JointInput, values: Tensor) -> dict[str, Tensor]:
    return dict(zip(given.outputs.names, values.unbind(0), strict=True))


def _upstream(
    mixture: Mapping[str, float | Tensor], token_weights: Tensor | None, kept: Tensor | None, hidden: Tensor
) -> Tensor:
    """dL/doutput [O, N], 0 in rows that are left out."""
    n, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    if token_weights is None:
        # As a tensor: a GPU would have to wait for the count.
        count = hidden.new_full((), n, dtype=dtype) if kept is None else kept.sum().to(dtype)
        token_weights = count.clamp_min(1.0).reciprocal().expand(n)
    c = token_weights.detach().to(dtype)
    if kept is not None:
        c = c.masked_fill(~kept, 0.0)
    return torch.stack([c * (x.detach().to(dtype) if isinstance(x, Tensor) else x) for x in mixture.values()])
