"""Step 2, the kernels of a sparse gradient: bits, lists, and dH and dW gathered from them.

Letters: N tokens, V vocabulary, E entries, W words of 32 bits per row.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from bench.harness.checker import largest, relative
from bench.minutes.alone.problem import NATS, Problem
from bench.minutes.cases import Row, judged
from tvkd_fast.kernels import gathers
from tvkd_fast.kernels.dense_columns import DenseColumns
from tvkd_fast.kernels.records import HeadGradients, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists, count_selected, list_selected
from tvkd_fast.kernels.selection_bits import selection_bits, selection_tiles, words_per_row
from tvkd_fast.kernels.sparse_columns import sparse_columns
from tvkd_fast.kernels.sparse_rows import sparse_rows

EPS = 2.0**-8
KEPT = 9
"""Entries of each row in the gathers' checks, its label's among them."""
BORDER = 1e-2
"""An entry this near ε, relatively, may be selected or not."""


def _bits(words: Tensor, count: int) -> Tensor:
    """[N, V] bool of words [N, W] int32, 32 bits each, the lowest first."""
    places = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[:, :, None] >> places) & 1).flatten(1)[:, :count].bool()


def bits(of: Problem) -> Row:
    """A bit for every p ≥ ε and none below, where the bound of the log-sum-exp is the sum itself."""
    n, _, v = of.shape
    config = selection_tiles(of.hidden, of.head, unbiased=False)
    words = of.hidden.new_empty((n, words_per_row(of.head, config)), dtype=torch.int32)
    none = DenseColumns.of(of.labels.new_empty(0), of.head)
    sums = {
        name: of.hidden.new_empty(n, dtype=torch.float32) for name in ("maximum", "log_total", "lse_kappa", "target")
    }
    selection_bits(
        of.hidden,
        of.head,
        of.labels,
        SelectionRule(EPS, row_cap=v),
        words,
        sums,
        config,
        lse_bounds=of.memory.copied(of.z.logsumexp(1).float()),
        is_sparse=of.memory.copied(none.is_sparse),
        sparse_words=of.memory.copied(none.sparse_words(words.shape[1])),
        hashes=None,
        ignore_index=-100,
    )
    found, p = _bits(words, v)[of.kept], of.p[of.kept]
    differing = (found != (p >= EPS)) & ((p / EPS - 1).abs() > BORDER)
    errors = {
        "lse": largest((sums["maximum"] + sums["log_total"])[of.kept], of.z[of.kept].logsumexp(1)),
        "target": largest(sums["target"][of.kept], of.z.gather(1, of.own)[:, 0][of.kept]),
        "bits that differ": float(differing.sum()),
    }
    return judged(errors, {"lse": NATS, "target": NATS, "bits that differ": 0.0})


def lists(of: Problem) -> Row:
    """Counts and ascending columns of drawn bits; rows to ignore count none."""
    n, _, v = of.shape
    width = -(-v // 32)
    chosen = torch.rand(n, width * 32, device=of.hidden.device) < 0.1
    chosen[:, v:] = False
    shifts = torch.arange(32, device=chosen.device)
    # Summed in 64 bits, whose lower half is the word: bit 31 is its sign.
    packed = (chosen.view(n, width, 32).long() << shifts).sum(2)
    words = of.memory.copied(torch.where(packed >= 2**31, packed - 2**32, packed).int())
    counts = count_selected(words, of.labels, -100)
    columns = list_selected(words, counts)
    want = chosen & of.kept[:, None]
    errors = {"counts": largest(counts, want.sum(1)), "columns": _unequal(columns, want.nonzero()[:, 1])}
    return judged(errors, 0.0)


def _unequal(got: Tensor, want: Tensor) -> float:
    """How many places of two lists differ; NaN where their lengths do."""
    return float((got != want).sum()) if len(got) == len(want) else float("nan")


class Gather:
    """Drawn entries of each row, its label's among them, and what a gradient of them alone is in float64."""

    def __init__(self, of: Problem) -> None:
        n, _, v = of.shape
        score = torch.rand(n, v, device=of.hidden.device).scatter_(1, of.own, 2.0)
        self.chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(KEPT).indices, True)
        self.chosen &= of.kept[:, None]
        counts = self.chosen.sum(1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        kept = of.p * self.chosen
        self.tail = (1.0 - kept.sum(1)) * of.kept
        none = of.labels.new_empty(0)
        self.selected = SelectedLists(
            columns=of.memory.copied(self.chosen.nonzero()[:, 1].int()),
            starts=of.memory.copied(starts),
            tail=of.memory.copied(self.tail.float()),
            dense_rows=none,
            dense_columns=none,
        )
        self.c = of.memory.copied(of.coefficients.masked_fill(~of.kept, 0.0))
        self.entries = of.delta * self.chosen
        self.even = self.c.double() * self.tail / (v - counts)
        self.rule = SelectionRule(0.0, row_cap=v)


def rows(of: Problem) -> Row:
    """dH: −u over all columns that are not kept, −c·(p − δ) of those that are."""
    g, v = Gather(of), of.shape[2]
    found, even, grad = sparse_rows(
        of.hidden,
        of.head,
        of.labels,
        of.sums,
        g.selected,
        g.rule,
        g.c,
        spread_over=torch.tensor(v, dtype=torch.int32, device=of.hidden.device),
        weight_sum=of.memory.copied(of.weight.sum(0, dtype=torch.float32)),
        start=None,
        want_hidden=True,
    )
    assert grad is not None
    weight = of.weight.double()
    kept = g.chosen.double()
    want = g.even[:, None] * (kept @ weight - weight.sum(0)) - (g.c.double()[:, None] * g.entries) @ weight
    errors = {
        "entries": largest(found, g.entries[g.chosen]),
        "u": largest(even, g.even),
        "dH": relative(grad, want),
    }
    return judged(errors, {"entries": NATS, "u": NATS, "dH": of.rounding})


def in_tiles(run: Callable[[Problem], Row]) -> Callable[[Problem], Row]:
    """A check with rows in tiles, as only D beyond what registers hold has them."""

    def tiled(of: Problem) -> Row:
        width = 1 << (of.shape[1].bit_length() - 2)
        with patch.multiple(gathers, GATHERED_WHOLE=width, GATHERED_TILE=width):
            return run(of)

    return tiled


def columns(of: Problem) -> Row:
    """dW: −Σ_t u_t·h_t of every column, and (u − c·(p − δ))·h of its entries."""
    g, v = Gather(of), of.shape[2]
    hidden = of.hidden.double()
    grad, _ = sparse_columns(
        of.hidden,
        of.head,
        g.selected,
        of.memory.copied(g.entries[g.chosen].float()),
        of.memory.copied(g.even.float()),
        g.c,
        is_sparse=of.memory.copied(torch.ones(v, dtype=torch.int8, device=of.hidden.device)),
        hidden_sum=of.memory.copied((g.even @ hidden).float()),
        start=HeadGradients(None, None, None),
        want_weight=True,
        want_bias=False,
    )
    assert grad is not None
    by_entry = (g.even[:, None] - g.c.double()[:, None] * g.entries) * g.chosen
    want = by_entry.T @ hidden - g.even @ hidden
    return judged({"dW": relative(grad, want)}, of.rounding)


SPARSE: dict[str, Callable[[Problem], Row]] = {
    "selection_bits": bits,
    "count, list": lists,
    "sparse_rows": rows,
    "sparse_columns": columns,
    "sparse_rows and wide_rows, in tiles": in_tiles(rows),
    "sparse_columns, in tiles": in_tiles(columns),
}
