"""SIGTERM and SIGINT as a wish: the step is finished and saved, then the run ends with 143 or 130."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from tvkd_fast.distributed import World


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and has saved what it had done, unless it never does."""

    def __init__(self, number: int, step: int, *, saved: bool) -> None:
        then = "run the same command to resume" if saved else "nothing is saved, as save_every has it"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}: {then}")
        self.status = 128 + number
        """The exit status by which a shell says that a signal ended a command."""


class StopSignal:
    """Record SIGTERM and SIGINT while entered, without acting on them; a later second one acts as usual.

    Those that come at once are one: a terminal, a launcher and a scheduler may each send theirs. Only a program's main
    thread may listen to signals; elsewhere nothing is noted.
    """

    ONE_WISH_S = 2.0
    LISTENED_TO = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            self._before = {number: signal.signal(number, self._note) for number in self.LISTENED_TO}
        except ValueError:
            self._before = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def agreed(self, world: World) -> int:
        """The signal that any of the processes was sent, or 0: all of them hear of it after the same step."""
        return world.all_reduce_max(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > self.ONE_WISH_S:
            self.__exit__()
            signal.raise_signal(number)
