"""Two vocabularies in one walk: a block of rows goes through student's and teacher's head, entry by entry of both.

The first pass makes both models' logits, tile by tile, and their log-sum-exps while a tile is in the cache; what
divides by those takes a second pass over the block, which therefore stays in a workspace [V, R] for each model.
Gradients are made in the same pass or in one more, a tile at a time, each of which goes into its products at once.

Letters: N tokens, K of them kept, R rows of a block, C entries of a tile, D hidden, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.kernels.records import HeadGradients
from tvkd_fast.ops.joint.outputs import Outputs, early_factors, factors_of, late_factor, mirrored_moments
from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums
from tvkd_fast.ops.tiles.block_walk import LINE, by_tile
from tvkd_fast.ops.tiles.exact import blocks
from tvkd_fast.ops.tiles.huge_pages import large_empty
from tvkd_fast.ops.tiles.joint.gradient_products import Gradients
from tvkd_fast.ops.tiles.joint.passes import Pair, add_exponentials
from tvkd_fast.ops.tiles.joint.sides import Side

WORKSPACE_MB = 96
"""MiB of a block's logits; 128 with the states, a tile's temporaries and the library's own buffers."""
STATES = 8
"""The workspace holds so many times a block's states, too: they are few but where a vocabulary is small."""
TILE_FLOATS = 2**19
"""Entries of a tile: those of both models stay in the cache between their product and their pass."""
BACKWARD_ROWS = 1024
"""Rows that a walk takes which keeps no logits."""


@dataclass(frozen=True)
class Task:
    """What is asked of which rows: `labels` (N,), `teacher_lse` (N,) if it is known, `kept` (K,) rows or all.

    `left_in` (N,) bool, None where no row is left out, says which rows count, also where all are walked through.
    """

    student: Side
    teachers: tuple[tuple[float, Side], ...]
    """The models whose logits, by these factors, add up to the second tile: none, a teacher, or several for a score."""
    outputs: Outputs
    labels: Tensor | None = None
    teacher_lse: Tensor | None = None
    kept: Tensor | None = None
    left_in: Tensor | None = None
    unrounded: bool = False
    """Whether the student's gradient by hidden under a known upstream stays in the accumulator's dtype."""

    @property
    def teacher(self) -> Side | None:
        return self.teachers[0][1] if self.teachers else None

    @property
    def is_weighted(self) -> bool:
        """Whether the second tile is a weighted sum of log-probabilities, or a limited one, and no teacher's logits."""
        return len(self.teachers) > 1 or self.outputs.clip is not None

    @property
    def rows(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        return torch.arange(self.student.hidden.shape[0], device=self.student.hidden.device)


class Block:
    """Rows of a task and their tiles: logits in a workspace, or in one tile's room that the next one takes over.

    Rows are filled up to whole cache lines by the first one, whose numbers and gradients are cut off again.
    """

    def __init__(self, task: Task, rows: Tensor, room: Room) -> None:
        self.task, self.rows, self.room = task, rows, room
        self.width = room.width(len(rows))
        self.filled = filled = self.filled_up(rows)
        self.student = task.student.hidden[filled].to(task.student.acc)
        self.scaled = task.student.scaled(self.student)
        self.teachers = [side.hidden[filled].to(task.student.acc) for _, side in task.teachers]
        self.teachers_scaled = [side.scaled(h) for h, (_, side) in zip(self.teachers, task.teachers, strict=True)]

    def filled_up(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows[:1].expand(self.width - len(rows))])

    def padded(self, x: Tensor) -> Tensor:
        """(…, R) numbers of the rows, 0 where rows are filled up."""
        return torch.nn.functional.pad(x, (0, self.width - x.shape[-1]))

    def tiles(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """The entries of each tile, and which of the rows have their labels there, and where."""
        size = self.room.columns(self.width)
        entries = self.task.student.entries
        labels = self.task.labels
        if labels is None:
            nothing = self.rows[:0]
            yield from ((columns, (nothing, nothing)) for columns in blocks(entries, size))
        else:
            own = by_tile(labels[self.rows], size, entries)
            yield from zip(blocks(entries, size), own, strict=True)

    def logits(
        self, columns: slice, looked_at: Callable[[int, Tensor], None] = lambda model, tile: None
    ) -> tuple[Tensor, Tensor | None]:
        """z and u [C, R] of these entries, computed where they belong; each model's by itself is `looked_at` before."""
        z, u = self.tile(columns)
        task = self.task
        task.student.logits(task.student.rows(columns), self.scaled, columns, z)
        looked_at(0, z)
        for i, (factor, side) in enumerate(task.teachers):
            assert u is not None
            tile = self.room.spare(u) if i else u
            side.logits(side.rows(columns), self.teachers_scaled[i], columns, tile)
            looked_at(i + 1, tile)
            if factor != 1.0:
                tile.mul_(factor)
            if i:
                u.add_(tile)
        return z, u

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """The room of z and u of these entries."""
        found = [self.room.tile(i, columns, self.width) for i in range(self.room.tiles)]
        return found[0], found[1] if len(found) == 2 else None

    def sums(self) -> tuple[RowSums, Tensor | None]:
        """The first pass: log-sum-exps, and the labels' logits (R,)."""
        task, acc = self.task, self.task.student.acc
        models = 1 + len(task.teachers)
        maximum = self.student.new_full((models, self.width), -torch.inf)
        total = self.student.new_zeros((models, self.width), dtype=torch.float64)
        target = None if task.labels is None else self.student.new_full((self.width,), torch.nan)
        known = task.teacher_lse

        def look(model: int, tile: Tensor) -> None:
            if model == 0 or known is None:
                add_exponentials(tile, maximum[model], total[model])

        for columns, (row, place) in self.tiles():
            z, _ = self.logits(columns, look)
            if target is not None and len(row):
                target[row] = z[place, row]
        sides = (task.student, *(side for _, side in task.teachers))
        for side, states, sums in zip(sides, (self.student, *self.teachers), total, strict=True):
            if side.head.softcap is not None:
                # tanh makes an infinite logit finite: 0·inf = NaN lets a broken state show all the same.
                sums += states.sum(1) * 0.0
        log_total = total.log()
        if known is not None:
            maximum[1], log_total[1] = known[self.filled].to(acc), 0.0
        # Of a weighted sum of logits the same sum of log-sum-exps, in two parts that lose nothing.
        factors = total.new_tensor([factor for factor, _ in task.teachers])[:, None]
        of_maximum, rest = (factors * maximum[1:]).sum(0), (factors * log_total[1:]).sum(0)
        rounded = of_maximum.to(acc)
        rest += torch.where(rounded.isfinite(), of_maximum - rounded, 0.0)
        return RowSums(maximum[0], log_total[0].to(acc), rounded, rest.to(acc)), target

    def moments(self, pair: Pair) -> dict[str, Tensor]:
        """The second pass over the workspace: moments (R,) float64."""
        names = self.task.outputs.moments
        found = self.student.new_zeros((len(names), self.width), dtype=torch.float64)
        if names:
            for columns, _ in self.tiles():
                for one, part in zip(found, pair.moments(*self.tile(columns), names), strict=True):
                    one += part
        return dict(zip(names, found, strict=True))


class Room:
    """The memory of tiles: rows' whole logits of student and teacher, or one tile of each; a tile to spare."""

    def __init__(self, task: Task, most: int, *, whole: bool, spare: bool = False) -> None:
        self.most = most if most < LINE else most - most % LINE
        self.whole, self.entries = whole, task.student.entries
        held = min(self.most, self.width(len(task.rows)))
        # A narrower block has more columns to its tile.
        of_a_tile = max(held, min(self.entries * held, TILE_FLOATS))
        self.tiles = 2 if task.teachers else 1
        hidden, acc = task.student.hidden, task.student.acc
        size = self.entries * held if whole else of_a_tile
        self._memory = [large_empty(hidden, (size,), acc) for _ in range(self.tiles)]
        self._spare = large_empty(hidden, (of_a_tile if spare or len(task.teachers) > 1 else 0,), acc)

    def width(self, rows: int) -> int:
        return rows if self.most < LINE else -(-rows // LINE) * LINE

    def columns(self, width: int) -> int:
        return max(1, min(self.entries, TILE_FLOATS // max(1, width)))

    def tile(self, which: int, columns: slice, width: int) -> Tensor:
        start = columns.start if self.whole else 0
        rows = columns.stop - columns.start
        return self._memory[which][start * width : (start + rows) * width].view(rows, width)

    def spare(self, like: Tensor) -> Tensor:
        return self._spare[: like.numel()].view(like.shape)


def workspace_rows(task: Task, megabytes: int) -> int:
    """The rows whose logits of all models fit; one where not one does."""
    models = 1 if task.teacher is None else 2
    itemsize = task.student.acc.itemsize
    wide = sum(side.hidden.shape[1] for side in (task.student, *(side for _, side in task.teachers)))
    return max(1, megabytes * 2**20 // (max(models * task.student.entries, STATES * wide) * itemsize))


def joint_sums(task: Task) -> tuple[RowSums, dict[str, Tensor]]:
    """LSEs (K,) and moments (K,), "target" among them where there are labels."""
    whole = bool(task.outputs.moments)
    most = workspace_rows(task, WORKSPACE_MB) if whole else BACKWARD_ROWS
    room = Room(task, most, whole=whole)
    numbers = _Collected(task)
    for rows in task.rows.split(room.most):
        block = Block(task, rows, room)
        sums, target = block.sums()
        pair = Pair(sums, task.outputs.beta, task.outputs.alpha, task.outputs.clip)
        numbers.add(block, sums, target, block.moments(pair))
    return numbers.finished()


def joint_gradients(
    task: Task,
    sums: RowSums,
    moments: Numbers,
    upstream: Tensor,
    wants: Sequence[bool],
    teacher_wants: Sequence[bool],
) -> tuple[HeadGradients, HeadGradients]:
    """The gradients of Σ upstream·outputs by student and teacher, [O, K] upstream, the logits computed again."""
    made = Gradients(task.student, wants)
    made_by_teacher = None if task.teacher is None or not any(teacher_wants) else Gradients(task.teacher, teacher_wants)
    add_gradients(task, sums, moments, upstream, made, made_by_teacher)
    nothing = HeadGradients(None, None, None)
    return made.rounded(), nothing if made_by_teacher is None else made_by_teacher.rounded()


def add_gradients(
    task: Task,
    sums: RowSums,
    moments: Numbers,
    upstream: Tensor,
    made: Gradients,
    made_by_teacher: Gradients | None = None,
) -> None:
    """The same, added to what others than the task's rows have made of both."""
    room = Room(task, BACKWARD_ROWS, whole=False, spare=made_by_teacher is not None)
    start = 0
    for rows in task.rows.split(room.most):
        block = Block(task, rows, room)
        here = block.filled_up(torch.arange(start, start + len(rows), device=rows.device))
        c = block.padded(upstream[:, start : start + len(rows)])
        padded = _Numbers(sums.of(here), {name: x[here] for name, x in moments.items()}, c)
        start += len(rows)
        _add_products(block, padded, made, made_by_teacher, recompute=True)


@dataclass(frozen=True)
class _Numbers:
    """A block's sums, moments and upstream gradient, (…, R)."""

    sums: RowSums
    moments: Numbers
    upstream: Tensor


def _add_products(
    block: Block, numbers: _Numbers, made: Gradients, by_teacher: Gradients | None, *, recompute: bool
) -> None:
    """The block's part of all gradients, from the logits in the workspace or from those that are computed again."""
    task, outputs = block.task, block.task.outputs
    pair = Pair(numbers.sums, outputs.beta, outputs.alpha, outputs.clip)
    acc = task.student.acc
    by_student = numbers.upstream * task.student.factor
    factors = {term: x.to(acc) for term, x in factors_of(outputs, by_student, numbers.moments).items()}
    mirrored = pair.mirrored()
    teachers: dict[str, Tensor] = {}
    if by_teacher is not None and task.teacher is not None:
        others, which = outputs.mirrored()
        c = numbers.upstream[which] * task.teacher.factor
        teachers = {term: x.to(acc) for term, x in factors_of(others, c, mirrored_moments(numbers.moments)).items()}
        by_teacher.begin(block.rows, block.teachers[0])
    made.begin(block.rows, block.student)
    for columns, own in block.tiles():
        z, u = block.logits(columns) if recompute else block.tile(columns)
        chain = task.student.chain(z)
        if by_teacher is not None and task.teacher is not None:
            assert u is not None
            out = block.room.spare(z)
            teacher_chain = task.teacher.chain(u)
            mirrored.gradient(u, z, teachers, out)
            if teacher_chain is not None:
                out.mul_(teacher_chain)
            by_teacher.add(columns, out)
        pair.gradient(z, u, factors, z)
        add_label(z, own, factors)
        if chain is not None:
            z.mul_(chain)
        made.add(columns, z)
    made.end()
    if by_teacher is not None:
        by_teacher.end()


def joint_known(
    task: Task, upstream: Tensor, wants: Sequence[bool], teacher_wants: Sequence[bool], workspace_mb: int = 0
) -> tuple[RowSums, dict[str, Tensor], HeadGradients, HeadGradients]:
    """`joint_sums`, and in the same visit of every block the gradients under a known upstream, [O, K]."""
    made = Gradients(task.student, wants, unrounded=task.unrounded)
    by_teacher = None if task.teacher is None or not any(teacher_wants) else Gradients(task.teacher, teacher_wants)
    most = workspace_rows(task, workspace_mb or WORKSPACE_MB)
    room = Room(task, most, whole=True, spare=by_teacher is not None)
    numbers = _Collected(task)
    start = 0
    for rows in task.rows.split(room.most):
        block = Block(task, rows, room)
        sums, target = block.sums()
        c = block.padded(upstream[:, start : start + len(rows)])
        start += len(rows)
        pair = Pair(sums, task.outputs.beta, task.outputs.alpha, task.outputs.clip)
        if by_teacher is not None or task.outputs.is_finished_late or task.teacher is None:
            moments = block.moments(pair)
            _add_products(block, _Numbers(sums, moments, c), made, by_teacher, recompute=False)
        else:
            moments = _visit(block, pair, c, made)
        numbers.add(block, sums, target, moments)
    nothing = HeadGradients(None, None, None)
    return *numbers.finished(), made.rounded(), nothing if by_teacher is None else by_teacher.rounded()


def _visit(block: Block, pair: Pair, upstream: Tensor, made: Gradients) -> dict[str, Tensor]:
    """Moments and products of a block, p's share that waits for the moments being added as a tile goes to its products.

    Where nothing waits, a tile goes there at once.
    """
    task, outputs = block.task, block.task.outputs
    names, acc = outputs.moments, task.student.acc
    c = upstream * task.student.factor
    factors = {term: x.to(acc) for term, x in early_factors(outputs, c, {}).items()}
    zeros = {name: torch.zeros_like(c[0]) for name in names}
    waits = late_factor(outputs, c, zeros | {"sign": c[0]}) is not None
    found = block.student.new_zeros((len(names), block.width), dtype=torch.float64)
    made.begin(block.rows, block.student)
    for columns, own in block.tiles():
        z, u = block.tile(columns)
        chain = task.student.chain(z)
        for one, part in zip(found, pair.visit(z, u, names, factors, late=waits), strict=True):
            one += part
        add_label(z, own, factors)
        if chain is not None:
            z.mul_(chain)
            if waits and u is not None:
                u.mul_(chain)
        if not waits:
            made.add(columns, z)
    moments = dict(zip(names, found, strict=True))
    late = late_factor(outputs, c, moments)
    if late is not None:
        late = late.to(acc)
        for columns, _ in block.tiles():
            z, u = block.tile(columns)
            assert u is not None
            made.add(columns, z.addcmul_(u, late))
    made.end()
    return moments


def add_label(z: Tensor, own: tuple[Tensor, Tensor], factors: Numbers) -> None:
    """The label's term of the rows whose labels lie in a tile."""
    row, place = own
    if "label" in factors and len(row):
        z[place, row] += factors["label"][row]


class _Collected:
    """The rows' numbers, block after block, in their order."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._sums: list[RowSums] = []
        self._moments: list[dict[str, Tensor]] = []

    def add(self, block: Block, sums: RowSums, target: Tensor | None, moments: dict[str, Tensor]) -> None:
        real = slice(0, len(block.rows))
        if target is not None:
            moments = moments | {"target": target}
        self._sums.append(sums.of(real))
        self._moments.append({name: x[real] for name, x in moments.items()})

    def finished(self) -> tuple[RowSums, dict[str, Tensor]]:
        if not self._sums:
            nothing = self._task.student.hidden.new_empty(0, dtype=self._task.student.acc)
            names = [*self._task.outputs.moments, *([] if self._task.labels is None else ["target"])]
            return RowSums(nothing, nothing, nothing, nothing), dict.fromkeys(names, nothing)
        sums = RowSums(*(torch.cat(parts) for parts in zip(*(vars(x).values() for x in self._sums), strict=True)))
        return sums, {name: torch.cat([x[name] for x in self._moments]) for name in self._moments[0]}
