"""Sums over packed ragged sequences.

Letters: N tokens, S sequences; sequence i is `cu_seqlens[i]:cu_seqlens[i+1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return one sum per sequence, (S,), of (N,) packed numbers, in a fixed order; an empty sequence sums to 0.
    Differentiable.

    Summed in float64 whatever the dtype: added up one by one in float32, 100,000 log-probabilities are off by a nat.
    Traces under `torch.compile`, where a CPU refuses boundaries that do not end at N with torch's own RuntimeError.

    Args:
        per_token: (N,) floats, as log-probabilities of packed responses.
        cu_seqlens: (S+1,) int64 or int32 boundaries from 0 to N, rising.

    Raises:
        ValueError: boundaries of another shape or dtype; on a CPU also those that do not run from 0 to N, or fall.

    Examples:
        >>> import torch
        >>> segment_sums(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-3., -4.])
    """
    check_boundaries("cu_seqlens", cu_seqlens, per_token.shape[0])
    unsafe = True
    # In a compiled graph on a CPU torch still compares the lengths' sum with N; it cannot where there are no lengths.
    # Asked by `if`: of a symbolic size Dynamo would make a bool of a type of its own, which torch 2.15 refuses.
    if torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu" and cu_seqlens.numel() > 1:
        unsafe = False
    sums = torch.segment_reduce(per_token.double(), "sum", lengths=cu_seqlens.diff(), unsafe=unsafe, initial=0)
    return sums.to(per_token.dtype)


def running_sums(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) packed numbers to the sums before each of them and after the last, sequence by sequence: (N+S,).

    A sequence x_1..x_T gives 0, x_1, x_1+x_2, …: T+1 numbers, one per state. Added in float64, in a fixed order.
    """
    check_boundaries("cu_seqlens", cu_seqlens, per_token.shape[0])
    lengths = cu_seqlens.diff() + 1
    whole = torch.cat([per_token.new_zeros(1, dtype=torch.float64), per_token.double().cumsum(0)])
    states = torch.arange(per_token.shape[0] + lengths.shape[0], device=per_token.device)
    sequence = torch.arange(lengths.shape[0], device=per_token.device)
    sequence = sequence.repeat_interleave(lengths, output_size=states.shape[0])
    return (whole[states - sequence] - whole[cu_seqlens[sequence]]).to(per_token.dtype)


def check_boundaries(name: str, cu: Tensor, total: int) -> None:
    """`cu` (S+1,) must rise from 0 to `total`; looked at on a CPU only, where looking waits for nothing.

    Under `torch.compile` only shape and dtype are checked: the numbers do not exist yet when a graph is traced.
    """
    if cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be (S+1,) int32 or int64 boundaries, got {tuple(cu.shape)} {cu.dtype}")
    if cu.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu[0] != 0 or cu[-1] != total:
        raise ValueError(
            f"{name} must rise from 0 to {total}, the number of packed entries; it runs from {int(cu[0])} to "
            f"{int(cu[-1])}"
        )
    falls = cu.diff() < 0
    if falls.any():
        raise ValueError(f"{name} must rise from 0 to {total}; it falls after entry {int(falls.nonzero()[0, 0])}")
