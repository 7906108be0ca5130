"""The head's gradient made in the forward, where the loss knows what it will hand down: three products, no recompute.

A block of whole pairs (of whole responses, where a loss compares none) goes through the head once. Its logits are
turned into exponentials; their sums give the block's log-probabilities, those give the loss's derivative by each
response, c; and the same exponentials give the block's part of both gradients. With m_t near the largest of a row's
logits, e_tj = exp(z_tj − m_t) for j ≠ y_t and 0 for the label, T_t = Σ_j e_tj, J = dz/da and s the logit scale,

    dL/dh_t = s·c_t·exp(m_t − LSE(z_t))·(T_t·J_ty·w_y − Σ_j J_tj·e_tj·w_j)

and likewise dL/dw_j. The label's part stays apart, since p_y − 1 of a peaked softmax must not be a difference of
rounded numbers.

Letters: N response tokens, S responses (2P of pairs, chosen first, then rejected), R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums
from tvkd_fast.transfer import to_device

Derivative = Callable[[Tensor, Tensor], Tensor]
"""(S',) summed log-probabilities of some responses, and which they are, (S',) int64, to (S',) dL/dlogp of each.

Responses of a pair are asked for together, in rising order.
"""


WORKSPACE_MB = {"torch": 104, "triton": 1024}
"""MiB of a block, unless others are asked for: in torch 128 with what else is held, of which the library's own buffers
are up to 17; in Triton less on a small device."""
STATES = 2
"""[D] vectors that a row has in torch, beside its logits: its state, and one for what its gradients are made of."""


@dataclass(frozen=True)
class ForwardGradients:
    """What one visit of all blocks leaves; numbers of ignored rows are 0."""

    logps: Tensor
    """(N,)"""
    sums: HeadSums
    """LSE(z) in two parts, (N,) each, for a gradient under another upstream."""
    upstream: Tensor
    """(S,) dL/dlogp of each response."""
    grads: HeadGradients
    """The gradients of Σ_i upstream_i·logp_i, in the dtypes of their inputs."""


def forward_gradients(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    cu_seqlens: Tensor,
    derivative: Derivative,
    *,
    lengths: Sequence[int] | None = None,
    paired: bool,
    ignore_index: int,
    workspace_mb: int = 0,
    impl: str,
    wants: Sequence[bool],
) -> ForwardGradients:
    """Visit every block once: hidden [N, D], labels (N,), the responses' boundaries (S+1,); gradients as `wants` says,
    of hidden, weight and bias.

    Holds `workspace_mb` (0: as many as the implementation finds right), one row at least, beside its results, and the
    float32 sums of 16-bit gradients. A pair of more rows is visited in parts, and all parts but the last, which fills
    the workspace, have their logits computed twice. `lengths` are the responses' on the host where no label is ignored,
    and are read from the device without.
    """
    walk = _walk(impl)(hidden, head, labels, workspace_mb, wants)
    acc, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device
    visited: list[Part] = []
    upstream = hidden.new_zeros(cu_seqlens.numel() - 1, dtype=acc)
    places = _places(labels, cu_seqlens, lengths, ignore_index)
    blocks = _blocks([len(rows) for rows in places], paired, walk.most)
    for rows, responses, counts in _on(device, places, blocks):
        sizes = _parts(len(rows), walk.most)
        parts = [walk.sums(part) for part in rows.split(sizes)]
        visited += parts
        by_token = _together([part.logps for part in parts]).to(acc).double()
        found = torch.segment_reduce(by_token, "sum", lengths=counts, unsafe=True, initial=0).to(acc)
        by_response = derivative(found, responses).to(acc)
        upstream[responses] = by_response
        by_row = by_response.repeat_interleave(counts, output_size=len(by_token)).split(sizes)
        # The last part's logits still lie in the workspace.
        for again, (part, c) in enumerate(zip(reversed(parts), reversed(by_row), strict=True)):
            walk.add_products(walk.sums(part.rows) if again else part, c)
    logps, maximum, log_total = (hidden.new_zeros(hidden.shape[0], dtype=acc) for _ in range(3))
    if visited:
        rows, lse = _together([part.rows for part in visited]), _together([part.lse for part in visited])
        logps[rows] = _together([part.logps for part in visited]).to(acc)
        maximum[rows] = lse.to(acc)
        log_total[rows] = (lse - lse.to(acc)).to(acc)
    return ForwardGradients(logps, HeadSums(maximum, log_total), upstream, walk.rounded())


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_bytes(impl: str, vocab_size: int, hidden_size: int, itemsize: int) -> int:
    """Bytes of a row of the workspace, of states of `itemsize` bytes a number.

    In torch its logits and states; in Triton its products in float32, over which the exponentials are written.
    """
    if impl == "torch":
        return (vocab_size + STATES * hidden_size) * max(4, itemsize)
    return vocab_size * 4


def rows_of_workspace(impl: str, megabytes: int, head: Head, itemsize: int) -> int:
    """The rows that it holds; one where it holds less."""
    return max(1, megabytes * 2**20 // row_bytes(impl, head.vocab_size, head.weight.shape[1], itemsize))


def _walk(impl: str) -> Callable[..., Walk]:
    # Imported when asked for: the Triton one needs triton.
    if impl == "triton":
        from tvkd_fast.ops.triton_walk import TritonWalk

        return TritonWalk
    from tvkd_fast.ops.tiles.block_walk import BlockWalk

    return BlockWalk


def _places(labels: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | None, ignore_index: int) -> list[Tensor]:
    """Of each response the rows that are not ignored, on the host."""
    if lengths is not None:
        return list(torch.arange(labels.shape[0]).split(list(lengths)))
    kept = (labels != ignore_index).cpu()
    return [rows[kept[rows]] for rows in torch.arange(labels.shape[0]).split(cu_seqlens.diff().tolist())]


def _on(device: torch.device, places: list[Tensor], blocks: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each block's rows (R,), its responses (S',) and their numbers of rows (S',), in one copy of all blocks."""
    responses = [i for block in blocks for i in block]
    counts = [len(places[i]) for i in responses]
    numbers = torch.cat([*(places[i] for i in responses), torch.tensor([*responses, *counts], dtype=torch.int64)])
    rows, which, how_many = to_device(numbers, device).split([sum(counts), len(responses), len(responses)])
    each = [len(block) for block in blocks]
    rows_of = [sum(len(places[i]) for i in block) for block in blocks]
    yield from zip(rows.split(rows_of), which.split(each), how_many.split(each), strict=True)


def _blocks(lengths: list[int], paired: bool, most: int) -> list[list[int]]:
    """The responses of each block: whole pairs of at most `most` tokens together, or one that has more.

    The longest pair goes first, and each into the first block that has room: products of few rows are slow.
    """
    count = len(lengths) // 2 if paired else len(lengths)
    groups = [[i, i + count] if paired else [i] for i in range(count)]
    tokens = [sum(lengths[i] for i in group) for group in groups]
    blocks: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(count), key=lambda i: -tokens[i]):
        place = next((k for k, left in enumerate(room) if left >= tokens[i]), len(blocks))
        if place == len(blocks):
            blocks.append([])
            room.append(most)
        blocks[place] += groups[i]
        room[place] -= tokens[i]
    return [sorted(block) for block in blocks]


def _parts(rows: int, most: int) -> list[int]:
    """The rows of each part of a block: the last one is whole, since its logits are not computed again."""
    first = [rows % most] if rows % most or not rows else []
    return first + [most] * (rows // most)


@dataclass(frozen=True)
class Part:
    """Rows whose logits, or exponentials, lie in the workspace; numbers (R,) in float64."""

    rows: Tensor
    shift: Tensor
    """m, what was subtracted from the logits beside the label's."""
    total: Tensor
    """T, the sum of the exponentials, the label's left out."""
    target: Tensor
    """z at the label."""

    @cached_property
    def lse(self) -> Tensor:
        return torch.logaddexp(self.shift + self.total.log(), self.target)

    @cached_property
    def logps(self) -> Tensor:
        return self.target - self.lse

    def factor(self, c: Tensor, logit_scale: float) -> Tensor:
        """What multiplies J_tj·e_tj, −T standing for e at the label, to the gradient by h·w_j under dL/dlogp = c, (R,).

        A label that has all of the probability has no other entry, and m is −inf.
        """
        return (self.shift - self.lse).exp_().mul_(c).mul_(-logit_scale)


class Walk(Protocol):
    """The numbers and gradients so far, and a workspace for the logits of `most` rows."""

    most: int

    def sums(self, rows: Tensor) -> Part:
        """Logits of these rows into the workspace, and their sums."""

    def add_products(self, part: Part, c: Tensor) -> None:
        """The gradients under dL/dlogp = c, (R,), of the rows that lie in the workspace."""

    def rounded(self) -> HeadGradients:
        """The gradients in their inputs' dtypes."""
