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
    """This process's rank among the others. Every method is a collective: all processes call it, or none does."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """The mesh that weights are sharded over, and replicated over if it has two dimensions; None in a world of one."""
    host: Any = None
    """The group for objects in the host's memory: gloo, whatever the device's backend."""
    background: Any = None
    """A second one for the thread that saves during training: the messages of one group must be in one order."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of every process's x, the same bits on each of them; without a gradient."""
        total = x.detach().clone()
        if self.mesh is not None:
            distributed.all_reduce(total)
        return total

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of every process's number, known on the host without waiting for a device."""
        if self.mesh is None:
            return number
        largest = torch.tensor(number)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.host)
        return int(largest)

    def broadcast(self, thing: T) -> T:
        """Return what the first process passes."""
        if self.mesh is None:
            return thing
        things = [thing]
        distributed.broadcast_object_list(things, src=0, group=self.host)
        return things[0]

    def all_gather(self, thing: T, *, behind: bool = False) -> list[T]:
        """Return what each process passes, by rank; with `behind`, called in the thread that saves."""
        if self.mesh is None:
            return [thing]
        things: list[Any] = [None] * self.size
        distributed.all_gather_object(things, thing, group=self.background if behind else self.host)
        return things

    def gather(self, thing: T) -> list[T]:
        """Return what each process passes, by rank, in the first process; nothing in the others."""
        if self.mesh is None:
            return [thing]
        things: list[Any] | None = [None] * self.size if self.first else None
        distributed.gather_object(thing, things, dst=0, group=self.host)
        return things or []

    def barrier(self) -> None:
        """Wait until every process calls this."""
        if self.mesh is not None:
            distributed.barrier(group=self.host)


def check_replicas(replicas: int, processes: int) -> None:
    """Raise ValueError where the processes cannot be grouped into so many replicas of equal size."""
    if replicas < 1 or processes % replicas:
        raise ValueError(
            f"{replicas} replicas do not divide {processes} processes: give a divisor of {processes} as "
            "--parallel.replicas"
        )


@contextmanager
def init_distributed(device: torch.device, *, replicas: int = 1, timeout_s: float = 600.0) -> Iterator[World]:
    """Yield the world that torchrun's variables describe, and leave it at the end.

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
    timeout = timedelta(seconds=timeout_s)
    # Torch's flight recorder: what was called, and where, of each process's last collectives.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    distributed.init_process_group(backend, timeout=timeout)
    shape, names = ((size,), (SHARD,)) if replicas == 1 else ((replicas, size // replicas), (REPLICATE, SHARD))
    world = World(
        device,
        rank,
        size,
        init_device_mesh(device.type, shape, mesh_dim_names=names),
        distributed.new_group(backend="gloo", timeout=timeout),
        distributed.new_group(backend="gloo", timeout=timeout),
    )
    assert world.mesh is not None
    groups = [distributed.group.WORLD, world.host, *world.mesh.get_all_groups()]
    # After an error there is no parting in good order: it would wait for processes that wait for this one.
    with watched(list(dict.fromkeys(groups)), rank, size, timeout_s):
        yield world
    # One that leaves early takes its connections with it.
    world.barrier()
    distributed.destroy_process_group()
    # gloo's threads are still putting their last work away. One that wants the interpreter when it is ending aborts the
    # process: three of ten did on two cores, and none that waited.
    time.sleep(0.2)
