"""Two models' states and heads as the joint ops take them, and what is refused.

Letters: N tokens, D hidden of each model, V vocabulary of the student, V' of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.checks import check_finite, check_labels, check_transforms, looks, naming
from tvkd_fast.ops.dispatch import resolve
from tvkd_fast.ops.inputs import as_head, head_input
from tvkd_fast.ops.joint.outputs import Outputs, check_outputs
from tvkd_fast.ops.joint.row_numbers import RowSums


def pair_input(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | Head | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    teacher_index: Tensor | None,
) -> tuple[Tensor, Head, Tensor | None, Head | None]:
    """Both models' states and heads, each in autocast's dtype where it is on, checked to fit each other."""
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight go together: the teacher's states and its head")
    with naming("student"):
        hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    if teacher_hidden is None or teacher_weight is None:
        return hidden, head, None, None
    with naming("teacher"):
        teacher_hidden, teacher_head = head_input(
            teacher_hidden, as_head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        )
    check_same_tokens(hidden, teacher_hidden)
    check_vocabularies(head, teacher_head, teacher_index, hidden)
    return hidden, head, teacher_hidden, teacher_head


class JointInput(NamedTuple):
    """The arguments of `linear_joint`, checked, as its op takes them and `fused_linear_distillation_loss`' too."""

    outputs: Outputs
    tensors: tuple[Tensor | None, ...]
    """hidden, weight and bias of student and of teacher, labels, teacher_index, teacher_lse, rows."""
    settings: tuple[Any, ...]

    @property
    def hidden(self) -> Tensor:
        hidden, *_ = self.tensors
        assert hidden is not None
        return hidden


def joint_input(
    name: str,
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | Head | None,
    labels: Tensor | None,
    outputs: Sequence[str],
    *,
    beta: float,
    alpha: float,
    temperature: float,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    teacher_index: Tensor | None,
    teacher_lse: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
    impl: str,
    numbers: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> JointInput:
    """The arguments of the function `name`, with other `numbers` (N,) of its own to check.

    A teacher that no output asks is looked at, and left out.
    """
    has_teacher, has_labels = teacher_hidden is not None, labels is not None
    asked = check_outputs(outputs, beta, alpha, labels=has_labels, teacher=has_teacher)
    check_temperature(temperature)
    hidden, head, teacher_hidden, teacher = pair_input(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        teacher_bias=teacher_bias,
        teacher_softcap=teacher_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_index=teacher_index,
    )
    of_teacher = (None, None, None) if teacher is None else (teacher_hidden, teacher.weight, teacher.bias)
    check_transforms(name, hidden, head.weight, head.bias, *of_teacher)
    check_numbers_per_row(hidden, teacher_lse=teacher_lse, rows=rows, **numbers)
    if labels is not None:
        check_labels(labels, hidden)
    if not asked.has_teacher:
        of_teacher, teacher_index, teacher_lse, teacher = (None, None, None), None, None, None
    transforms = (None, 1.0) if teacher is None else (teacher.softcap, teacher.logit_scale)
    return JointInput(
        asked,
        (
            *(hidden, head.weight, head.bias, *of_teacher),
            *(labels, teacher_index, None if teacher_lse is None else teacher_lse.detach(), rows),
        ),
        (
            *(",".join(asked.names), asked.beta, asked.alpha, head.softcap, head.logit_scale),
            *(*transforms, temperature, ignore_index, resolve(impl, hidden)),
        ),
    )


def check_same_tokens(hidden: Tensor, teacher_hidden: Tensor) -> None:
    """States of both models row for row, on one device; float64 of both or of neither."""
    if len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"hidden has {len(hidden)} rows and teacher_hidden {len(teacher_hidden)}: both are states of the same "
            "tokens, row for row"
        )
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"hidden is on {hidden.device} and teacher_hidden on {teacher_hidden.device}: move one of them"
        )
    if (teacher_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise ValueError(f"hidden is {hidden.dtype} and teacher_hidden {teacher_hidden.dtype}: cast one of them")


def check_vocabularies(head: Head, teacher: Head, index: Tensor | None, hidden: Tensor) -> None:
    """Of one size, or with an index of the student's."""
    if index is None:
        if head.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"the student's vocabulary has {head.vocab_size} tokens and the teacher's {teacher.vocab_size}: give "
                "teacher_index, (V,) the teacher's row of each of the student's tokens, or cut both heads to the "
                "tokens that they share; tokens that are padding have no probability to compare"
            )
        return
    if index.shape != (head.vocab_size,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"teacher_index must be ({head.vocab_size},) integers, the teacher's row of each of the student's tokens, "
            f"got {tuple(index.shape)} of {index.dtype}"
        )
    if index.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and teacher_index on {index.device}: move one of them")


def check_index_range(index: Tensor | None, teacher_vocab_size: int) -> None:
    """Each of the teacher's rows at most once, and no holes; looked at on a CPU only."""
    if index is None or index.device.type != "cpu":
        return
    bad = ((index < 0) | (index >= teacher_vocab_size)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"teacher_index has {int(index[bad[0]])} for token {int(bad[0])}, which is no row of the teacher's "
            f"{teacher_vocab_size}: a token that the teacher lacks has to be left out of the student's head as well, "
            "weight[kept] of the tokens that both have"
        )
    rows, counts = index.unique(return_counts=True)
    if len(rows) < len(index):
        raise ValueError(
            f"teacher_index names row {int(rows[counts.argmax()])} {int(counts.max())} times: two of the student's "
            "tokens cannot share a probability of the teacher's"
        )


def check_temperature(temperature: float) -> None:
    # Compared, since torch.compile traces a float that changes through comparisons and not through math.isfinite.
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be a positive number, got {temperature}: both models' logits are divided by it"
        )


def check_numbers_per_row(hidden: Tensor, **numbers: Tensor | None) -> None:
    """(N,) each, on hidden's device; `rows` bool."""
    for name, x in numbers.items():
        if x is None:
            continue
        if x.shape != hidden.shape[:1] or x.device != hidden.device:
            raise ValueError(
                f"{name} must be ({hidden.shape[0]},) on {hidden.device}, got {tuple(x.shape)} on {x.device}"
            )
        if name == "rows" and x.dtype != torch.bool:
            raise ValueError(f"rows must be bool, got {x.dtype}: true for the rows to compute")


def check_joint_finite(
    values: Tensor,
    names: tuple[str, ...],
    sums: RowSums,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head] | None,
) -> None:
    """Name the model and the rows behind a NaN in `values` [O, N], and a divergence that is infinite."""
    if not looks(values) or values.isfinite().all():
        return
    models = {"student": (sums.lse, student)}
    if teacher is not None:
        models["teacher"] = (sums.teacher_lse, teacher)
    for name, (lse, (hidden, head)) in models.items():
        with naming(name):
            check_finite(lse, hidden, head.weight, head.bias)
    for name, one in zip(names, values, strict=True):
        bad = (one.isnan() | one.isinf()).nonzero()[:, 0]
        if len(bad) and name not in ("logps", "lse", "teacher_lse"):
            raise ValueError(
                f"{name} is {one[bad[0]]} in row {int(bad[0])}: one model's probability of a token is 0, by a bias of "
                "-inf, where the other's is not, and the divergence has no gradient; take the token out of both heads, "
                "or kind='jsd', 'tvd' or a skew KL"
            )
