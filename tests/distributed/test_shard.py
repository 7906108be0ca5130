"""A sharded policy against one that is whole: the same losses, gradients and update, in two and four processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tvkd_fast.distributed import World, joined, shard_policy

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("sharded_step.py")


def launch(processes: int, *arguments: str) -> str:
    """What the script prints in so many processes of gloo."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
        environment |= {name: str(value) for name, value in places.items()}
        command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=240)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return said[0]


@pytest.mark.parametrize(("processes", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_a_step_over_processes_is_the_step_of_one(processes: int, replicas: int) -> None:
    """Tied and untied Llamas and Gemma 2 with its softcaps, packed rows, one rank without a pair of its own."""
    assert launch(processes, str(replicas)).split() == ["llama,", "tied", "llama,", "untied", "gemma2"]


def test_a_world_of_one_is_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as world:
        assert world == World(torch.device("cpu"))
        assert world.first
        assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
        policy = object()
        assert shard_policy(policy, world) is policy


def test_replicas_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ValueError, match="3 replicas do not divide 4 processes"),
        joined(torch.device("cpu"), replicas=3),
    ):
        pass
