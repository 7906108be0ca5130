"""The registered op of one output of a frozen head: the forward makes its derivative by hidden, as `linear_logps` does.

Letters: N tokens, D hidden of each model, V vocabulary, M moments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.joint_op import NAME, SIX, fake_values, task_of, values_of
from tvkd_fast.ops.joint.pair_input import JointInput
from tvkd_fast.ops.registered import differentiate_by_hidden
from tvkd_fast.ops.tiles.exact import accumulation_dtype


def is_streamed(given: JointInput) -> bool:
    """Whether hidden alone is differentiated, of one output: a row's derivative is then the same for any upstream."""
    hidden, *others = (x is not None and x.requires_grad for x in given.tensors[:SIX])
    of_torch = given.settings[-1] == "torch"
    return torch.is_grad_enabled() and hidden and not any(others) and len(given.outputs.names) == 1 and of_torch


def streamed_joint(given: JointInput) -> Tensor:
    """The output [1, N], differentiable by hidden."""
    *settings, _ = given.settings
    values: Tensor = streamed_joint_op(*given.tensors, *settings)[0]
    return values


def _streamed_joint(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    teacher_index: Tensor | None,
    teacher_lse: Tensor | None,
    rows: Tensor | None,
    names: str,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The output [1, N], its derivative by hidden [N, D] in the accumulator's dtype; 0 in rows that are left out."""
    task = task_of(
        *(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias),
        *(labels, teacher_index, teacher_lse, rows),
        names,
        beta,
        alpha,
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_logit_scale,
        temperature,
        ignore_index,
    )
    # The derivative is rounded once, times the upstream gradient.
    task = replace(task, unrounded=True)
    ones = hidden.new_ones((1, hidden.shape[0]), dtype=task.student.acc)
    if task.left_in is not None:
        ones = ones.masked_fill(~task.left_in, 0.0)
    numbers, grads, _ = backend.joint_known(task, "torch", ones, (True, False, False), (False, False, False))
    assert grads.hidden is not None
    return values_of(task, numbers), grads.hidden


streamed_joint_op = torch.library.custom_op("tvkd_fast::streamed_joint", _streamed_joint, mutates_args=())


@streamed_joint_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    values, _ = fake_values(hidden, None, *args[9:12])
    return values, hidden.new_empty(hidden.shape, dtype=accumulation_dtype(hidden.dtype))


def _left_in(inputs: tuple[Any, ...]) -> Tensor | None:
    return backend.left_in(inputs[6], inputs[9], inputs[-1])


differentiate_by_hidden(streamed_joint_op, _left_in, name=NAME)
