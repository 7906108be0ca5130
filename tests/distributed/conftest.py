"""Processes of gloo on this machine, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[..., str]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Runs a script of this folder in so many processes; what the first one prints."""

    def run(processes: int, script: str, *arguments: str) -> str:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        started = []
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
            environment |= {name: str(value) for name, value in places.items()}
            command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments]
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        said = [process.communicate(timeout=300)[0] for process in started]
        assert all(process.returncode == 0 for process in started), "\n".join(said)
        return said[0]

    return run
