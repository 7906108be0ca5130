"""Runs a step's cases in processes of their own, and outlives whatever one of them does.

Each process is a session that is killed as a whole. A case that raises leaves a row. One that kills its process, or
does not answer within its limit, costs that process, and another goes on with the rest. At the step's deadline all end,
and what was not done is named.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).parents[2]
START = 120.0
"""Seconds that a process may take until it names its cases: a first import of torch reads gigabytes."""
REPLACED = 3
"""Processes that may end between two cases, or before their first, until the step is given up."""
LONGEST = 300
"""Characters of a reason."""
Emit = Callable[[dict[str, Any]], None]


@dataclass
class Outcome:
    """What became of a step: the cases that were cut off by its deadline, and those that were not begun."""

    cut: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Process:
    """A worker's process: what it is doing and until when, and its output as events of a queue, None at its end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], events: queue.Queue[Any]) -> None:
        # Read when the process has ended, and closed with this record.
        self.log = TemporaryFile()  # noqa: SIM115
        self.case: str | None = None
        self.leaves = False
        """It said that it would end: the device does not answer it any more."""
        self.due = time.monotonic() + START
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env=dict(environment),
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: queue.Queue[Any]) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            events.put((self, line))
        events.put((self, None))

    def ask(self, case: str, limit: float) -> bool:
        """Ask for a case; False where the process is gone."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps({"case": case}).encode() + b"\n")
            self.popen.stdin.flush()
        except OSError:
            return False
        self.case, self.due = case, time.monotonic() + limit
        return True

    def kill(self) -> None:
        """End the session. A process that waits inside a driver may outlive this, and is not waited for."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait(timeout=2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def end(self) -> str:
        """How it ended, with its last words, once its output is closed."""
        try:
            status = self.popen.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self.popen.returncode
        how = "closed its output" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        self.log.seek(0)
        words = last_words(self.log.read().decode(errors="replace"))
        return f"its process {how}" + (f": {words}" if words else "")


def last_words(text: str) -> str:
    """The line that says why: where a crash has a traceback, with the place that it was in."""
    if fatal := re.search(r"Fatal Python error: (.*)", text):
        place = re.search(r'File "[^"]*?([^"/]+)", (line \d+ in \S+)', text[fatal.end() :])
        return (fatal[1] + (f", {place[1]} {place[2]}" if place else ""))[:LONGEST]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:LONGEST] if lines else ""


class Pool:
    """A step's processes. `emit` is called with each row as it comes."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], jobs: int, deadline: float, emit: Emit
    ) -> None:
        self.command, self.environment, self.jobs, self.deadline = command, environment, jobs, deadline
        self.emit = emit
        self.events: queue.Queue[tuple[Process, bytes | None]] = queue.Queue()
        self.running: list[Process] = []
        self.waiting: deque[str] | None = None
        """Cases that no process has begun; None until the first process has named them."""
        self.known: dict[str, tuple[float, bool]] = {}
        """Of each case its limit in seconds, and whether it is a peer's."""
        self.replaced = 0
        self.gave_up = False

    def run(self) -> Outcome:
        outcome = Outcome()
        try:
            self._start()
            while self.running and time.monotonic() < self.deadline:
                self._next()
            outcome.cut = [process.case for process in self.running if process.case is not None]
            outcome.left_out = list(self.waiting or ())
        finally:
            for process in self.running:
                process.kill()
        if self.waiting is None and not self.gave_up:
            self._give_up("no process was ready in time")
        for name in outcome.cut:
            self._row({"name": name, "cut": "cut off at the step's limit"})
        return outcome

    def _start(self) -> None:
        self.running.append(Process(self.command, self.environment, self.events))

    def _next(self) -> None:
        """Take the next event, or end what is overdue."""
        due = min(self.deadline, *(process.due for process in self.running))
        try:
            process, line = self.events.get(timeout=max(0.0, due - time.monotonic()))
        except queue.Empty:
            for process in [x for x in self.running if time.monotonic() >= x.due]:
                self._overdue(process)
            return
        if process not in self.running:
            # Killed before; what it had still to say is not wanted.
            return
        if line is None:
            self._ended(process)
        else:
            self._heard(process, line)

    def _heard(self, process: Process, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            # Printed by something that found its way round the log.
            return
        if "cases" in message:
            if self.waiting is None:
                self.known = {name: (limit, peer) for name, limit, peer in message["cases"]}
                self.waiting = deque(self.known)
                for _ in range(min(self.jobs, len(self.waiting)) - 1):
                    self._start()
            self._give(process)
        elif "row" in message:
            self._row(message["row"], process.case)
        elif "done" in message:
            self._give(process)
        elif "leaving" in message:
            process.case, process.leaves = None, True

    def _give(self, process: Process) -> None:
        """Ask for the next case, or let the process go."""
        process.case = None
        if not self.waiting:
            self.running.remove(process)
            process.kill()
            return
        name = self.waiting.popleft()
        if not process.ask(name, self.known[name][0]):
            self.waiting.appendleft(name)

    def _row(self, row: dict[str, Any], case: str | None = None) -> None:
        _, peer = self.known.get(case or row["name"], (0.0, False))
        self.emit(row | {"peer": True} if peer else row)

    def _overdue(self, process: Process) -> None:
        self.running.remove(process)
        process.kill()
        if process.case is None:
            self._lost(f"no process was ready within {START:g} s")
            return
        limit = self.known[process.case][0]
        self._row({"name": process.case, "failed": f"no answer within {limit:g} s: its process was killed"})
        self._replace()

    def _ended(self, process: Process) -> None:
        self.running.remove(process)
        how = process.end()
        # What it left running, if anything, is of its session.
        process.kill()
        if process.case is None and not process.leaves:
            self._lost(how)
            return
        if process.case is not None:
            self._row({"name": process.case, "failed": how})
        self._replace()

    def _lost(self, how: str) -> None:
        """A process ended without a case: another takes its place, a few times."""
        self.replaced += 1
        if self.waiting is None or (self.replaced > REPLACED and not self.running):
            self._give_up(how)
        elif self.replaced <= REPLACED:
            self._replace()

    def _give_up(self, how: str) -> None:
        self.gave_up = True
        self.emit({"name": "the step", "failed": f"could not begin: {how}"})

    def _replace(self) -> None:
        if self.waiting and len(self.running) < min(self.jobs, len(self.waiting)):
            self._start()
