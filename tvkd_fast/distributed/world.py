"""The processes of a run and the mesh that they form. Without torchrun there is one, and nothing to join.

Letters: W processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tvkd_fast.distributed.watch import watched

REPLICATE, SHARD = "replicate", "shard"
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is among the others. Every method is called by all of them, or by none."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Over which weights are sharded, and replicated where it has two dimensions; None in a world of one."""
    host: Any = None
    """The group in which processes talk of what is in the host's memory: gloo, whatever the device's backend."""
    background: Any = None
    """The same for a thread that saves while the first one trains: messages of one group must be in one order."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Of every process's x, the same bits on each of them; without a gradient."""
        whole = x.detach().clone()
        if self.mesh is not None:
            distributed.all_reduce(whole)
        return whole

    def most(self, number: int) -> int:
        """The largest of every process's number, known on the host without waiting for a device."""
        if self.mesh is None:
            return number
        largest = torch.tensor(number)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.host)
        return int(largest)

    def told(self, thing: T) -> T:
        """What the first process has."""
        if self.mesh is None:
            return thing
        things = [thing]
        distributed.broadcast_object_list(things, src=0, group=self.host)
        return things[0]

    def everyone(self, thing: T, *, behind: bool = False) -> list[T]:
        """What each process has, by rank; asked `behind` the training, in the thread that saves, where that is said."""
        if self.mesh is None:
            return [thing]
        things: list[Any] = [None] * self.size
        distributed.all_gather_object(things, thing, group=self.background if behind else self.host)
        return things

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            distributed.barrier(group=self.host)


def check_replicas(replicas: int, processes: int) -> None:
    """ValueError where the processes cannot be grouped into so many replicas of equal size."""
    if replicas < 1 or processes % replicas:
        raise ValueError(
            f"{replicas} replicas do not divide {processes} processes: give a divisor of {processes} as "
            "--parallel.replicas"
        )


@contextmanager
def joined(device: torch.device, *, replicas: int = 1, timeout_s: float = 600.0) -> Iterator[World]:
    """The world that torchrun's variables name, left again at the end.

    Args:
        device: `cpu`, or `cuda`, of which each process takes the one of its place on its machine.
        replicas: groups that hold all weights each, sharded within a group (HSDP); 1 shards over all processes.
        timeout_s: seconds after which a process that waits for another gives up; who is waited for is named before.

    Raises:
        ValueError: `replicas` does not divide the number of processes, or there are more than GPUs.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    check_replicas(replicas, size)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if size > 1 and device.type == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start as many at most"
        )
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=timeout_s)
    # Torch's flight recorder: what was called, and where, of each process's last collectives.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    distributed.init_process_group(backend, timeout=patience)
    shape, names = ((size,), (SHARD,)) if replicas == 1 else ((replicas, size // replicas), (REPLICATE, SHARD))
    world = World(
        device,
        rank,
        size,
        init_device_mesh(device.type, shape, mesh_dim_names=names),
        distributed.new_group(backend="gloo", timeout=patience),
        distributed.new_group(backend="gloo", timeout=patience),
    )
    assert world.mesh is not None
    groups = [distributed.group.WORLD, world.host, *world.mesh.get_all_groups()]
    # After an error there is no parting in good order: it would wait for processes that wait for this one.
    with watched(list(dict.fromkeys(groups)), rank, size, timeout_s):
        yield world
    # One that leaves early takes its connections with it.
    world.wait()
    distributed.destroy_process_group()
    # gloo's threads are still putting their last work away. One that wants the interpreter when it is ending aborts the
    # process: three of ten did on two cores, and none that waited.
    time.sleep(0.2)
