"""The entries per token from which the exact gradient is faster, measured once per shape and machine.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.ops.tiles.sparse import bag

ROWS, COLUMNS, ENTRIES = 256, 2048, 64
"""The size of the sample: rows, vocabulary columns, and entries per row."""


@lru_cache
def break_even(device: torch.device, dtype: torch.dtype, vocab_size: int, hidden_size: int) -> float:
    """Return the entries per token at which gathering both gradients takes as long as recomputing them.

    A sample of tiles is timed, a few milliseconds in all, and the least of five is taken. Timings differ from run to
    run, so a batch close by may be computed either way: who must resume bit for bit chooses a mode. On a CPU tiles are
    in float32, whatever the states are; on a GPU products are in the states' dtype, and torch's gathering stands for
    that of the Triton kernels.
    """
    acc = dtype if device.type == "cuda" else accumulation_dtype(dtype)
    columns = min(COLUMNS, vocab_size)
    h = torch.randn(ROWS, hidden_size, device=device, dtype=acc)
    w = torch.randn(columns, hidden_size, device=device, dtype=acc)
    index = torch.randint(columns, (ROWS * ENTRIES,), device=device, dtype=torch.int32)
    factors = torch.randn(ROWS * ENTRIES, device=device, dtype=acc)
    edges = torch.arange(0, ROWS * ENTRIES + 1, ENTRIES, device=device, dtype=torch.int32)

    def exact() -> None:
        z = torch.mm(h, w.T).exp_()
        torch.mm(z, w)
        torch.mm(z.T, h)

    def sparse() -> None:
        bag(index, w, edges, factors)
        columns_first, order = index.sort(stable=True)
        bag(
            order.int() // ENTRIES,
            h,
            torch.searchsorted(columns_first, torch.arange(columns, device=device).int()).int(),
            factors[order],
        )

    per_token = _seconds(exact, h) * vocab_size / columns / ROWS
    per_entry = _seconds(sparse, h) / (ROWS * ENTRIES)
    return per_token / per_entry


def _seconds(run: Callable[[], None], on: Tensor) -> float:
    taken = []
    for _ in range(6):
        _wait(on)
        since = time.perf_counter()
        run()
        _wait(on)
        taken.append(time.perf_counter() - since)
    return min(taken[1:])


def _wait(on: Tensor) -> None:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
