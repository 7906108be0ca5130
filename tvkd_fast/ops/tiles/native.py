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
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("tvkd_fast")
Found = tuple[Tensor, Tensor, Tensor]


class Passes:
    """The compiled passes, on tensors; `maximum` and `total` = Σ e^(z − maximum), (R,), run along the vocabulary."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._one_at_a_time = threading.Lock()

    def add(self, z: Tensor, maximum: Tensor, total: Tensor) -> None:
        """Bring maximum and total up to a tile z [R, C]."""
        self._run("add", z, maximum, total)

    def exponentiate(self, z: Tensor, shift: Tensor, total: Tensor, slack: float) -> None:
        """A tile z [C, R] becomes e^(z − shift), and `total`, float64, grows by its sums; (R,) both.

        Where a logit is more than `slack` above the shift, or that is −inf, the tile's largest becomes the shift first.
        """
        self._run("exponentiate", z, shift, total, slack)

    def softmax(self, z: Tensor, maximum: Tensor, log_total: Tensor, out: Tensor) -> None:
        """e^(z − maximum − log_total) of a tile z [R, C]; `out` is z or apart from it."""
        if out.data_ptr() == z.data_ptr():
            self._run("softmax", z, maximum, log_total)
        else:
            self._run("softmax_of", z, maximum, log_total, out)

    def select(
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
        """`add`, and of entries above ε of the running total how many a row has, columns and e^(z − maximum).

        z is overwritten. `counts` (R,) grows by what was found; rows that have more than `cap` are not looked at any
        longer, nor is the label's column. `spare` has z's shape and 4 bytes per element.
        """
        columns = spare.view(torch.int32)
        return self._tensors("select", z, labels, maximum, total, counts, columns, eps, cap)

    def rescale(
        self,
        found: Tensor,
        columns: Tensor,
        e: Tensor,
        scale: Tensor,
        dense: Tensor,
        eps: float,
        place: Tensor,
        first: int,
        tail: Tensor,
    ) -> Found:
        """Return rows, columns and p = e·scale of the entries from `select` with p ≥ ε in rows that are not dense.

        `place` (R,) is each row's place among all, `first` is the tile's first column; `tail` (R,) loses what is kept.
        """
        return self._tensors("rescale", found, columns, e, scale, dense, eps, place, first, tail)

    def by_column(
        self, selected: Sequence[Tensor], even: Tensor, c: Tensor, labels: Sequence[Tensor], there: slice
    ) -> Found:
        """Rows and gradients of what lies in the columns `there`, column by column, and where each column begins.

        `selected` are columns, rows and p, whose gradients are even − c·p of the row; `labels` are columns, rows and
        gradients, of these columns alone, and come after. Within a column the order is the one given.
        """
        return self._tensors("by_column", *selected, even, c, *labels, there.start, there.stop - there.start)

    def gather(self, index: Tensor, factors: Tensor, edges: Tensor, rows: Tensor, base: Tensor, out: Tensor) -> None:
        """out_i = base + Σ_k factors_k·rows[index_k] over k of edges[i]..edges[i+1], each sum in the order of k."""
        self._run("gather", index, factors, edges, rows, base, out)

    def _tensors(self, kernel: str, *args: Any) -> Found:
        first, second, third = self._run(kernel, *args)
        return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)

    def _run(self, kernel: str, *args: Any) -> Any:
        return self.call(getattr(self._kernels, kernel), *args)

    def call(self, kernel: Any, *args: Any) -> Any:
        """A compiled kernel of tensors, on as many threads as torch has."""
        import numba

        arrays = [x.numpy() if isinstance(x, Tensor) else x for x in args]
        # The simplest of numba's thread pools ends the process where two threads enter it at once.
        with self._one_at_a_time:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
            return kernel(*arrays)


def passes(z: Tensor) -> Passes | None:
    """Return the compiled passes for tiles like z, or None where only torch's are available."""
    return _compiled() if z.device.type == "cpu" and z.dtype == torch.float32 and not _orphaned else None


_orphaned = False
"""Forked from a process whose numba had threads already: they are not here, and this one would wait for them."""


def _after_fork() -> None:
    global _orphaned
    _orphaned = _orphaned or _compiled.cache_info().currsize > 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache
def _compiled() -> Passes | None:
    if importlib.util.find_spec("numba") is None:
        return None
    threads = torch.get_num_threads()
    try:
        from tvkd_fast.ops.tiles import numba_passes

        numba_passes.compile_all()
        return Passes(numba_passes)
    except Exception as why:  # whatever keeps numba from compiling, torch's passes compute the same
        _log.warning("numba is installed and cannot compile here (%s): the head's passes are torch's", why)
        return None
    finally:
        # Numba's OpenMP pool sets the number of the whole process, torch's too, as it comes to be.
        torch.set_num_threads(threads)


@lru_cache
def compiled_module(load: Callable[[], Any], walk: str) -> Any:
    """The module of a walk's kernels, loaded and compiled once, or None where numba cannot compile them."""
    try:
        kernels = load()
        kernels.compile_all()
    except Exception as why:  # whatever keeps numba from compiling, torch's passes compute the same
        _log.warning("numba cannot compile the %s's passes here (%s): they are torch's", walk, why)
        return None
    return kernels
