"""A process for each contender, forked from one that has loaded the inputs: its peak memory is its own.

The processes wait for one another's turn, so that contenders can be timed in rounds, and share the inputs' pages. The
parent computes nothing: a thread pool does not survive a fork.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tvkd_fast.training.usage import process_bytes

Job = Callable[[], Any]
"""What is timed; what it returns is dropped outside the timing."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _GIB = -1, -3, 2**30


class Runner:
    """`make()` is called in the process and gives the job; `measure(result)` says what of a result is sent back."""

    def __init__(self, make: Callable[[], Job], measure: Callable[[Any], Any], *, threads: int, reuse: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, make, measure, threads, reuse)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def check(self) -> tuple[Any, int, float]:
        """Run once: what `measure` says of the result, the peak of resident memory beyond what was, and the seconds."""
        return self._ask("check")

    def seconds(self) -> float:
        return self._ask("time")

    def close(self) -> None:
        self.connection.send("stop")
        self.process.join()

    def _ask(self, what: str) -> Any:
        self.connection.send(what)
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the process died ({self.process.exitcode}): out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(
    connection: Connection, make: Callable[[], Job], measure: Callable[[Any], Any], threads: int, reuse: bool
) -> None:
    torch.set_num_threads(threads)
    if reuse:
        # glibc gives large blocks back at once; kept, a gradient's memory has been touched before.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _GIB)
    job = None
    while (asked := connection.recv()) != "stop":
        try:
            job = job or make()
            connection.send(_answer(asked, job, measure))
        except Exception as error:
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _answer(asked: str, job: Job, measure: Callable[[Any], Any]) -> Any:
    if asked == "check":
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        since = time.perf_counter()
        result = job()
        taken = time.perf_counter() - since
        peak = process_bytes("VmHWM") - before
        return measure(result), peak, taken
    since = time.perf_counter()
    result = job()
    taken = time.perf_counter() - since
    del result
    return taken
