"""`linear_expected_score`: a policy's mean of what is linear in other models' log-probabilities.

Letters: N tokens, D hidden of each model, V vocabulary, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.checks import check_transforms, naming
from tvkd_fast.ops.dispatch import Impl, resolve
from tvkd_fast.ops.inputs import as_head, head_input
from tvkd_fast.ops.joint import backend
from tvkd_fast.ops.joint.outputs import SCORE, Outputs
from tvkd_fast.ops.joint.pair_input import (
    check_joint_finite,
    check_numbers_per_row,
    check_same_tokens,
    check_temperature,
    check_vocabularies,
)
from tvkd_fast.ops.registered import (
    Gradients,
    as_tensors,
    check_differentiated_once,
    fake_gradients,
    wanted_gradients,
)
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import Task

NAME = "linear_expected_score"
_OUTPUTS = Outputs((SCORE,))
Clip = tuple[float, float] | None


def linear_expected_score(
    hidden: Tensor,
    weight: Tensor | Head,
    *,
    heads: Sequence[tuple[float, Tensor, Tensor | Head]],
    temperature: float = 1.0,
    clip: Clip = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """E_p[Σ_i c_i log q_i] of each token: the policy's mean of other models' weighted log-probabilities.

    With a DPO-trained teacher at 1 and its reference at −1 it is the expected advantage E_p[log q − log r] of ADPA
    (arXiv 2502.17927) and of G-OPD (arXiv 2602.12125) over the whole vocabulary, and VARD's expected value: what a
    sampled token estimates, without the sampling's variance.

    Args:
        hidden: [N, D] the policy's states. bfloat16, float16, float32 or float64.
        weight: [V, D] the policy's head, or a `Head`.
        heads: (c, states [N, D'], weight [V, D'] or `Head`) of each other model, c ≠ 0. Constants: no gradient goes
            to them.
        temperature: τ > 0, by which all models' logits are divided.
        clip: limits of every token's Σ_i c_i log q_i, before the mean is taken; none where None.
        bias, softcap, logit_scale: of the policy's logits, as in `linear_logps`.
        rows, impl: as in `linear_divergence`.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats, of either sign. Differentiable once by hidden, weight and bias:
        p·(x − E_p x) by the logits, x = Σ_i c_i log q_i. Memory as in `linear_divergence`.

    Raises:
        ValueError, RuntimeError: as `linear_divergence`; no heads, a c of 0, vocabularies of other sizes than the
            policy's.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> linear_expected_score(hidden, weight, heads=[(1.0, hidden, weight), (-1.0, torch.zeros(2, 4), weight)])
        tensor([0.1092, 0.1092])
    """
    check_temperature(temperature)
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip must be two rising limits, got {clip}")
    with naming("policy"):
        hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    check_transforms(NAME, hidden, head.weight, head.bias)
    check_numbers_per_row(hidden, rows=rows)
    if not heads:
        raise ValueError("heads is empty: give (c, states, head) of each model whose log-probabilities are weighed")
    factors, states, others = [], [], []
    for factor, other_hidden, other_weight in heads:
        if not (-math.inf < factor < math.inf) or factor == 0:
            raise ValueError(f"a head's factor must be finite and not 0, got {factor}: leave the head out")
        with naming("other head"):
            other_hidden, other = head_input(other_hidden.detach(), as_head(other_weight))
        check_same_tokens(hidden, other_hidden)
        check_vocabularies(head, other, None, hidden)
        factors.append(float(factor))
        states.append(other_hidden)
        others.append(other)
    empty = hidden.new_empty(0)
    values, _ = score_op(
        hidden,
        head.weight,
        head.bias,
        states,
        [x.weight.detach() for x in others],
        [empty if x.bias is None else x.bias.detach() for x in others],
        rows,
        factors,
        # A list of an op's schema holds no None: there is no softcap of 0.
        [x.softcap or 0.0 for x in others],
        [x.logit_scale for x in others],
        head.softcap,
        head.logit_scale,
        temperature,
        *((-math.inf, math.inf) if clip is None else map(float, clip)),
        resolve(impl, hidden),
    )
    return values


def _task(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    factors: Sequence[float],
    softcaps: Sequence[float],
    scales: Sequence[float],
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    *,
    low: float,
    high: float,
) -> Task:
    others = [
        Head(w, b if b.numel() else None, cap or None, scale)
        for w, b, cap, scale in zip(weights, biases, softcaps, scales, strict=True)
    ]
    sides = [Side(h, other, temperature) for h, other in zip(states, others, strict=True)]
    student = Side(hidden, Head(weight, bias, softcap, logit_scale), temperature)
    kept = backend.kept_rows(None, rows, 0)
    outputs = replace(_OUTPUTS, clip=None if low == -math.inf and high == math.inf else (low, high))
    return Task(student, tuple(zip(factors, sides, strict=True)), outputs, kept=kept, left_in=rows)


def _score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    factors: Sequence[float],
    softcaps: Sequence[float],
    scales: Sequence[float],
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    low: float,
    high: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The scores (N,), 0 in rows that are left out; for the backward sums and moment, [5, N]."""
    task = _task(
        *(hidden, weight, bias, states, weights, biases, rows),
        *(factors, softcaps, scales, softcap, logit_scale, temperature),
        low=low,
        high=high,
    )
    numbers = backend.joint_sums(task, impl)
    values = numbers.moments["score"].to(accumulation_dtype(hidden.dtype))
    if rows is not None:
        values = values.masked_fill(~rows, 0.0)
    (_, first), *_ = task.teachers
    check_joint_finite(values[None], (NAME,), numbers.sums, (hidden, task.student.head), (first.hidden, first.head))
    return values, numbers.packed(values.dtype)


def _score_gradients(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    numbers: Tensor,
    factors: Sequence[float],
    softcaps: Sequence[float],
    scales: Sequence[float],
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    low: float,
    high: float,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    task = _task(
        *(hidden, weight, bias, states, weights, biases, rows),
        *(factors, softcaps, scales, softcap, logit_scale, temperature),
        low=low,
        high=high,
    )
    if rows is not None:
        upstream = upstream.masked_fill(~rows, 0.0)
    known = backend.unpacked(numbers, _OUTPUTS)
    wants = (want_hidden, want_weight, want_bias)
    grads, _ = backend.joint_gradients(task, impl, known, upstream[None], wants, (False, False, False))
    return as_tensors(grads, hidden)


score_op = torch.library.custom_op("tvkd_fast::linear_expected_score", _score, mutates_args=())
score_gradients_op = torch.library.custom_op(
    "tvkd_fast::linear_expected_score_gradients", _score_gradients, mutates_args=()
)
score_gradients_op.register_fake(fake_gradients)


@score_op.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty((5, hidden.shape[0]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, states, weights, biases, rows, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count = len(states)
    ctx.save_for_backward(hidden, weight, bias, rows, output[1], *states, *weights, *biases)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    check_differentiated_once(NAME)
    hidden, weight, bias, rows, numbers, *lists = ctx.saved_tensors
    count, wants = ctx.count, ctx.needs_input_grad[:3]
    states, weights, biases = (lists[i * count : (i + 1) * count] for i in range(3))
    grads = score_gradients_op(
        upstream, hidden, weight, bias, states, weights, biases, rows, numbers, *ctx.settings, *wants
    )
    # The gradient of a list of tensors is a list.
    of_lists = [[None] * count for _ in range(3)]
    return (*wanted_gradients(grads, wants), *of_lists, None, *[None] * len(ctx.settings))


score_op.register_autograd(_backward, setup_context=_keep)
