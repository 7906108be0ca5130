"""Padded rows: which of their states are a response's, and how they are packed.

Letters: 2P responses, a row each; T tokens of a row, T+1 states; N tokens or states of all rows, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.fused.epilogue import Preference

_NAMED_ROWS = 8


def rows_of(hidden: Tensor) -> Tensor:
    """[N, D] of either form, packed or [2P, T, D]."""
    return hidden.flatten(0, 1) if hidden.dim() == 3 else hidden


def row_boundaries(labels: Tensor) -> Tensor:
    """(2P+1,) boundaries of the rows of labels [2P, T], flattened."""
    return torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1]


def check_runs(labels: Tensor, ignore_index: int) -> None:
    """Each row of labels [2P, T] holds its tokens in one run; looked at on a CPU only."""
    if labels.device.type != "cpu":
        return
    kept = labels != ignore_index
    begins = kept & ~F.pad(kept, (1, -1)) if kept.shape[1] else kept
    rows = (begins.sum(1) > 1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"labels must hold one contiguous run of tokens per row, ignore_index={ignore_index} around it; rows with "
            f"holes: {', '.join(map(str, rows[:_NAMED_ROWS]))}{' and more' if len(rows) > _NAMED_ROWS else ''}. Pack "
            "such responses: cu_seqlens (and cu_states) say which tokens (and states) are whose, whatever is ignored"
        )


def packed_form(
    labels: Tensor,
    ignore_index: int,
    *,
    cu_seqlens: Tensor | None,
    values: Tensor | None,
    cu_states: Tensor | None,
    ended: Tensor | None,
    **others: Any,
) -> Preference:
    """The loss's inputs in the packed form, from either; `others` are the fields of `Preference` that have one form."""
    if cu_seqlens is None:
        if not torch.compiler.is_compiling():
            check_runs(labels, ignore_index)
        cu_seqlens = row_boundaries(labels)
        if values is not None:
            values, cu_states, ended = packed_states(values, labels, ignore_index, ended)
    return Preference(cu_seqlens=cu_seqlens, values=values, cu_states=cu_states, ended=ended, **others)


def response_states(labels: Tensor, ignore_index: int) -> Tensor:
    """[2P, T+1] bool: of a run labels[i, a:b] the states a to b, which are one more."""
    kept = labels != ignore_index
    return F.pad(kept, (0, 1)) | F.pad(kept, (1, 0))


def packed_states(
    values: Tensor, labels: Tensor, ignore_index: int, ended: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded values packed without counting them, which a GPU would have to wait for: one response more takes the rest.

    values (2P·(T+1),) become (2P·(T+1) + 2,), since no response may have less than two states; boundaries and `ended`
    become one more as well.
    """
    kept = response_states(labels, ignore_index)
    order = kept.flatten().logical_not().byte().argsort(stable=True)
    packed = F.pad(values[order], (0, 2))
    cu_states = F.pad(kept.sum(1).cumsum(0), (1, 1))
    cu_states[-1:] = packed.shape[0]
    return packed, cu_states, None if ended is None else F.pad(ended, (0, 1))
