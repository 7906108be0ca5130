"""`linear_logps` with a sparse gradient: its settings, what it says of itself, and the registered ops.

Letters: N tokens, D hidden, V vocabulary, E marked entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadSums, SelectedEntries, SelectionRule
from tvkd_fast.ops import sparse_tiles
from tvkd_fast.ops.break_even import break_even
from tvkd_fast.ops.checks import check_finite, check_label_range
from tvkd_fast.ops.dispatch import without_autocast
from tvkd_fast.ops.head import kept_rows, spread
from tvkd_fast.ops.registered import (
    Gradients,
    as_tensors,
    asked_for,
    check_differentiated_once,
    differentiates_first,
    fake_gradients,
)
from tvkd_fast.ops.tiles import accumulation_dtype

GradMode = Literal["exact", "sparse", "auto"]
Tail = Literal["even", "unbiased"]
GRAD_MODES = ("exact", "sparse", "auto")
TAILS = ("even", "unbiased")
LARGEST_EPS = 2.0**-4


@dataclass(frozen=True, kw_only=True)
class HeadGradient:
    """How the head's gradient is made: exactly, or from the softmax's few entries (docs/numerics.md, what it costs).

    Raises:
        ValueError: a setting that does not exist or is out of its range.

    Examples:
        >>> import torch
        >>> gradient = HeadGradient(grad_mode="sparse")
        >>> gradient.eps_for(torch.float32) == 2.0**-16, gradient.cap_for(49152)
        (True, 3072)
    """

    grad_mode: GradMode = "exact"
    """exact; sparse; or auto, which is sparse but for calls with more entries than pay on this machine."""
    eps: float | None = None
    """ε: softmax entries below it are not kept. None: 2⁻¹⁶ in float32 and float64, 2⁻¹⁴ in 16 bits."""
    row_cap: int | None = None
    """A row with more entries gets the exact gradient. None: V/16."""
    tail: Tail = "even"
    """What becomes of the rest: spread evenly over all other columns, or an entry kept with probability p/ε as ε."""
    seed: int | None = None
    """Of the unbiased tail; None draws one a call from torch's generator."""
    max_tail: float = 0.1
    """Where the mean of what is left out, as probability, passes this, every row gets the exact gradient."""
    workspace_mb: int = 0
    """Exact gradients in torch: keep logits of as many rows as fit, 4·V bytes each, for three products and not four."""

    def __post_init__(self) -> None:
        if self.grad_mode not in GRAD_MODES:
            raise ValueError(f"grad_mode must be one of {', '.join(GRAD_MODES)}, got {self.grad_mode!r}")
        if self.eps is not None and not 0 <= self.eps <= LARGEST_EPS:
            raise ValueError(f"eps must lie in [0, 2**-4], got {self.eps}: 2**-14 and 2**-16 are the usual ones")
        if self.row_cap is not None and self.row_cap < 1:
            raise ValueError(
                f"row_cap must be at least 1 entry, got {self.row_cap}; None is a sixteenth of the vocabulary"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if not 0 <= self.max_tail <= 1:
            raise ValueError(f"max_tail is a probability in [0, 1], got {self.max_tail}")
        if self.workspace_mb < 0:
            raise ValueError(f"workspace_mb is memory in MiB, 0 for none, got {self.workspace_mb}")
        if self.workspace_mb and self.grad_mode != "exact":
            raise ValueError(
                f"workspace_mb keeps logits for exact gradients, which grad_mode={self.grad_mode!r} is not: leave it 0"
            )

    def eps_for(self, dtype: torch.dtype) -> float:
        if self.eps is not None:
            return self.eps
        return 2.0**-14 if dtype in (torch.float16, torch.bfloat16) else 2.0**-16

    def seed_for(self) -> int:
        if self.tail == "even":
            return 0
        return int(torch.randint(2**31, ())) if self.seed is None else self.seed

    def cap_for(self, vocab_size: int) -> int:
        return max(1, vocab_size // 16) if self.row_cap is None else self.row_cap


class HeadStats:
    """What sparse gradients were made of, summed over calls on their device: reading it waits, adding does not.

    Examples:
        >>> import torch
        >>> from tvkd_fast import linear_logps
        >>> stats, hidden = HeadStats(), 20 * torch.eye(4, requires_grad=True)
        >>> logps = linear_logps(hidden, torch.eye(32, 4), torch.arange(4), grad_mode="sparse", stats=stats)
        >>> stats.read()["head_dense_rows"]
        0.0
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """(5,): tokens, entries beside the labels', entries marked for them, Σ tail, dense rows, of one call.

        Triton's kernels prune in the backward: in theirs, what is marked counts as kept.
        """
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self) -> dict[str, float]:
        """Over rows that were not dense, entries a token and mean tail; entries marked over entries kept, a dense row's
        among the marked; the share of rows that were dense.
        """
        if self.sums is None:
            return {}
        tokens, entries, marked, tail, dense = self.sums.tolist()
        sparse = max(tokens - dense, 1.0)
        return {
            "head_entries": entries / sparse,
            "head_marked": marked / max(entries, 1.0),
            "head_tail": tail / sparse,
            "head_dense_rows": dense / max(tokens, 1.0),
        }

    def reset(self) -> None:
        self.sums = None


def _sparse_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    eps: float,
    row_cap: int,
    unbiased: bool,
    seed: int,
    max_tail: float,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (N,); for the backward max z, log Σ exp(z − max z) and z at the label, (N,) each, and
    `SelectedEntries`; then `HeadStats`' five sums.

    `measure` takes every row as dense where that is quicker on this machine.
    """
    labels = labels.long()
    check_label_range(labels, weight.shape[0], ignore_index)
    head = Head(weight, bias, softcap, logit_scale)
    limit = break_even(hidden.device, hidden.dtype, *weight.shape) if measure else float("inf")
    rule = SelectionRule(eps, row_cap, unbiased, seed, max_tail, limit)
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        sums, marks = sparse_tiles.mark(hidden, head, labels if kept is None else labels[kept], rule, kept=kept)
        sums = spread(sums, kept, hidden)
        logps = sums.logps.masked_fill_(labels == ignore_index, 0.0)
    check_finite(logps, hidden, weight, bias)
    assert sums.target is not None
    assert marks.below is not None
    counted = labels != ignore_index
    dense = marks.dense & counted
    counts = torch.tensor([marks.count, marks.marked], dtype=torch.float64, device=hidden.device)
    numbers = torch.stack(
        [
            counted.sum().double(),
            *counts,
            marks.below.masked_fill(marks.dense | ~counted, 0.0).sum().double(),
            dense.sum().double(),
        ]
    )
    chain = logps.new_empty(0) if marks.chain is None else marks.chain
    found = (marks.rows, marks.columns, marks.p, chain, marks.bounds, marks.tail, dense)
    return logps, sums.maximum, sums.log_total, sums.target, *found, numbers


def _sparse_gradients(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    target: Tensor,
    rows: Tensor,
    columns: Tensor,
    p: Tensor,
    chain: Tensor,
    bounds: Tensor,
    tail: Tensor,
    dense: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    labels = labels.long()
    marks = SelectedEntries(rows, columns, p, chain if softcap is not None else None, bounds, tail, dense)
    with without_autocast(hidden):
        kept = kept_rows(labels, ignore_index)
        upstream = grad_logps.masked_fill(labels == ignore_index, 0.0)
        numbers = (labels, maximum, log_total, target, upstream)
        if kept is not None:
            labels, maximum, log_total, target, upstream = (x[kept] for x in numbers)
        grads = sparse_tiles.sparse_gradients(
            hidden,
            Head(weight, bias, softcap, logit_scale),
            labels,
            HeadSums(maximum, log_total, target=target),
            marks,
            upstream,
            kept=kept,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )
    return as_tensors(grads, hidden)


sparse_op = torch.library.custom_op("tvkd_fast::sparse_logps", _sparse_logps, mutates_args=())
sparse_gradients_op = torch.library.custom_op("tvkd_fast::sparse_logps_gradients", _sparse_gradients, mutates_args=())


@sparse_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, *_: Any) -> Any:
    context = torch.library.get_ctx()
    entries, tiles = context.new_dynamic_size(), context.new_dynamic_size(min=1)
    dtype = accumulation_dtype(hidden.dtype)
    tokens = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)]
    places = [hidden.new_empty(entries, dtype=torch.int32) for _ in range(2)]
    chain = hidden.new_empty(0 if softcap is None else entries, dtype=dtype)
    bounds = torch.empty(tiles, dtype=torch.int64)
    tail, dense = torch.empty_like(tokens[0]), torch.empty_like(tokens[0], dtype=torch.bool)
    sums = hidden.new_empty(5, dtype=torch.float64)
    return *tokens, *places, hidden.new_empty(entries, dtype=dtype), chain, bounds, tail, dense, sums


@sparse_gradients_op.register_fake
def _(grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Gradients:
    return fake_gradients((hidden, weight, bias), args[-3:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *settings = inputs
    ctx.transforms = settings[:3]
    differentiates_first(ctx, output)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:-1])


def _backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_differentiated_once("linear_logps")
    if grad_logps is None:
        return (None,) * len(ctx.needs_input_grad)
    wants = ctx.needs_input_grad[:3]
    grads = sparse_gradients_op(grad_logps, *ctx.saved_tensors, *ctx.transforms, *wants)
    return (*asked_for(grads, wants), *[None] * 10)


sparse_op.register_autograd(_backward, setup_context=_keep)
