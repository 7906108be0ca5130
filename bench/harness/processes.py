"""A process for each contender: its memory's peak is its own, and it waits for its turn.

Forked where inputs' pages are shared with the parent, which then computes nothing: a thread pool does not survive a
fork. Spawned where a contender trains a model of its own: whatever the parent holds would be part of its peak.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from tvkd_fast.training.usage import process_bytes

Serve = Callable[..., None]
"""Runs in the process: takes its end of the pipe, then the arguments."""


class Worker:
    """A process that serves one end of a pipe; what it raises is raised here, as a RuntimeError."""

    def __init__(self, serve: Serve, *arguments: Any, start: Literal["fork", "spawn"], threads: int) -> None:
        context: Any = multiprocessing.get_context(start)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, threads, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request: str) -> Any:
        self._connection.send(request)
        return self.answer()

    def answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process died ({self._process.exitcode}): out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _run(serve: Serve, threads: int, connection: Connection, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        serve(connection, *arguments)
    except EOFError:
        # The parent has gone, and with it whoever would read an answer.
        return
    except Exception as error:
        connection.send(as_answer(error))


def as_answer(error: Exception) -> RuntimeError:
    """Return the error with its type in the text: an exception of a peer's own class may not survive the pipe."""
    return RuntimeError(f"{type(error).__name__}: {error}")


def reset_peak_memory() -> None:
    """This process's VmHWM goes back to what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes at most, since the last reset."""
    return process_bytes("VmHWM")


def held_memory() -> int:
    return process_bytes("VmRSS")
