"""The registered op of the joint walk: every output from one forward, one recomputation for all their gradients.

Letters: N tokens, D hidden of each model, V vocabulary, O outputs, M moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.checks import check_label_range
from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.outputs import Outputs, value_of
from tvkd_fast.ops.joint.pair_input import check_index_range, check_joint_finite
from tvkd_fast.ops.registered import as_tensors, check_differentiated_once, wanted_gradients
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.joint.walk import Task

NAME = "linear_joint"
SIX = 6
"""The inputs that may be differentiated come first: hidden, weight and bias of student and of teacher."""
SixGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def outputs_of(names: str, beta: float, alpha: float) -> Outputs:
    """An op takes no list of strings: the names come in one, with commas."""
    return Outputs(tuple(names.split(",")), beta, alpha).resolved()


def task_of(
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
    outputs: Outputs,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> Task:
    """The walk of an op's arguments, whose contents are looked at."""
    head, teacher = Head(weight, bias, softcap, logit_scale), None
    if teacher_weight is not None:
        teacher = Head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        check_index_range(teacher_index, teacher.vocab_size)
    if labels is not None:
        labels = labels.long()
        check_label_range(labels, head.vocab_size, ignore_index)
    return backend.task_of(
        hidden,
        head,
        teacher_hidden,
        teacher,
        outputs,
        temperature=temperature,
        labels=labels,
        teacher_index=teacher_index,
        teacher_lse=teacher_lse,
        rows=rows,
        ignore_index=ignore_index,
    )


def _joint(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The outputs [O, N], 0 in rows that are left out; for the backward the sums and moments, [4 + M, N]."""
    outputs = outputs_of(names, beta, alpha)
    task = task_of(
        *(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias),
        *(labels, teacher_index, teacher_lse, rows, outputs),
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_logit_scale,
        temperature,
        ignore_index,
    )
    numbers = backend.joint_sums(task)
    values = values_of(task, numbers, backend.left_in(labels, rows, ignore_index))
    return values, numbers.packed(values.dtype)


def values_of(task: Task, numbers: backend.JointNumbers, left_in: Tensor | None) -> Tensor:
    """The outputs [O, N] of a task, looked at for NaN and for divergences that are infinite."""
    outputs, student, teacher = task.outputs, task.student, task.teacher
    dtype = accumulation_dtype(student.hidden.dtype)
    values = torch.stack(
        [value_of(name, outputs.beta, numbers.sums, numbers.moments).to(dtype) for name in outputs.names]
    )
    if left_in is not None:
        values.masked_fill_(~left_in, 0.0)
    of_teacher = None if teacher is None else (teacher.hidden, teacher.head)
    check_joint_finite(values, outputs.names, numbers.sums, (student.hidden, student.head), of_teacher)
    return values


def _joint_gradients(
    upstream: Tensor,
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
    numbers: Tensor,
    names: str,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_teacher_hidden: bool,
    want_teacher_weight: bool,
    want_teacher_bias: bool,
) -> SixGradients:
    outputs = outputs_of(names, beta, alpha)
    task = task_of(
        *(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias),
        *(labels, teacher_index, teacher_lse, rows, outputs),
        softcap,
        logit_scale,
        teacher_softcap,
        teacher_logit_scale,
        temperature,
        ignore_index,
    )
    left_in = backend.left_in(labels, rows, ignore_index)
    if left_in is not None:
        upstream = upstream.masked_fill(~left_in, 0.0)
    found = backend.joint_gradients(
        task,
        backend.unpacked(numbers, outputs),
        upstream,
        (want_hidden, want_weight, want_bias),
        (want_teacher_hidden, want_teacher_weight, want_teacher_bias),
    )
    return six_of(*found, hidden, teacher_hidden)


def six_of(
    student: HeadGradients, teacher: HeadGradients, hidden: Tensor, teacher_hidden: Tensor | None
) -> SixGradients:
    """Both models' gradients as an op returns them."""
    return *as_tensors(student, hidden), *as_tensors(teacher, hidden if teacher_hidden is None else teacher_hidden)


joint_op = torch.library.custom_op("tvkd_fast::linear_joint", _joint, mutates_args=())
joint_gradients_op = torch.library.custom_op("tvkd_fast::linear_joint_gradients", _joint_gradients, mutates_args=())


@joint_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    names, beta, alpha = args[9:12]
    outputs, dtype = outputs_of(names, beta, alpha), accumulation_dtype(hidden.dtype)
    moments = len(outputs.moments) + (args[5] is not None)
    n = hidden.shape[0]
    return (
        hidden.new_empty((len(outputs.names), n), dtype=dtype),
        hidden.new_empty((4 + moments, n), dtype=dtype),
    )


@joint_gradients_op.register_fake
def _(upstream: Tensor, *args: Any) -> SixGradients:
    return fake_six(args[:SIX], args[-SIX:])


def fake_six(inputs: Any, wants: Any) -> SixGradients:
    """Unwritten gradients of the six inputs, empty where none is wanted."""
    like = inputs[0]
    found = [
        (like if x is None else x).new_empty(x.shape if want and x is not None else (0,))
        for x, want in zip(inputs, wants, strict=True)
    ]
    return tuple(found)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], output[1])
    ctx.settings = inputs[10:]


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once(NAME)
    inputs = len(ctx.needs_input_grad)
    if upstream is None:
        return (None,) * inputs
    wants = ctx.needs_input_grad[:SIX]
    grads = joint_gradients_op(upstream, *ctx.saved_tensors, *ctx.settings, *wants)
    return (*wanted_gradients(grads, wants), *[None] * (inputs - SIX))


joint_op.register_autograd(_backward, setup_context=_keep)
