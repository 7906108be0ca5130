"""Meters of time and memory: on a CPU in a process of its own, on a GPU by events in this one."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from bench.harness.processes import Worker, as_answer, held_memory, peak_memory, reset_peak_memory

Call = Callable[[], Any]
"""The call that is timed; its result is dropped outside the timing."""
Make = Callable[[], Call]
"""Called where the contender runs."""
Measure = Callable[[Any], Any]
"""The part of a result that is kept."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _GIB = -1, -3, 2**30


class Job(Protocol):
    """One contender's work, where its meter runs it."""

    def check(self) -> Any:
        """Run once: what `measure` makes of the result."""

    def warm_up(self) -> None:
        """Run until caches, allocators and compilers are settled."""

    def seconds(self) -> float:
        """Return the seconds of one run."""

    def peak_bytes(self) -> int:
        """Return the peak memory of one run beyond what was held before."""

    def close(self) -> None: ...


class Meter(Protocol):
    def start(self, make: Make, measure: Measure) -> Job: ...


class CpuMeter:
    """Each job in a process forked from this one. `reuse` keeps freed memory, so that a gradient's was touched."""

    def __init__(self, threads: int, *, reuse: bool = False) -> None:
        self.threads, self.reuse = threads, reuse

    def start(self, make: Make, measure: Measure) -> CpuJob:
        return CpuJob(Worker(_serve, make, measure, self.reuse, start="fork", threads=self.threads))


class CpuJob:
    """The checked run is a timed one too: `seconds` gives its time first, and `peak_bytes` is of it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._first: float | None = None
        self._peak = 0

    def check(self) -> Any:
        found, self._peak, self._first = self.worker.ask("check")
        return found

    def warm_up(self) -> None:
        """Nothing to do: the checked run was warm, `make` having run a smaller one."""

    def seconds(self) -> float:
        taken, self._first = self._first, None
        return self.worker.ask("time") if taken is None else taken

    def peak_bytes(self) -> int:
        return self._peak

    def close(self) -> None:
        self.worker.close()


def _serve(connection: Connection, make: Make, measure: Measure, reuse: bool) -> None:
    if reuse:
        # glibc gives large blocks back at once; kept, a gradient's memory has been touched before.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _GIB)
    call = None
    while True:
        request = connection.recv()
        try:
            call = call or make()
            connection.send(_answer(request, call, measure))
        except Exception as error:
            connection.send(as_answer(error))


def _answer(request: str, call: Call, measure: Measure) -> Any:
    if request == "check":
        reset_peak_memory()
        before = held_memory()
        since = time.perf_counter()
        result = call()
        taken = time.perf_counter() - since
        peak = peak_memory() - before
        return measure(result), peak, taken
    since = time.perf_counter()
    result = call()
    taken = time.perf_counter() - since
    del result
    return taken


class GpuMeter:
    """Times by CUDA events, each from a cache that holds nothing of the call's, and memory by the allocator."""

    def start(self, make: Make, measure: Measure) -> GpuJob:
        return GpuJob(make(), measure)


class GpuJob:
    WARM_UP, WARM_UP_SECONDS = 3, 0.1
    """Calls, and seconds: clocks are slow to rise after a compiler kept the device waiting."""
    FLUSHED = 2**28
    """Bytes written before each timed call, several times an L2 cache. While they are, the host queues the call: the
    first event would otherwise come as soon as it is recorded, and the launch be timed with the kernel."""

    def __init__(self, call: Call, measure: Measure) -> None:
        self.call, self.measure = call, measure

    def check(self) -> Any:
        return self.measure(self.call())

    def warm_up(self) -> None:
        since, calls = time.perf_counter(), 0
        while calls < self.WARM_UP or time.perf_counter() - since < self.WARM_UP_SECONDS:
            self.call()
            torch.cuda.synchronize()
            calls += 1

    def seconds(self) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Freed before the call, of whose memory it would be a part.
        torch.empty(self.FLUSHED, dtype=torch.uint8, device="cuda").zero_()
        start.record()
        self.call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak_bytes(self) -> int:
        """Beyond what was there before and the tensors that it returns."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = self.call()
        return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in kept)

    def close(self) -> None:
        """Nothing to do: it has no process."""


def interleaved(
    timers: Mapping[str, Callable[[], float]], rounds: int, *, before: Callable[[], float] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each by name, round by round in turns: the time that `before` took just before (else 0), and its own.

    A shared machine is not as fast from one second to the next: what is compared has to be measured side by side.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            unit = before() if before else 0.0
            taken[name].append((unit, timer()))
    return taken
