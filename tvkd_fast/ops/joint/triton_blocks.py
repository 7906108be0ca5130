"""The joint walk over blocks of rows whose products stay in a workspace, for known upstream gradients and for scores.

Products are the vendor's library's, each model's in its own dtype; what lies between them is three passes in Triton.
Known upstream gradients take 3 + ratio products, where numbers first and gradients after take 4 + 2·ratio. Several
models' logits, of a score, add up in one block, which the passes take for a teacher's.

Letters: N tokens, R rows of a block, D hidden of each model, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tvkd_fast.kernels.block_divergences import Mixture, block_gradient, block_moments, new_numbers, records_of
from tvkd_fast.kernels.blocks import WORKSPACE_BYTES, in_workspace, slices
from tvkd_fast.kernels.joint_backward import factors_of, largest_of
from tvkd_fast.kernels.joint_dlogits import Flags
from tvkd_fast.kernels.products import accumulate
from tvkd_fast.kernels.records import Head, HeadGradients
from tvkd_fast.ops.inputs import packed, packed_rows
from tvkd_fast.ops.joint.outputs import SCORE
from tvkd_fast.ops.joint.row_numbers import RowSums
from tvkd_fast.ops.joint.triton_joint import IGNORED, SecondWalk, labels_of, numbers_of, weights_of
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import Task
from tvkd_fast.ops.triton_walk import Gradients

FLOAT16_SCALE = 2.0**-14
"""What float16's gradients by logits are divided by, over a bound of the largest of their block."""


def block_walk(
    task: Task, upstream: Tensor | None = None, wants: Sequence[bool] = (False, False, False)
) -> tuple[RowSums, dict[str, Tensor], HeadGradients]:
    """The numbers (N,), and with an upstream gradient [O, N] the student's gradients of Σ upstream·outputs."""
    walk = _Walk(task, wants)
    given = walk.weights(upstream)
    for rows in slices(len(walk.hidden), walk.most):
        walk.multiply(rows)
        walk.sum_up(rows)
        if upstream is not None:
            walk.add_products(rows, {name: x[rows] for name, x in given.items()})
    return *walk.numbers(), walk.gradients.rounded()


class _Walk:
    """Numbers and gradients so far, and the workspace: products [R, V] of the student and of what it is compared to."""

    def __init__(self, task: Task, wants: Sequence[bool]) -> None:
        self.labels, self._sides = labels_of(task), task.teachers
        self.is_weighted, self.task = task.is_weighted, task
        if task.is_weighted:
            # The second block is what the score is of: the passes take it for one teacher's logits.
            (_, first), *_ = task.teachers
            self.task = replace(task, teachers=((1.0, first),))
        self.hidden, self.head = packed_rows(task.student.hidden), _head(task.student)
        second, names = SecondWalk.of(task.outputs), set(task.outputs.moments)
        self.mixture = Mixture(second.beta, second.alpha)
        logs = not names.isdisjoint(("entropy", "p2", SCORE))
        self.flags = Flags(logs, second.beta is not None, second.variation, second.alpha is not None)
        self.gradients = Gradients(self.hidden, self.head, wants)
        self._found = new_numbers(self.hidden, len(self.hidden))
        vocab = self.head.vocab_size
        # A score's third block is a model's logits, beside whose log-sum-exps torch holds the exponentials.
        held, beside = (3, 1) if task.is_weighted else (2, 0)

        def workspace(budget: int) -> Tensor:
            rows = max(1, min(len(self.hidden), budget // (4 * (held + beside) * vocab)))
            return self.hidden.new_empty((held, rows, vocab), dtype=torch.float32)

        self._products = in_workspace(self.hidden, workspace)
        self.most = self._products.shape[1]

    def weights(self, upstream: Tensor | None) -> dict[str, Tensor]:
        """dL/doutput [O, N] by the kernels' names."""
        if upstream is None:
            return {}
        return weights_of(self.task, upstream).of_rows(self.labels, IGNORED, self.head.vocab_size)

    def multiply(self, rows: slice) -> None:
        """The block's products; for a score the student's, and the models' weighted log-probabilities."""
        blocks = self._products[:, : rows.stop - rows.start]
        self._z, self._u = blocks[:2]
        accumulate(self._z, self.hidden[rows], self.head.weight.T, fresh=True)
        if not self.is_weighted:
            ((_, side),) = self._sides
            _multiply(self._u, side, rows)
            self._other = _head(side)
            return
        self._other, logits = Head(self.head.weight), blocks[2]
        self._u.zero_()
        for factor, side in self._sides:
            _multiply(logits, side, rows)
            _transform(logits, _head(side), side.hidden[rows])
            self._u.add_(logits.sub_(torch.logsumexp(logits, 1, keepdim=True)), alpha=factor)
        if self.task.outputs.clip is not None:
            self._u.clamp_(*self.task.outputs.clip)
        if self.head.bias is not None:
            # A token that the student never gives counts as nothing, whatever the others make of it.
            self._u.masked_fill_(self.head.bias == -torch.inf, -torch.inf)

    def sum_up(self, rows: slice) -> None:
        """The rows' numbers."""
        block_moments(
            *(self._z, self.head, self._u, self._other, self._found[:, rows]),
            labels=None if self.labels is None else self.labels[rows],
            flags=self.flags,
            mixture=self.mixture,
        )

    def add_products(self, rows: slice, weights: dict[str, Tensor]) -> None:
        """The block's part of the gradients, which by the logits are written over its products."""
        labelled, numbers, scale = self.labels is not None, self._found[:, rows], 1.0
        sums, values = records_of(numbers, self.flags, self.mixture, labelled=labelled)
        factors = factors_of(weights, sums, values)
        if self.hidden.dtype == torch.float16:
            # The library takes the factor of its sum from the host, which waits for it, once a block.
            largest = largest_of(weights, sums, values) * abs(self.head.logit_scale)
            scale = float(torch.where(largest.isfinite(), largest, 0.0).max()) * FLOAT16_SCALE or 1.0
        dlogits = self._z.view(self.hidden.dtype)[:, : self.head.vocab_size]
        block_gradient(
            *(self._z, self.head, self._u, self._other, numbers),
            factors.stacked() * (self.head.logit_scale / scale),
            dlogits,
            labels=None if self.labels is None else self.labels[rows],
            ignore_index=IGNORED,
            flags=factors.flags,
            mixture=self.mixture,
        )
        order = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        by_entry = self.hidden.new_full((len(order),), scale, dtype=torch.float64)
        self.gradients.add(order, self.hidden[rows], dlogits, by_entry, scale)

    def numbers(self) -> tuple[RowSums, dict[str, Tensor]]:
        """LSEs and moments of all rows."""
        sums, values = records_of(self._found, self.flags, self.mixture, labelled=self.labels is not None)
        lses, moments = numbers_of(self.task, sums, values)
        if not self.is_weighted:
            return lses, moments
        # E_p[log softmax(u)], to E_p[u].
        score = moments[SCORE] + sums.other.lse
        if self.task.left_in is not None:
            score = score.masked_fill(~self.task.left_in, 0.0)
        return lses, {SCORE: score}


def _head(side: Side) -> Head:
    """A model's head with its temperature, and with the bias of the rows that its index names."""
    head = packed(side.head).at_temperature(side.temperature)
    return head if head.bias is None or side.index is None else replace(head, bias=head.bias[side.index])


def _multiply(out: Tensor, side: Side, rows: slice) -> None:
    """out [R, V] = h·w in the model's own dtype, of rows of its head that are gathered a slice at a time."""
    states, weight, index = packed_rows(side.hidden[rows]), packed_rows(side.head.weight), side.index
    if index is None:
        accumulate(out, states, weight.T, fresh=True)
        return
    for columns in slices(len(index), max(1, WORKSPACE_BYTES // (weight.shape[1] * weight.element_size()))):
        accumulate(out[:, columns], states, weight[index[columns]].T, fresh=True)


def _transform(products: Tensor, head: Head, states: Tensor) -> None:
    """Products [R, V] of states [R, D] to logits, in place."""
    if head.bias is not None:
        products.add_(head.bias)
    products.mul_(head.logit_scale)
    if head.softcap is not None:
        # tanh makes an infinite product finite: 0·inf = NaN lets a broken state show all the same.
        products.div_(head.softcap).tanh_().mul_(head.softcap).add_(0.0 * states.float().sum(1, keepdim=True))
