"""A block of rows through both heads in one walk, for what its numbers need no normalized softmax: the two KLs.

What divides by log-sum-exps has to come back to a block's logits, and keeps them for that. KL(q‖p) and KL(p‖q) do not:
with z and u less their rows' maxima so far, d = u − z and S, T the sums of e^z and e^u,

    KL(q‖p) = Σ e^u·d/T + log S − log T        KL(p‖q) = −Σ e^z·d/S + log T − log S

and an entry is selected as for log-probabilities, by the sums so far (`tiles/selected.py`). A tile is seen once, in the
cache.

Letters: R rows of a block and C vocabulary entries of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.kernels.records import SelectionRule
from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.exact import Tiles, pick_targets
from tvkd_fast.ops.tiles.joint.selected_pairs import Visited
from tvkd_fast.ops.tiles.joint.walk import Task

_OUTPUTS = ("logps", "lse", "teacher_lse", "forward_kl", "reverse_kl")
_TERMS = ("p", "q", "w")


def fits(task: Task, tiles: Tiles) -> bool:
    """Whether a walk is made of these passes: numba's, of plain heads of two models, and outputs that take one walk."""
    if task.teacher is None or task.teacher_lse is not None or len(task.teachers) != 1:
        return False
    heads = (task.student.head, task.teacher.head)
    plain = all(head.bias is None and head.softcap is None for head in heads)
    return plain and all(name in _OUTPUTS for name in task.outputs.names) and passes(tiles.buffers) is not None


class OneWalk:
    """The memory of tiles, for one block of rows after the other."""

    def __init__(self, task: Task, tiles: Tiles, rule: SelectionRule) -> None:
        found = passes(tiles.buffers)
        assert found is not None
        assert task.teacher is not None
        self.task, self.tiles, self.rule, self.passes = task, tiles, rule, found
        self.teacher = task.teacher
        self._columns = torch.empty(tiles.rows * tiles.columns, dtype=torch.int32)

    def visit(self, rows: Tensor, labels: Tensor | None) -> Visited:
        """What `Visited` has of these rows (R,), with their labels (R,)."""
        student, teacher, acc = self.task.student, self.teacher, self.tiles.acc
        r = len(rows)
        h, k = (side.scaled(side.hidden[rows].to(acc)) for side in (student, teacher))
        maximum = h.new_full((r, 2), -torch.inf)
        total = h.new_zeros((r, 4), dtype=torch.float64)
        label = h.new_full((2, r), torch.nan)
        counts = torch.zeros_like(rows)
        own = torch.full_like(rows, -1) if labels is None else labels
        found: list[tuple[Tensor, ...]] = []
        starts: list[int] = []
        for columns in self.tiles.column_blocks():
            z = self.tiles.tile((r, columns.stop - columns.start))
            u = self.tiles.spare(z)
            torch.mm(h, student.rows(columns).T, out=z)
            torch.mm(k, teacher.rows(columns).T, out=u)
            if labels is not None:
                pick_targets(z, labels, columns, out=label[0])
                pick_targets(u, labels, columns, out=label[1])
            room = self._columns[: z.numel()].view(z.shape)
            arguments = (z, u, own - columns.start, maximum, total, counts, room, self.rule.eps, self.rule.row_cap)
            found.append(self.passes.select(*arguments))
            starts.append(columns.start)
        s, t, by_s, by_t = total.unbind(1)
        sums = RowSums(maximum[:, 0].clone(), s.log().to(acc), maximum[:, 1].clone(), t.log().to(acc))
        between = s.log() - t.log()
        both = {"forward": by_t / t + between, "reverse": -by_s / s - between}
        moments = {name: both[name].clamp_min(0.0) for name in self.task.outputs.moments}
        dense = counts > self.rule.row_cap
        tail = torch.ones_like(label, dtype=torch.float64)
        if labels is not None:
            tail -= (label - torch.stack([sums.lse, sums.teacher_lse])).exp()
        numbers = torch.stack(list(vars(sums).values()))
        edge = math.log(self.rule.eps) if self.rule.eps else -math.inf
        candidates = sum(len(columns) for _, columns, *_ in found)
        entries = []
        # Popped, so that what is pruned frees memory for what is kept.
        for start in starts:
            entries.append(self.passes.prune(found.pop(0), numbers, dense, edge, rows, start, tail))
        return Visited(sums, moments, label, h.new_empty(0, r), dense, tail.amax(0), entries, candidates)


class Passes:
    """The compiled passes, on tensors."""

    def __init__(self, found: native.Passes, kernels: Any) -> None:
        self._call, self._kernels = found.call, kernels

    def select(self, *arguments: Any) -> tuple[Tensor, ...]:
        """How many entries of each row of a tile are above ε times either row's sum so far, the label apart; their
        columns, z and u. Both tiles [R, C] are overwritten.
        """
        return self._tensors("select", *arguments)

    def prune(
        self,
        selected: tuple[Tensor, ...],
        sums: Tensor,
        dense: Tensor,
        edge: float,
        place: Tensor,
        first: int,
        tail: Tensor,
    ) -> tuple[Tensor, ...]:
        """Rows, columns, log p and log q of the entries from `select` of which one is at least `edge`, in rows that are
        not dense; `tail` (2, R) loses what is kept. `place` (R,) is each row's place among all.
        """
        return self._tensors("prune", *selected, sums, dense, _f32(edge), place, first, tail)

    def differentiate(self, rows: Tensor, log_p: Tensor, log_q: Tensor, factors: Tensor) -> Tensor:
        """dz of each entry, (E,), of factors (3, N) of p, q and p·w."""
        out = torch.empty_like(log_p)
        self._call(self._kernels.differentiate, rows, log_p, log_q, factors, out)
        return out

    def _tensors(self, kernel: str, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(x) for x in self._call(getattr(self._kernels, kernel), *arguments))


def entry_gradients(rows: Tensor, log_p: Tensor, log_q: Tensor, factors: Numbers) -> Tensor | None:
    """dz of each entry (E,) in a compiled pass, of factors (N,) by term; None where it does not know a term."""
    found = passes(log_p)
    if found is None or not factors or any(term not in (*_TERMS, "label") for term in factors):
        return None
    some = next(iter(factors.values()))
    zeros = torch.zeros_like(some)
    return found.differentiate(rows, log_p, log_q, torch.stack([factors.get(term, zeros) for term in _TERMS]))


def _f32(x: float) -> Any:
    import numpy as np

    return np.float32(x)


def passes(z: Tensor) -> Passes | None:
    """The compiled passes for tiles like z, or None where only torch's are available."""
    found = native.passes(z)
    kernels = None if found is None else native.compiled_module(_load, "sparse joint walk")
    return None if found is None or kernels is None else Passes(found, kernels)


def _load() -> Any:
    # Imported when asked for: it needs numba.
    from tvkd_fast.ops.tiles.joint import numba_selection

    return numba_selection
