"""SIGTERM and SIGINT as a wish: the step is finished and saved, then the run ends with 143 or 130."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from tvkd_fast.distributed import World


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and has saved what it had done."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}: run the same command to go on")
        self.status = 128 + number
        """The exit status by which a shell says that a signal ended a command."""


class StopSignal:
    """While it is entered, the first SIGTERM or SIGINT is noted and nothing more; a second one acts as ever.

    Only a program's main thread may listen to signals; elsewhere nothing is noted.
    """

    LISTENED_TO = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
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
        return world.most(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
