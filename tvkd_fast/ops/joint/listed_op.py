"""The registered op of listed entries: their logits, and what all other entries sum to, differentiable.

Letters: N tokens, D hidden, V vocabulary, k listed entries of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.checks import check_finite
from tvkd_fast.ops.joint.backend import kept_rows, spread
from tvkd_fast.ops.joint.row_numbers import RowSums
from tvkd_fast.ops.registered import (
    Gradients,
    as_tensors,
    check_differentiated_once,
    fake_gradients,
    wanted_gradients,
)
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.joint import listed
from tvkd_fast.ops.tiles.joint.sides import Side

NAME = "linear_sparse_divergence"


def _listed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z/τ at the ids [N, k]; of all other entries the LSE and the sum, (N,) each, then the LSE in two parts; 0 in rows
    that are left out.
    """
    check_ids(ids, weight.shape[0])
    side, kept = Side(hidden, Head(weight, bias, softcap, logit_scale), temperature), kept_rows(None, rows, 0)
    with without_autocast(hidden):
        found = listed.listed_logits(side, ids if kept is None else ids[kept], kept)
    numbers = (found.logits, found.maximum + found.log_total, found.total, found.maximum, found.log_total)
    if ids.shape[1] < weight.shape[0]:
        check_finite(numbers[1], hidden, weight, bias)
    if kept is None:
        return numbers
    among_all = [spread(x, kept, hidden.shape[0]) for x in numbers]
    return among_all[0], among_all[1], among_all[2], among_all[3], among_all[4]


def _listed_gradients(
    by_logits: Tensor,
    by_lse: Tensor,
    by_total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> Gradients:
    side, kept = Side(hidden, Head(weight, bias, softcap, logit_scale), temperature), kept_rows(None, rows, 0)
    of_rows = [by_logits, by_lse, by_total, maximum, log_total, ids]
    if kept is not None:
        of_rows = [x[kept] for x in of_rows]
    elif rows is not None:
        of_rows[:3] = [x * (rows[:, None] if x.dim() == 2 else rows) for x in of_rows[:3]]
    by_logits, by_lse, by_total, maximum, log_total, ids = of_rows
    sums = RowSums(maximum, log_total, maximum, log_total)
    with without_autocast(hidden):
        grads = listed.listed_gradients(
            side, ids, kept, sums, by_logits, by_lse, by_total, (want_hidden, want_weight, want_bias)
        )
    return as_tensors(grads, hidden)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Each in [0, V) or −1, and each of a row once; looked at on a CPU only."""
    if ids.device.type != "cpu":
        return
    bad = ((ids < -1) | (ids >= vocab_size)).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        raise ValueError(
            f"ids out of range in row {row}: {int(ids[row, place])} not in [0, {vocab_size}) and not -1, which stands "
            "for none; does the tokenizer belong to this model?"
        )
    ordered = ids.sort(1).values
    again = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(again):
        row, place = again[0].tolist()
        raise ValueError(
            f"ids name token {int(ordered[row, place])} twice in row {row}: give it once, with the sum of its "
            "probabilities, and -1 for what is over"
        )


listed_op = torch.library.custom_op("tvkd_fast::linear_listed", _listed, mutates_args=())
listed_gradients_op = torch.library.custom_op("tvkd_fast::linear_listed_gradients", _listed_gradients, mutates_args=())


@listed_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_empty(ids.shape, dtype=dtype), *(hidden.new_empty(ids.shape[:1], dtype=dtype) for _ in range(4))


@listed_gradients_op.register_fake
def _(by_logits: Tensor, by_lse: Tensor, by_total: Tensor, *args: Any) -> Gradients:
    return fake_gradients(by_logits, *args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:5], *output[3:])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    check_differentiated_once(NAME)
    wants = ctx.needs_input_grad[:3]
    grads = listed_gradients_op(*upstream[:3], *ctx.saved_tensors, *ctx.settings, *wants)
    return (*wanted_gradients(grads, wants), *[None] * 5)


listed_op.register_autograd(_backward, setup_context=_keep)
