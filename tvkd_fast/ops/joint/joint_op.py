"""The registered op of the joint walk: every output from one forward, one recomputation for all their gradients.

Letters: N tokens, D hidden of each model, V vocabulary, O outputs, M moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.checks import check_label_range
from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.outputs import Outputs, value_of
from tvkd_fast.ops.joint.pair_input import check_index_range, check_joint_finite
from tvkd_fast.ops.registered import Kept, as_tensors, differentiate, unwritten
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import Task

NAME = "linear_joint"
SIX = 6
"""The inputs that may be differentiated come first: hidden, weight and bias of student and of teacher."""
TENSORS = 10
"""The tensors, those six first; the settings follow."""
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
    names: str,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> Task:
    """The walk of an op's arguments, whose contents are looked at."""
    student = Side(hidden, Head(weight, bias, softcap, logit_scale), temperature)
    teachers: tuple[tuple[float, Side], ...] = ()
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        check_index_range(teacher_index, teacher.vocab_size)
        index = None if teacher_index is None else teacher_index.long()
        teachers = ((1.0, Side(teacher_hidden, teacher, temperature, index)),)
    kept, left_in = backend.kept_rows(labels, rows, ignore_index), backend.left_in(labels, rows, ignore_index)
    if labels is not None:
        labels = labels.long()
        check_label_range(labels, student.head.vocab_size, ignore_index)
        if kept is None:
            # Where all rows are computed, those to ignore take any label: their numbers are dropped.
            labels = labels.masked_fill(labels == ignore_index, 0)
    return Task(student, teachers, outputs_of(names, beta, alpha), labels, teacher_lse, kept, left_in)


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
    numbers = backend.joint_sums(task, impl)
    values = values_of(task, numbers)
    return values, numbers.packed(values.dtype)


def values_of(task: Task, numbers: backend.JointNumbers) -> Tensor:
    """The outputs [O, N] of a task, looked at for NaN and for divergences that are infinite."""
    outputs, student, teacher = task.outputs, task.student, task.teacher
    dtype = accumulation_dtype(student.hidden.dtype)
    values = torch.stack(
        [value_of(name, outputs.beta, numbers.sums, numbers.moments).to(dtype) for name in outputs.names]
    )
    if task.left_in is not None:
        values.masked_fill_(~task.left_in, 0.0)
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
    if task.left_in is not None:
        upstream = upstream.masked_fill(~task.left_in, 0.0)
    found = backend.joint_gradients(
        task,
        impl,
        backend.unpacked(numbers, task.outputs),
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
    return fake_values(hidden, args[5], *args[9:12])


def fake_values(hidden: Tensor, labels: Tensor | None, names: str, beta: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Unwritten outputs [O, N], and sums and moments, [4 + M, N]."""
    outputs, dtype, n = outputs_of(names, beta, alpha), accumulation_dtype(hidden.dtype), hidden.shape[0]
    kept = 4 + len(outputs.moments) + (labels is not None)
    return hidden.new_empty((len(outputs.names), n), dtype=dtype), hidden.new_empty((kept, n), dtype=dtype)


@joint_gradients_op.register_fake
def _(upstream: Tensor, *args: Any) -> SixGradients:
    return tuple(unwritten(args[:SIX], args[-SIX:]))  # type: ignore[return-value]


def _kept(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
    return (*inputs[:TENSORS], output[1]), inputs[TENSORS:]


def _derivative(upstream: Tensor, kept: Sequence[Any], settings: Sequence[Any], wants: Sequence[bool]) -> SixGradients:
    grads: SixGradients = joint_gradients_op(upstream, *kept, *settings, *wants)
    return grads


differentiate(joint_op, _kept, _derivative, name=NAME, count=SIX)
