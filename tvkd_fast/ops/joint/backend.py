"""The joint walk's implementation for a call: one function for the numbers, one for the gradients, one for both.

Letters: N tokens, K of them kept, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.dispatch import check_impl
from tvkd_fast.ops.joint.outputs import Outputs
from tvkd_fast.ops.joint.row_numbers import RowSums
from tvkd_fast.ops.tiles.joint import walk


@dataclass(frozen=True)
class JointNumbers:
    """A forward's numbers of all N tokens, 0 of those that are left out."""

    sums: RowSums
    moments: dict[str, Tensor]

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[4 + moments, N], the sums first."""
        return torch.stack([x.to(dtype) for x in (*vars(self.sums).values(), *self.moments.values())])


def unpacked(numbers: Tensor, outputs: Outputs) -> JointNumbers:
    """What `packed` made one tensor of, whose moments' names are the outputs'; "target" is left out."""
    return JointNumbers(RowSums(*numbers[:4]), dict(zip(outputs.moments, numbers[4:], strict=False)))


def without_kernels(impl: str, what: str, remedy: str = "take impl='torch'") -> str:
    """ "torch", for a call that no kernel computes: refused where it asks for one by name."""
    check_impl(impl)
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot be had: no kernel computes {what}; {remedy}")
    return "torch"


def kept_rows(labels: Tensor | None, rows: Tensor | None, ignore_index: int) -> Tensor | None:
    """(K,) the rows to compute, or None for all; all of them on a GPU, which would have to wait for the count."""
    kept = left_in(labels, rows, ignore_index)
    if kept is None or kept.device.type != "cpu" or kept.all():
        return None
    return kept.nonzero()[:, 0]


def left_in(labels: Tensor | None, rows: Tensor | None, ignore_index: int) -> Tensor | None:
    """(N,) bool, true of rows to compute; None where all are."""
    if labels is None:
        return rows
    kept = labels != ignore_index
    return kept if rows is None else kept & rows


def joint_sums(task: walk.Task, impl: str) -> JointNumbers:
    with without_autocast(task.student.hidden):
        if impl == "torch":
            return spread_numbers(task, *walk.joint_sums(task))
        if task.is_weighted:
            sums, moments, _ = _blocks().block_walk(task)
            return JointNumbers(sums, moments)
        return JointNumbers(*_kernels().joint_sums(task))


def joint_gradients(
    task: walk.Task,
    impl: str,
    numbers: JointNumbers,
    upstream: Tensor,
    wants: Sequence[bool],
    teacher_wants: Sequence[bool],
) -> tuple[HeadGradients, HeadGradients]:
    """Gradients of Σ upstream·outputs, [O, N] upstream, by the student's hidden, weight and bias, and the teacher's."""
    with without_autocast(task.student.hidden):
        if impl == "triton" and task.is_weighted:
            *_, grads = _blocks().block_walk(task, upstream, wants)
            return grads, HeadGradients(None, None, None)
        if impl == "triton":
            return _kernels().joint_gradients(task, numbers.sums, numbers.moments, upstream, wants, teacher_wants)
        kept = task.kept
        if kept is not None:
            numbers = JointNumbers(numbers.sums.of(kept), {name: x[kept] for name, x in numbers.moments.items()})
            upstream = upstream[:, kept]
        return walk.joint_gradients(task, numbers.sums, numbers.moments, upstream, wants, teacher_wants)


def joint_known(
    task: walk.Task,
    impl: str,
    upstream: Tensor,
    wants: Sequence[bool],
    teacher_wants: Sequence[bool],
    workspace_mb: int = 0,
) -> tuple[JointNumbers, HeadGradients, HeadGradients]:
    """Both of the above, `upstream` [O, N] being known: from one visit of every block, but in Triton for a teacher that
    learns."""
    if impl == "triton" and (task.teacher is None or any(teacher_wants)):
        numbers = joint_sums(task, impl)
        return numbers, *joint_gradients(task, impl, numbers, upstream, wants, teacher_wants)
    with without_autocast(task.student.hidden):
        if impl == "triton":
            sums, moments, student = _blocks().block_walk(task, upstream, wants)
            return JointNumbers(sums, moments), student, HeadGradients(None, None, None)
        known = upstream if task.kept is None else upstream[:, task.kept]
        sums, moments, student, teacher = walk.joint_known(task, known, wants, teacher_wants, workspace_mb)
        return spread_numbers(task, sums, moments), student, teacher


def _kernels() -> ModuleType:
    # Imported when asked for: it needs triton.
    from tvkd_fast.ops.joint import triton_joint

    return triton_joint


def _blocks() -> ModuleType:
    from tvkd_fast.ops.joint import triton_blocks

    return triton_blocks


def spread_numbers(task: walk.Task, sums: RowSums, moments: dict[str, Tensor]) -> JointNumbers:
    """The kept rows' numbers at their places among all, 0 elsewhere."""
    kept, n = task.kept, task.student.hidden.shape[0]
    if kept is None:
        return JointNumbers(sums, moments)

    return JointNumbers(
        RowSums(*(spread(x, kept, n) for x in vars(sums).values())),
        {name: spread(x, kept, n) for name, x in moments.items()},
    )


def spread(x: Tensor, kept: Tensor, count: int) -> Tensor:
    """x (K, …) at the kept rows' places among all, 0 elsewhere."""
    return x.new_zeros((count, *x.shape[1:])).index_copy(0, kept, x)
