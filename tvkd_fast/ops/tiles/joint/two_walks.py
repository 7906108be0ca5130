"""A block of rows through both heads, and once more over its logits in a workspace: entries of any outputs and heads.

The block's log-sum-exps are known before an entry is looked at, so that no other than the kept ones is selected.

Letters: R rows of a block and C vocabulary entries of a tile, T terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tvkd_fast.kernels.records import SelectionRule
from tvkd_fast.ops.joint.outputs import terms_of
from tvkd_fast.ops.joint.row_numbers import RowSums
from tvkd_fast.ops.tiles.exact import Tiles, locate, pick_targets
from tvkd_fast.ops.tiles.joint.entries import Entries
from tvkd_fast.ops.tiles.joint.passes import Pair
from tvkd_fast.ops.tiles.joint.selected_pairs import Visited
from tvkd_fast.ops.tiles.joint.walk import WORKSPACE_MB, Block, Room, Task, workspace_rows


class TwoWalks:
    """The workspace, for one block of rows after the other."""

    def __init__(self, task: Task, tiles: Tiles, rule: SelectionRule) -> None:
        self.task, self.tiles, self.rule = task, tiles, rule
        self.room = Room(task, workspace_rows(task, WORKSPACE_MB), whole=True)
        self.edge = math.log(rule.eps) if rule.eps else -math.inf
        softcap = task.student.head.softcap
        self.terms = () if softcap is None else terms_of(task.outputs)

    def visit(self, rows: Tensor, labels: Tensor | None) -> Visited:
        """What `Visited` has of these rows (R,), with their labels (R,), in blocks of as many as the workspace has."""
        most = self.room.most
        parts = [
            self._block(some, None if labels is None else labels[i * most : i * most + len(some)])
            for i, some in enumerate(rows.split(most))
        ]
        sums = RowSums(*(torch.cat(x) for x in zip(*(vars(part.sums).values() for part in parts), strict=True)))
        return Visited(
            sums,
            {name: torch.cat([part.moments[name] for part in parts]) for name in parts[0].moments},
            torch.cat([part.label for part in parts], 1),
            torch.cat([part.rest for part in parts], 1),
            torch.cat([part.dense for part in parts]),
            torch.cat([part.tail for part in parts]),
            [
                tuple(torch.cat(x) for x in zip(*tiles, strict=True))
                for tiles in zip(*(part.entries for part in parts), strict=True)
            ],
            sum(part.candidates for part in parts),
        )

    def _block(self, rows: Tensor, labels: Tensor | None) -> Visited:
        task, outputs, acc = self.task, self.task.outputs, self.tiles.acc
        block, real = Block(task, rows, self.room), slice(0, len(rows))
        sums, _ = block.sums()
        moments = block.moments(Pair(sums, outputs.beta, outputs.alpha))
        label = sums.maximum.new_full((2, len(rows)), torch.nan)
        rest = label.new_zeros((len(self.terms), len(rows)), dtype=torch.float64)
        tail = torch.zeros_like(label, dtype=torch.float64)
        counts = torch.zeros_like(rows)
        entries: list[tuple[Tensor, ...]] = []
        sums_of_real = sums.of(real)
        for columns in self.tiles.column_blocks():
            z, u = (None if x is None else x[:, real] for x in block.tile(columns))
            assert z is not None
            found = Entries(z, u, sums_of_real, outputs.beta, outputs.alpha)
            logs = [found.log_p] if u is None else [found.log_p, found.log_q]
            keep = logs[0] >= self.edge
            if u is not None:
                keep |= logs[1] >= self.edge
            # What a bias takes out of the student has no gradient.
            keep &= z != -torch.inf
            left = keep
            if labels is not None:
                here, place = locate(labels, columns)
                for one, x in zip(label, (z, u), strict=True):
                    if x is not None:
                        pick_targets(x.T, labels, columns, out=one)
                own = torch.zeros_like(keep).T.scatter_(1, place, here).T
                keep, left = keep & ~own, keep | own
            for one, x in zip(tail, logs, strict=False):
                one += x.exp().masked_fill(left, 0.0).sum(0, dtype=torch.float64)
            chain = task.student.chain(z)
            for one, term in zip(rest, self.terms, strict=True):
                assert chain is not None
                one += (found.term(term) * chain).masked_fill(left, 0.0).sum(0, dtype=torch.float64)
            keep &= counts <= self.rule.row_cap
            counts += keep.sum(0)
            row, column = keep.T.nonzero().unbind(1)
            entries.append((rows[row].int(), (column + columns.start).int(), *(x[column, row] for x in logs)))
        dense = counts > self.rule.row_cap
        candidates = int(counts.sum())
        if dense.any():
            flat = torch.zeros(self.task.student.hidden.shape[0], dtype=torch.bool, device=rows.device)
            flat[rows] = dense
            entries = [tuple(x[~flat[tile[0].long()]] for x in tile) for tile in entries]
        moments = {name: x[real].to(acc) for name, x in moments.items()}
        return Visited(sums_of_real, moments, label, rest.to(acc), dense, tail.amax(0), entries, candidates)
