"""A watchdog: a thread in each process that names the process that the others wait for.

A stalled rank goes unnoticed until the others time out in a collective, and their errors name *their* place, not its
own. All call the same collectives in the same order, so that the rank with the fewest calls is the one that is waited
for. Each process publishes, through the store in which they met, its number of calls and a heartbeat.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed

from tvkd_fast._compat import collectives_begun

BEATS = 20
"""Heartbeats of a process within `timeout_s`."""
NAMED_AFTER = 0.7
"""The share of the timeout after which a process is named; the rest is time to look and to report."""
KEY = "tvkd_fast/watch/{}"


@contextmanager
def watched(groups: Sequence[Any], rank: int, size: int, timeout_s: float) -> Iterator[None]:
    """Name on stderr, while entered, a process that keeps the others waiting for most of `timeout_s`.

    `groups` are those in which the main thread of every process calls the same collectives; torchrun's variables give
    where the store is.
    """
    done = threading.Event()
    main = threading.main_thread().ident

    def watch() -> None:
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = distributed.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
            _watch(store, lambda: sum(map(collectives_begun, groups)), rank, size, timeout_s, done, main)
        except (RuntimeError, OSError):
            # The store ends with the first process; whoever is left is ending too.
            return

    thread = threading.Thread(target=watch, name="tvkd-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1.0)


def _watch(
    store: Any,
    calls: Callable[[], int],
    rank: int,
    size: int,
    timeout_s: float,
    done: threading.Event,
    main: int | None,
) -> None:
    mine, since, beat = calls(), time.monotonic(), 0
    seen: dict[int, tuple[str, float]] = {}
    reported = False
    while not done.wait(timeout_s / BEATS):
        now = time.monotonic()
        if (count := calls()) != mine:
            mine, since, reported = count, now, False
        beat += 1
        store.set(KEY.format(rank), f"{mine} {beat}")
        beats = {r: store.get(KEY.format(r)).decode() for r in range(size) if store.check([KEY.format(r)])}
        for other, latest in beats.items():
            if other not in seen or seen[other][0] != latest:
                seen[other] = (latest, now)
        if reported or now - since < NAMED_AFTER * timeout_s:
            continue
        reported = True
        behind, silent = who_is_waited_for(seen, size, now, timeout_s)
        if rank in behind:
            frame = sys._current_frames().get(main) if main is not None else None
            where = "" if frame is None else "".join(traceback.format_stack(frame)[-6:])
            still = f"which has called nothing for {now - since:.0f} s"
            _report(f"the others wait for process {rank}, {still}. It is at\n{where}")
        elif (behind or silent) and rank == min(set(range(size)) - behind - silent):
            named = [f"process {r}, {'silent' if r in silent else 'behind'}" for r in sorted(behind | silent)]
            _report(f"waiting for {now - since:.0f} s in collective {mine:,} for {'; '.join(named)}")


def who_is_waited_for(
    seen: dict[int, tuple[str, float]], size: int, now: float, timeout_s: float
) -> tuple[set[int], set[int]]:
    """Processes that have called fewer collectives than another, and those without a recent heartbeat.

    `seen` is what each has latest last, "collectives beats", and when that was first seen.
    """
    silent = {r for r in range(size) if r not in seen or now - seen[r][1] > 4 * timeout_s / BEATS}
    counts = {r: int(latest.split()[0]) for r, (latest, _) in seen.items() if r not in silent}
    furthest = max(counts.values(), default=0)
    return {r for r, count in counts.items() if count < furthest}, silent


def _report(line: str) -> None:
    # In one piece: others write too.
    os.write(2, f"tvkd_fast: {line}\n".encode())
