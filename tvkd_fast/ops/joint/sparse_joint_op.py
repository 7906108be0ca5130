"""The registered op of the joint walk with a sparse gradient: the forward selects entries, the backward gathers them.

Letters: N tokens, K of them kept, D hidden of each model, V vocabulary, O outputs, M moments, E selected entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import SelectionRule
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.break_even import break_even
from tvkd_fast.ops.gradient import HeadGradient, HeadStats
from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.joint_op import fake_values, outputs_of, task_of, values_of
from tvkd_fast.ops.joint.outputs import terms_of
from tvkd_fast.ops.joint.pair_input import JointInput
from tvkd_fast.ops.registered import Gradients, Kept, as_tensors, differentiate, fake_gradients
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.joint import sparse_walk
from tvkd_fast.ops.tiles.joint.selected_pairs import SelectedPairs
from tvkd_fast.ops.tiles.joint.walk import Task

NAME = "linear_joint"
TENSORS = 10
"""As in `joint_op`: both models' hidden, weight and bias, labels, teacher_index, teacher_lse, rows."""
STUDENT = 3
"""Of those the ones that are differentiated."""
SETTINGS = 9
"""The settings that say which walk it is; those of the selection follow."""
CAP_SHARE = 8
"""A row with more than this part of the vocabulary is dense. A head's is V/16: two softmaxes have more entries, and a
dense row costs the logits of both models again."""


def sparse_joint(given: JointInput, gradient: HeadGradient, stats: HeadStats | None, impl: str) -> Tensor:
    """The outputs [O, N], differentiable by the student; `stats` gets the call's five sums."""
    check_sparse(given)
    backend.without_kernels(impl, "sparse gradients of divergences")
    hidden, weight = given.hidden, given.tensors[1]
    assert weight is not None
    *settings, _ = given.settings
    values, *_, numbers = sparse_joint_op(
        *given.tensors,
        *settings,
        gradient.eps_for(hidden.dtype),
        max(1, weight.shape[0] // CAP_SHARE) if gradient.row_cap is None else gradient.row_cap,
        gradient.max_tail,
        gradient.grad_mode == "auto",
    )
    if stats is not None:
        stats.add(numbers)
    found: Tensor = values
    return found


def is_sparse(given: JointInput, gradient: HeadGradient) -> bool:
    """Whether a call takes a sparse gradient: where one is asked for, of anything."""
    return gradient.grad_mode != "exact" and torch.is_grad_enabled() and any(_differentiated(given))


def check_sparse(given: JointInput) -> None:
    """Refuse the gradients that there are exact ones of alone."""
    if any(_differentiated(given)[STUDENT:]):
        raise ValueError(
            "the teacher requires a gradient, and a sparse one is the student's alone: take grad_mode='exact', or "
            "detach teacher_hidden and the teacher's head"
        )


def _differentiated(given: JointInput) -> list[bool]:
    return [x is not None and x.requires_grad for x in given.tensors[: 2 * STUDENT]]


def _rule(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor | None,
    eps: float,
    row_cap: int,
    max_tail: float,
    measure: bool,
) -> SelectionRule:
    """`measure` takes every row as dense where that is quicker on this machine."""
    limit = float("inf")
    if measure:
        # The exact backward recomputes the teacher's logits beside the three products of a head.
        ratio = 0.0 if teacher is None else teacher.shape[1] / hidden.shape[1]
        limit = break_even(hidden.device, hidden.dtype, *weight.shape) * (3.0 + ratio) / 3.0
    return SelectionRule(eps, row_cap, max_tail=max_tail, max_entries=limit)


def _without_left_out(task: Task) -> Task:
    """The task of the rows that count alone, on a GPU too: a selection waits for the count of its entries anyhow, and
    what it decides by averages must not average over others."""
    if task.kept is not None or task.left_in is None:
        return task
    kept = task.left_in.nonzero()[:, 0]
    return task if len(kept) == len(task.left_in) else replace(task, kept=kept)


def _sparse_joint(
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
    eps: float,
    row_cap: int,
    max_tail: float,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs [O, N]; for the backward the sums and moments [4 + M, N] and `SelectedPairs`; then `HeadStats`' five
    sums.
    """
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
    task = _without_left_out(task)
    rule = _rule(hidden, weight, teacher_hidden, eps, row_cap, max_tail, measure)
    with without_autocast(hidden):
        sums, moments, selected = sparse_walk.select_pairs(task, rule)
    if task.labels is not None:
        moments = moments | {"target": selected.label[0, task.rows]}
    numbers = backend.spread_numbers(task, sums, moments)
    values = values_of(task, numbers)
    counted = torch.ones_like(selected.dense) if task.left_in is None else task.left_in
    dense = selected.dense & counted
    tail = selected.tail.double().masked_fill(dense | ~counted, 0.0).sum()
    counts = torch.tensor([selected.rows.shape[0], selected.candidates], dtype=torch.float64, device=hidden.device)
    stats = torch.stack([counted.sum().double(), *counts, tail, dense.sum().double()])
    found = (selected.rows, selected.columns, selected.log_p, selected.log_q, selected.bounds, selected.label)
    packed = numbers.packed(values.dtype)[: 4 + len(task.outputs.moments)]
    return values, packed, *found, selected.rest, selected.tail, selected.dense, stats


def _sparse_joint_gradients(
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
    entry_rows: Tensor,
    columns: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    bounds: Tensor,
    label: Tensor,
    rest: Tensor,
    tail: Tensor,
    dense: Tensor,
    names: str,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    temperature: float,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
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
    task = _without_left_out(task)
    if task.left_in is not None:
        upstream = upstream.masked_fill(~task.left_in, 0.0)
    known = backend.unpacked(numbers, task.outputs)
    sums, moments, kept = known.sums, known.moments, task.kept
    if kept is not None:
        sums, upstream = sums.of(kept), upstream[:, kept]
        moments = {name: x[kept] for name, x in moments.items()}
    selected = SelectedPairs(entry_rows, columns, log_p, log_q, bounds, label, rest, tail, dense)
    with without_autocast(hidden):
        grads = sparse_walk.sparse_gradients(
            task, sums, moments, selected, upstream, (want_hidden, want_weight, want_bias)
        )
    return as_tensors(grads, hidden)


sparse_joint_op = torch.library.custom_op("tvkd_fast::sparse_joint", _sparse_joint, mutates_args=())
sparse_joint_gradients_op = torch.library.custom_op(
    "tvkd_fast::sparse_joint_gradients", _sparse_joint_gradients, mutates_args=()
)
sparse_joint_gradients_op.register_fake(fake_gradients)


@sparse_joint_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    values, _ = fake_values(hidden, None, *args[9:12])
    context = torch.library.get_ctx()
    entries, tiles = context.new_dynamic_size(), context.new_dynamic_size(min=1)
    outputs, dtype, n = outputs_of(*args[9:12]), accumulation_dtype(hidden.dtype), hidden.shape[0]
    places = [hidden.new_empty(entries, dtype=torch.int32) for _ in range(2)]
    logs = [
        hidden.new_empty(entries, dtype=dtype),
        hidden.new_empty(entries if args[2] is not None else 0, dtype=dtype),
    ]
    terms = 0 if args[12] is None else len(terms_of(outputs))
    shapes = ((2, n), (terms, n), (n,))
    label, rest, tail = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    numbers = hidden.new_empty((4 + len(outputs.moments), n), dtype=dtype)
    bounds, dense = torch.empty(tiles, dtype=torch.int64), torch.empty_like(tail, dtype=torch.bool)
    stats = hidden.new_empty(5, dtype=torch.float64)
    return values, numbers, *places, *logs, bounds, label, rest, tail, dense, stats


def _kept(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Kept:
    return (*inputs[:TENSORS], *output[1:-1]), inputs[TENSORS : TENSORS + SETTINGS]


def _derivative(upstream: Tensor, kept: Sequence[Any], settings: Sequence[Any], wants: Sequence[bool]) -> Gradients:
    grads: Gradients = sparse_joint_gradients_op(upstream, *kept, *settings, *wants)
    return grads


differentiate(sparse_joint_op, _kept, _derivative, name=NAME, count=STUDENT)
