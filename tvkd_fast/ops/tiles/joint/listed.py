"""A few listed entries of each row by themselves, and of all the others their log-sum-exp and their sum.

Letters: N tokens, K of them kept, R rows of a block, k listed entries of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients
from tvkd_fast.ops.joint.outputs import Outputs
from tvkd_fast.ops.joint.row_numbers import RowSums
from tvkd_fast.ops.tiles.block_walk import by_tile
from tvkd_fast.ops.tiles.exact import blocks
from tvkd_fast.ops.tiles.joint import walk
from tvkd_fast.ops.tiles.joint.gradient_products import Gradients
from tvkd_fast.ops.tiles.joint.passes import Pair, add_exponentials
from tvkd_fast.ops.tiles.joint.sides import Side

_OUTPUTS = Outputs(("lse",))


@dataclass(frozen=True)
class Listed:
    """Numbers of K rows: what is listed, and the rest in three parts."""

    logits: Tensor
    """[K, k] z at the listed entries, −inf where an id is −1."""
    maximum: Tensor
    log_total: Tensor
    """(K,) LSE of all other logits, in two parts."""
    total: Tensor
    """(K,) Σ z over all other entries."""


def listed_logits(student: Side, ids: Tensor, kept: Tensor | None) -> Listed:
    """ids [K, k] of the kept rows, each once in its row, −1 for none."""
    task = walk.Task(student, (), _OUTPUTS, kept=kept)
    room = walk.Room(task, walk.BACKWARD_ROWS, whole=False)
    acc = student.acc
    found = [student.hidden.new_empty(shape, dtype=acc) for shape in (ids.shape, *[ids.shape[:1]] * 3)]
    start = 0
    for rows in task.rows.split(room.most):
        block, here = walk.Block(task, rows, room), slice(start, start + len(rows))
        start += len(rows)
        own = block.student.new_full((len(rows) * ids.shape[1],), -torch.inf)
        maximum = block.student.new_full((block.width,), -torch.inf)
        total, rest = (block.student.new_zeros(block.width, dtype=torch.float64) for _ in range(2))
        for columns, entry, row, place in _tiles(block, ids[here]):
            z, _ = block.logits(columns)
            own[entry] = z[place, row]
            z[place, row] = 0.0
            rest += z.sum(0, dtype=torch.float64)
            z[place, row] = -torch.inf
            add_exponentials(z, maximum, total)
        if student.head.softcap is not None:
            # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
            total += block.student.sum(1) * 0.0
        parts = (own.view(len(rows), ids.shape[1]), maximum, total.log(), rest)
        for one, part in zip(found, parts, strict=True):
            one[here] = part[: len(rows)].to(acc)
    return Listed(*found)


def listed_gradients(
    student: Side,
    ids: Tensor,
    kept: Tensor | None,
    sums: RowSums,
    by_logits: Tensor,
    by_lse: Tensor,
    by_total: Tensor,
    wants: Sequence[bool],
) -> HeadGradients:
    """The gradients under those of `Listed`'s logits [K, k], LSE and total (K,); sums are the LSE's two parts."""
    task = walk.Task(student, (), _OUTPUTS, kept=kept)
    room = walk.Room(task, walk.BACKWARD_ROWS, whole=False)
    made, acc, factor = Gradients(student, wants), student.acc, student.factor
    spreads = bool(by_total.any())
    start = 0
    for rows in task.rows.split(room.most):
        block, here = walk.Block(task, rows, room), slice(start, start + len(rows))
        filled = block.filled_up(torch.arange(start, start + len(rows), device=rows.device))
        start += len(rows)
        own = (by_logits[here].flatten() * factor).to(acc)
        p, even = (block.padded(x[here] * factor).to(acc) for x in (by_lse, by_total))
        pair = Pair(sums.of(filled), 0.5, 0.5)
        made.begin(block.rows, block.student)
        for columns, entry, row, place in _tiles(block, ids[here]):
            z, _ = block.logits(columns)
            chain = student.chain(z)
            pair.gradient(z, None, {"p": p}, z)
            if spreads:
                z.add_(even)
            z[place, row] = own[entry]
            if chain is not None:
                z.mul_(chain)
            made.add(columns, z)
        made.end()
    return made.rounded()


def _tiles(block: walk.Block, ids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The entries of each tile; of the listed ones there their numbers among ids [R, k], their rows and places."""
    size, entries = block.room.columns(block.width), block.task.student.entries
    for columns, (entry, place) in zip(blocks(entries, size), by_tile(ids.flatten(), size, entries), strict=True):
        yield columns, entry, entry // max(1, ids.shape[1]), place
