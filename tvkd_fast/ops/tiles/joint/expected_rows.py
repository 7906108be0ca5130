"""Means of a head's rows under a softmax: Σ_j p_j·w_j under its own, and Σ_j q_j·w_j under a teacher's.

Letters: N tokens, K of them kept, R rows of a block, D hidden of the head whose rows they are, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.joint.outputs import Outputs
from tvkd_fast.ops.tiles.block_walk import BlockWalk
from tvkd_fast.ops.tiles.joint.passes import Pair
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import WORKSPACE_MB, Block, Room, Task, workspace_rows


@dataclass(frozen=True)
class OwnMeans:
    """Of R rows LSE(z) in two parts, (R,) float64 each, and Σ_j p_j·w_j, [R, D], where it is asked for."""

    maximum: Tensor
    log_total: Tensor
    rows: Tensor | None


def own_means(hidden: Tensor, head: Head, kept: Tensor, *, with_rows: bool) -> Iterator[tuple[Tensor, OwnMeans]]:
    """Which of the kept rows, and their means, a block at a time: one product, two with rows; no softcap."""
    assert head.softcap is None
    nobodys = torch.full_like(hidden[:, 0], -1, dtype=torch.int64)
    walk = BlockWalk(hidden, head, nobodys, 0, (False, False, False))
    for rows in kept.split(walk.most):
        if not len(rows):
            break
        part = walk.sums(rows)
        yield rows, OwnMeans(part.shift, part.total.log(), walk.mean_rows(part) if with_rows else None)


@dataclass(frozen=True)
class TeacherMeans:
    """Of K rows Σ_j q_j·w_j [K, D] and Σ_j q_j·b_j (K,) of another head, and the teacher's entropy (K,)."""

    rows: Tensor
    bias: Tensor
    entropy: Tensor


def teacher_means(teacher: Side, head: Head, kept: Tensor) -> TeacherMeans:
    """A product of the teacher's and one of the head's, a block of kept rows at a time."""
    task = Task(teacher, (), Outputs(("entropy",)), kept=kept)
    room = Room(task, workspace_rows(task, WORKSPACE_MB), whole=True)
    acc, count = teacher.acc, len(kept)
    means, numbers = (teacher.hidden.new_zeros(x, dtype=acc) for x in ((count, head.weight.shape[1]), (2, count)))
    found = TeacherMeans(rows=means, bias=numbers[0], entropy=numbers[1])
    start = 0
    for rows in kept.split(room.most):
        if not len(rows):
            break
        here = slice(start, start := start + len(rows))
        block = Block(task, rows, room)
        sums, _ = block.sums()
        pair = Pair(sums, 0.5, 0.5)
        # An entry of NaN counts as one of probability 0: 0·NaN lets it show.
        entropy = block.moments(pair)["entropy"] + 0.0 * sums.lse
        found.entropy[here] = entropy[: len(rows)].to(acc)
        ones = {"p": torch.ones_like(sums.maximum)}
        for columns, _ in block.tiles():
            q, _ = block.tile(columns)
            pair.gradient(q, None, ones, q)
            q = q[:, : len(rows)]
            found.rows[here].addmm_(q.T, head.weight[columns].to(acc))
            if head.bias is not None:
                _add_bias(found.bias[here], q.T, head.bias[columns].to(acc))
    return found


def _add_bias(total: Tensor, q: Tensor, bias: Tensor) -> None:
    """total (R,) += q·b of a tile q [R, C]; where b is −inf a q of 0 adds nothing, and any other −inf."""
    gone = bias == -torch.inf
    total.addmv_(q, bias.masked_fill(gone, 0.0))
    total.masked_fill_(q @ gone.to(q.dtype) > 0.0, -torch.inf)
