"""Passes over a tile of float32 logits on a CPU, compiled by numba where it is installed.

A row is read from memory once and looked at in the cache as often as needs be; torch's passes each read the whole tile.
Numba brings its own compiler; without it, or where it cannot compile, torch's passes are taken, and the last bits of a
result differ.

Letters: R rows and C columns of a tile.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("tvkd_fast")
Found = tuple[Tensor, Tensor, Tensor]


class Passes:
    """What is compiled, on tensors; `maximum` and `total` (R,) run along the vocabulary: Σ e^(z − maximum) so far."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._one_at_a_time = threading.Lock()

    def add(self, z: Tensor, maximum: Tensor, total: Tensor) -> None:
        """Bring maximum and total up to a tile z [R, C]."""
        self._run("add", z, maximum, total)

    def softmax(self, z: Tensor, maximum: Tensor, log_total: Tensor, out: Tensor) -> None:
        """e^(z − maximum − log_total) of a tile z [R, C]; `out` is z or apart from it."""
        if out.data_ptr() == z.data_ptr():
            self._run("softmax", z, maximum, log_total)
        else:
            self._run("softmax_of", z, maximum, log_total, out)

    def mark(
        self,
        z: Tensor,
        labels: Tensor,
        maximum: Tensor,
        total: Tensor,
        counts: Tensor,
        eps: float,
        cap: int,
        spare: Tensor,
    ) -> Found:
        """`add`, and rows, columns and e^(z − maximum) of entries above ε of the running total; z is overwritten.

        `counts` (R,) grows by what was found; rows that have more than `cap` are not looked at any longer, nor is the
        label's column. `spare` has room for R·C int32.
        """
        columns = spare.view(torch.int32)[: z.numel()].view(z.shape)
        found = torch.empty(z.shape[0], dtype=torch.int64)
        self._run("mark", z, labels, maximum, total, counts, found, columns, eps, cap)
        counts += found
        ends = found.cumsum(0)
        size = int(ends[-1])
        rows, where = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.int64)
        e = torch.empty(size)
        self._run("gather", z, columns, ends, rows, where, e)
        return rows, where, e

    def _run(self, kernel: str, *args: Any) -> None:
        import numba

        arrays = [x.numpy() if isinstance(x, Tensor) else x for x in args]
        # The simplest of numba's thread pools ends the process where two threads enter it at once.
        with self._one_at_a_time:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
            getattr(self._kernels, kernel)(*arrays)


def passes(z: Tensor) -> Passes | None:
    """For tiles like z; None where torch has to do."""
    return _compiled() if z.device.type == "cpu" and z.dtype == torch.float32 and not _orphaned else None


_orphaned: list[int] = []
"""This process, where it was forked from one whose numba had threads already: they are not here, and it would wait."""


def _after_fork() -> None:
    if _compiled.cache_info().currsize:
        _orphaned.append(os.getpid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache
def _compiled() -> Passes | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from tvkd_fast.ops import compiled_kernels

        compiled_kernels.compile_all()
        return Passes(compiled_kernels)
    except Exception as why:  # whatever keeps numba from compiling, torch's passes compute the same
        _log.warning("numba is installed and cannot compile here (%s): the head's passes are torch's", why)
        return None
