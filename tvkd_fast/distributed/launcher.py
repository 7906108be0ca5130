"""Several processes of a command on this machine, that meet on its loopback interface and nowhere else.

torchrun does the same for several machines; what it starts, and what is started here, finds its world by the same
variables of the environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
GRACE_S = 10.0
"""Seconds that the other processes have to end after one has failed."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` in so many processes; its exit status, or that of the process that failed first.

    Where one dies the others are stopped, since they would wait for it. SIGTERM and SIGINT are handed on, and the
    processes take the time that they need to save.
    """
    with socket.create_server((LOOPBACK, 0)) as server:
        # The store would listen on every interface if it were to open a socket of its own.
        port = server.getsockname()[1]
        store = TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(server.fileno())
        )
        started: list[subprocess.Popen[bytes]] = []
        before = {number: _hand_on(number, started) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            for rank in range(processes):
                # A group of their own: what a terminal sends to all would reach them twice.
                started.append(subprocess.Popen(command, env=_environment(rank, processes, port), process_group=0))
            return _wait(started)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            del store


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # The store exists already: a process joins it and opens none.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if rank > 0:
        own["TQDM_DISABLE"] = "1"
    interface = "lo0" if sys.platform == "darwin" else "lo"
    cores = max(1, (os.cpu_count() or 1) // processes)
    unless_set = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": str(cores)}
    return unless_set | os.environ | own


def _hand_on(number: int, processes: Sequence[subprocess.Popen[bytes]]) -> Any:
    def to_all(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return signal.signal(number, to_all)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        statuses = [process.poll() for process in processes]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None:
            break
        if None not in statuses:
            return 0
        time.sleep(0.05)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    # One that was killed takes its connections with it, and others may have failed over that before it was looked at.
    ended = [process.returncode for process in processes]
    failed = next((rank for rank, status in enumerate(ended) if status < 0 and statuses[rank] is not None), failed)
    status = ended[failed]
    if status < 0:
        print(f"process {failed} of {len(processes)} was killed by {signal.Signals(-status).name}", file=sys.stderr)
        return 128 - status
    return status
