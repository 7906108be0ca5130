"""The sparse gradient of joint outputs in torch: the forward selects entries of both softmaxes, the backward gathers.

dz is dz/d(h·w_j)·dL/dz_j. It stays what it is on M = {p ≥ ε} ∪ {q ≥ ε} ∪ {label}; elsewhere it becomes one number per
row, u, such that Σ_j dz_j is the exact gradient's: 0 of what a shift of all logits does not change, which is all but
LSE(z), whose is 1; with a softcap a sum of the forward's.

Letters: N tokens, K of them kept, R rows of a block, E entries, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients, SelectedEntries, SelectionRule
from tvkd_fast.ops.joint.outputs import factors_of, terms_of
from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles.exact import Tiles
from tvkd_fast.ops.tiles.joint import one_walk
from tvkd_fast.ops.tiles.joint.entries import Entries
from tvkd_fast.ops.tiles.joint.gradient_products import Gradients
from tvkd_fast.ops.tiles.joint.selected_pairs import SelectedPairs
from tvkd_fast.ops.tiles.joint.two_walks import TwoWalks
from tvkd_fast.ops.tiles.joint.walk import Task, add_gradients
from tvkd_fast.ops.tiles.selected import Collected
from tvkd_fast.ops.tiles.sparse import ByColumn, SparseParts, too_flat


def select_pairs(task: Task, rule: SelectionRule) -> tuple[RowSums, dict[str, Tensor], SelectedPairs]:
    """LSEs (K,) and moments (K,), and what a sparse gradient needs, in one product of each model."""
    student, outputs = task.student, task.outputs
    tiles = _tiles(task)
    hidden, acc, n = student.hidden, tiles.acc, student.hidden.shape[0]
    walk = (one_walk.OneWalk if one_walk.fits(task, tiles) else TwoWalks)(task, tiles, rule)
    models = 1 if task.teacher is None else 2
    blocks = task.rows.split(tiles.rows)
    found = Collected(hidden, [torch.int32, torch.int32, *[acc] * models], row_blocks=len(blocks))
    sums: list[RowSums] = []
    moments: dict[str, list[Tensor]] = {name: [] for name in outputs.moments}
    terms = 0 if student.head.softcap is None else len(terms_of(outputs))
    label, rest = hidden.new_full((2, n), torch.nan, dtype=acc), hidden.new_zeros((terms, n), dtype=acc)
    tail, dense = hidden.new_zeros(n, dtype=acc), hidden.new_zeros(n, dtype=torch.bool)
    candidates = 0
    for rows in blocks:
        if not len(rows):
            break
        one = walk.visit(rows, None if task.labels is None else task.labels[rows])
        sums.append(one.sums)
        for name, x in one.moments.items():
            moments[name].append(x.to(acc))
        label[:, rows], rest[:, rows], tail[rows], dense[rows] = one.label, one.rest, one.tail.to(acc), one.dense
        candidates += one.candidates
        found.add(one.entries)
    if too_flat(found.count, tail[task.rows].masked_fill(dense[task.rows], 0.0), dense[task.rows], rule):
        dense[task.rows] = True
        found.forget()
    entry_rows, columns, log_p, *log_q = found.parts
    nothing = hidden.new_empty(0, dtype=acc)
    selected = SelectedPairs(
        rows=entry_rows,
        columns=columns,
        log_p=log_p,
        log_q=log_q[0] if log_q else nothing,
        bounds=found.bounds,
        label=label,
        rest=rest,
        tail=tail,
        dense=dense,
        candidates=candidates,
    )
    if not sums:
        return RowSums(nothing, nothing, nothing, nothing), dict.fromkeys(moments, nothing), selected
    together = RowSums(*(torch.cat(x) for x in zip(*(vars(x).values() for x in sums), strict=True)))
    return together, {name: torch.cat(x) for name, x in moments.items()}, selected


def sparse_gradients(
    task: Task,
    sums: RowSums,
    moments: Numbers,
    selected: SelectedPairs,
    upstream: Tensor,
    wants: Sequence[bool],
) -> HeadGradients:
    """The sparse gradients of Σ upstream·outputs by the student, [O, K] upstream; dense rows' are computed anew."""
    want_hidden, *_ = wants
    made, parts = Gradients(task.student, wants), PairParts(task, sums, moments, selected, upstream)
    if made.weight is not None or made.bias is not None:
        by_column = ByColumn(parts)
        if made.weight is not None:
            for columns in parts.tiles.column_blocks():
                by_column.weight(columns, made.weight[columns])
            made.written()
        if made.bias is not None:
            made.bias += by_column.bias()
    dense = parts.dense.nonzero()[:, 0]
    if len(dense):
        flat = replace(task, kept=parts.place[dense])
        add_gradients(flat, sums.of(dense), {k: x[dense] for k, x in moments.items()}, upstream[:, dense], made)
    if want_hidden:
        parts.by_hidden(made.hidden)
    return made.rounded()


class PairParts(SparseParts):
    """A sparse gradient of joint outputs taken apart; an entry's p stands for its dz, and −1 for c."""

    def __init__(self, task: Task, sums: RowSums, moments: Numbers, selected: SelectedPairs, upstream: Tensor) -> None:
        tiles, student, n = _tiles(task), task.student, task.student.hidden.shape[0]
        acc = tiles.acc
        place = task.rows
        nobody = torch.zeros(len(place), dtype=torch.int64, device=place.device)
        by_logits = (upstream * student.factor).masked_fill(selected.dense[place], 0.0)
        factors = {name: x.to(acc) for name, x in factors_of(task.outputs, by_logits, moments).items()}
        among_all = {name: x.new_zeros(n).index_copy(0, place, x) for name, x in factors.items()}
        lse = sums.lse.new_zeros(n).index_copy(0, place, sums.lse)
        entries = SelectedEntries(
            rows=selected.rows,
            columns=selected.columns,
            p=_entry_gradients(task, selected, among_all, lse),
            chain=None,
            bounds=selected.bounds,
            tail=selected.tail,
            dense=selected.dense,
        )
        labels = nobody if task.labels is None else task.labels[place]
        super().__init__(tiles, labels, entries)
        own = torch.zeros_like(sums.maximum)
        if task.labels is not None:
            z, u = selected.label[:, place]
            log_p, log_q = (z - sums.maximum) - sums.log_total, (u - sums.teacher_maximum) - sums.teacher_log_total
            own = _gradients_of(task, log_p, None if task.teacher is None else log_q, factors)
            if "label" in factors:
                own = own + factors["label"]
            own = _chained(task, own, log_p, sums.lse).masked_fill(self.dense, 0.0)
        if student.head.softcap is None:
            kept = self._sums(entries)[place]
            exact = sum(c for name, c in zip(task.outputs.names, by_logits, strict=True) if name == "lse")
            left = exact - kept - own
        else:
            # A term without a factor multiplies nothing.
            zeros = torch.zeros_like(own)
            by_term = torch.stack([factors.get(term, zeros) for term in terms_of(task.outputs)])
            left = (by_term.double() * selected.rest[:, place].double()).sum(0).masked_fill(self.dense, 0.0)
        even = self.share(left, 0 if task.labels is None else 1)
        self.even = -even.to(acc)
        self.own = own + self.even if task.labels is not None else own
        self.spread(-torch.ones_like(self.even))

    def _sums(self, entries: SelectedEntries) -> Tensor:
        """(N,) float64 Σ of the entries' gradients, tile by tile in their order."""
        total = self.hidden.new_zeros(self.hidden.shape[0], dtype=torch.float64)
        for start, stop in pairwise(entries.bounds.tolist()):
            if start == stop:
                continue
            # Each row comes in one run.
            rows, counts = torch.unique_consecutive(entries.rows[start:stop], return_counts=True)
            total[rows.long()] += torch.segment_reduce(entries.p[start:stop], "sum", lengths=counts, unsafe=True)
        return total


def _tiles(task: Task) -> Tiles:
    return Tiles(task.student.hidden, task.student.head, task.kept)


def _entry_gradients(task: Task, selected: SelectedPairs, factors: Mapping[str, Tensor], lse: Tensor) -> Tensor:
    """(E,) dz of the entries, of factors and LSE(z) of all N rows."""
    if task.student.head.softcap is None and task.teacher is not None:
        found = one_walk.entry_gradients(selected.rows, selected.log_p, selected.log_q, factors)
        if found is not None:
            return found
    out = torch.empty_like(selected.log_p)
    for start, stop in pairwise(selected.bounds.tolist()):
        here = slice(start, stop)
        rows, log_p = selected.rows[here].long(), selected.log_p[here]
        log_q = None if task.teacher is None else selected.log_q[here]
        dz = _gradients_of(task, log_p, log_q, {name: x[rows] for name, x in factors.items()})
        out[here] = _chained(task, dz, log_p, lse[rows])
    return out


def _gradients_of(task: Task, log_p: Tensor, log_q: Tensor | None, factors: Numbers) -> Tensor:
    """dz of entries (E,), J and the label's term apart, of factors (E,) by term."""
    zero = log_p.new_zeros(())
    entries = Entries(log_p, log_q, RowSums(zero, zero, zero, zero), task.outputs.beta, task.outputs.alpha)
    return entries.gradient(factors, torch.empty_like(log_p))


def _chained(task: Task, dz: Tensor, log_p: Tensor, lse: Tensor) -> Tensor:
    chain = task.student.chain(log_p + lse)
    return dz if chain is None else dz * chain
