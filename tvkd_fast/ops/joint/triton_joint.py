"""The joint walk in Triton kernels: the functions of `tiles.joint.walk`, over all rows, for CUDA and ROCm tensors.

The kernels name their sums and weights by what they are; moments and upstream gradients of outputs are these in other
words. Temperatures are the heads'. Models of different dtypes are both computed in float32, to which a 16-bit head is
cast a slice of the vocabulary at a time; the rows that an index names are gathered in the same way.

Letters: N tokens, D hidden of each model, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels import joint_backward
from tvkd_fast.kernels.joint_backward import JointWeights
from tvkd_fast.kernels.joint_slices import sums_by_slices, values_by_slices
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, JointSums, JointValues
from tvkd_fast.kernels.sliced_head import SlicedHead
from tvkd_fast.ops.inputs import packed, packed_rows
from tvkd_fast.ops.joint.outputs import SCORE, Outputs
from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import Task

IGNORED = -(2**31)
"""The label of a row that is left out: no tokenizer's, whatever a call's ignore_index is."""
NOBODY = 64
"""The width of the zeros that stand for a teacher where there is none: one step of any tile's."""


def joint_sums(task: Task) -> tuple[RowSums, dict[str, Tensor]]:
    """LSEs (N,) and moments (N,), "target" among them where there are labels; 0 in rows that are left out."""
    names, second, labels = task.outputs.moments, SecondWalk.of(task.outputs), labels_of(task)
    (hidden, head), (other_hidden, other_head) = sides_of(task)
    two = (hidden, head, other_hidden, other_head)
    entropy, squares = "entropy" in names or SCORE in names, "p2" in names
    sums = sums_by_slices(*two, labels=labels, ignore_index=IGNORED, entropy=entropy, squares=squares)
    values = JointValues()
    if second.sums_anything:
        values = values_by_slices(*two, sums, labels=labels, ignore_index=IGNORED, **vars(second))
    return numbers_of(task, sums, values)


def numbers_of(task: Task, sums: JointSums, values: JointValues) -> tuple[RowSums, dict[str, Tensor]]:
    """The kernels' records as LSEs and moments, 0 in rows that are left out."""
    found = moments_of(task, sums, values)
    moments = {name: found[name] for name in task.outputs.moments}
    if task.labels is not None:
        assert sums.own.target is not None
        moments["target"] = sums.own.target
    own, other = sums.own, sums.other
    lses = RowSums(own.maximum, own.log_total, other.maximum, other.log_total)
    if task.left_in is None:
        return lses, moments
    out = ~task.left_in
    lses = RowSums(*(x.masked_fill(out, 0.0) for x in vars(lses).values()))
    return lses, {name: x.masked_fill(out, 0.0) for name, x in moments.items()}


def joint_gradients(
    task: Task,
    sums: RowSums,
    moments: Numbers,
    upstream: Tensor,
    wants: Sequence[bool],
    teacher_wants: Sequence[bool],
) -> tuple[HeadGradients, HeadGradients]:
    """The gradients of Σ upstream·outputs by student and teacher, [O, N] upstream, from one recompute for each."""
    own, other = sides_of(task)
    weights = weights_of(task, upstream)
    known, values = _known(task, sums, moments)
    labels, nothing = labels_of(task), HeadGradients(None, None, None)
    student = teacher = nothing
    if any(wants):
        found = _gradients(own, other, labels, known, weights, values, wants)
        student = _in_its_place(found, task.student)
    if task.teacher is not None and any(teacher_wants):
        mirrored = (known.swapped(), weights.swapped(), values.swapped())
        found = _gradients(other, own, labels, *mirrored, teacher_wants)
        teacher = _in_its_place(found, task.teacher)
    return student, teacher


@dataclass(frozen=True)
class SecondWalk:
    """What `joint_values` is asked for."""

    beta: float | None
    variation: bool
    alpha: float | None

    @classmethod
    def of(cls, outputs: Outputs) -> SecondWalk:
        names = outputs.moments
        mixed = _is_mixed(outputs) and not {"p_over_m", "q_over_m"}.isdisjoint(names)
        alpha = outputs.alpha if "power" in names else None
        return cls(outputs.beta if mixed else None, "distance" in names, alpha)

    @property
    def sums_anything(self) -> bool:
        return self.variation or self.beta is not None or self.alpha is not None


def _is_mixed(outputs: Outputs) -> bool:
    """Whether m is neither p nor q: otherwise the skew KLs that are left are of a softmax from itself."""
    return 0.0 < outputs.beta < 1.0


def sides_of(task: Task) -> tuple[tuple[Tensor, Head], tuple[Tensor, Head]]:
    """States and head of student and teacher as the kernels take them, of one dtype."""
    assert len(task.teachers) <= 1
    student, teacher = task.student, task.teacher
    hidden = student.hidden
    if teacher is None:
        zeros = hidden.new_zeros((hidden.shape[0], NOBODY)), Head(hidden.new_zeros((student.entries, NOBODY)))
        return _side(student, hidden.dtype), zeros
    dtype = hidden.dtype if teacher.hidden.dtype == hidden.dtype else torch.float32
    return _side(student, dtype), _side(teacher, dtype)


def _side(side: Side, dtype: torch.dtype) -> tuple[Tensor, Head]:
    head = packed(side.head).at_temperature(side.temperature)
    if side.index is not None or head.weight.dtype != dtype:
        head = SlicedHead(head.weight, head.bias, head.softcap, head.logit_scale, side.index, dtype)
    return packed_rows(side.hidden.to(dtype)), head


def labels_of(task: Task) -> Tensor | None:
    """(N,) labels for the kernels, which leave rows out by them; some where rows are left out and nothing is labelled.

    A tile of rows that are all left out costs nothing.
    """
    labels = task.labels
    if task.left_in is not None:
        some = torch.zeros_like(task.left_in, dtype=torch.int64) if labels is None else labels
        labels = some.masked_fill(~task.left_in, IGNORED)
    return None if labels is None else labels.contiguous()


def moments_of(task: Task, sums: JointSums, values: JointValues) -> dict[str, Tensor]:
    """The moments under their names of `MOMENTS`, as far as they were summed."""
    found: dict[str, Tensor | None] = {
        "forward": sums.forward_kl,
        "reverse": sums.reverse_kl,
        "entropy": sums.own.entropy,
        "p2": None if sums.log_squares is None else sums.log_squares.exp(),
        "p_over_m": values.own_to_mixture,
        "q_over_m": values.other_to_mixture,
        "overlap": values.overlap,
        "distance": values.total_variation,
        "sign": None if values.excess is None else 0.5 * values.excess,
        "power": values.power,
    }
    if not _is_mixed(task.outputs):
        # NaN stays.
        zero = 0.0 * (sums.own.lse + sums.other.lse)
        found |= {"p_over_m": zero, "q_over_m": zero, "overlap": zero + 1.0}
    if SCORE in task.outputs.names:
        assert sums.own.entropy is not None
        (factor, _), *_ = task.teachers
        # E_p[log q] = −KL(p‖q) − H(p)
        found["score"] = (sums.reverse_kl + sums.own.entropy) * -factor
    return {name: x for name, x in found.items() if x is not None}


def _known(task: Task, sums: RowSums, moments: Numbers) -> tuple[JointSums, JointValues]:
    """The kernels' records of what a forward left."""
    outputs, zero = task.outputs, torch.zeros_like(sums.maximum)
    entropy, reverse = moments.get("entropy"), moments.get("reverse", zero)
    if SCORE in moments:
        # The gradient takes KL(p‖q) + H(p), which is what the score left, and neither by itself.
        (factor, _), *_ = task.teachers
        entropy, reverse = zero, moments[SCORE] / -factor
    squares = moments["p2"].log() if "p2" in moments else None
    own = HeadSums(sums.maximum, sums.log_total, entropy=entropy)
    other = HeadSums(sums.teacher_maximum, sums.teacher_log_total)
    second = SecondWalk.of(outputs)
    mixed = second.beta is not None
    values = JointValues(
        second.beta,
        second.alpha,
        other_to_mixture=moments.get("q_over_m") if mixed else None,
        own_to_mixture=moments.get("p_over_m") if mixed else None,
        # In JSD's gradient it cancels out, and so is not kept for that.
        overlap=moments.get("overlap", zero) if mixed else None,
        total_variation=moments.get("distance"),
        excess=2.0 * moments["sign"] if "sign" in moments else None,
        power=moments.get("power"),
    )
    return JointSums(own, other, moments.get("forward", zero), reverse, squares), values


def weights_of(task: Task, upstream: Tensor) -> JointWeights:
    """dL/doutput [O, N] as the kernels' weights."""
    found: dict[str, Tensor] = {}
    for name, c in zip(task.outputs.names, upstream.float(), strict=True):
        for weight, factor in _parts(name, task):
            part = c if factor == 1.0 else c * factor
            found[weight] = found[weight] + part if weight in found else part
    return JointWeights(**found)


def _parts(name: str, task: Task) -> Iterator[tuple[str, float]]:
    """An output as a sum of those that the kernels weigh."""
    beta = task.outputs.beta
    if name == SCORE:
        (factor, _), *_ = task.teachers
        yield from (("reverse_kl", -factor), ("entropy", -factor))
    elif name == "jsd":
        yield from (("other_to_mixture", beta), ("own_to_mixture", 1.0 - beta))
    elif name in _WEIGHTS:
        yield _WEIGHTS[name], 1.0
    elif _is_mixed(task.outputs):
        yield _MIXED[name], 1.0


_WEIGHTS = {
    "logps": "logps",
    "lse": "lse",
    "teacher_lse": "other_lse",
    "entropy": "entropy",
    "log_sum_p2": "log_squares",
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "tvd": "total_variation",
    "alpha": "power",
}
_MIXED = {"skew_forward_kl": "other_to_mixture", "skew_reverse_kl": "own_to_mixture"}


def _gradients(
    own: tuple[Tensor, Head],
    other: tuple[Tensor, Head],
    labels: Tensor | None,
    sums: JointSums,
    weights: JointWeights,
    values: JointValues,
    wants: Sequence[bool],
) -> HeadGradients:
    want_hidden, want_weight, want_bias = wants
    return joint_backward.joint_gradients(
        *own,
        *other,
        labels,
        sums,
        weights,
        values,
        ignore_index=IGNORED,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
    )


def _in_its_place(grads: HeadGradients, side: Side) -> HeadGradients:
    """In the side's dtype, and at the rows of the head that its index names."""

    def placed(x: Tensor | None) -> Tensor | None:
        if x is None or side.index is None:
            return None if x is None else x.to(side.hidden.dtype)
        whole = x.new_zeros((side.head.vocab_size, *x.shape[1:]), dtype=side.hidden.dtype)
        return whole.index_copy_(0, side.index, x.to(whole.dtype))

    hidden = None if grads.hidden is None else grads.hidden.to(side.hidden.dtype)
    return HeadGradients(hidden, placed(grads.weight), placed(grads.bias))
