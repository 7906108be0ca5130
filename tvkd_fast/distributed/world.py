"""The processes of a run and the mesh that they form. Without torchrun there is one, and nothing to join.

Letters: W processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True)
class World:
    """Who this process is among the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Over which weights are sharded, and replicated where it has two dimensions; None in a world of one."""

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


@contextmanager
def joined(device: torch.device, *, replicas: int = 1, timeout_s: float = 600.0) -> Iterator[World]:
    """The world that torchrun's variables name, left again at the end.

    Args:
        device: `cpu`, or `cuda`, of which each process takes the one of its place on its machine.
        replicas: groups that hold all weights each, sharded within a group (HSDP); 1 shards over all processes.
        timeout_s: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: `replicas` does not divide the number of processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World(device)
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if replicas < 1 or size % replicas:
        raise ValueError(f"{replicas} replicas do not divide {size} processes: give a divisor of {size}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        shape, names = ((size,), (SHARD,)) if replicas == 1 else ((replicas, size // replicas), (REPLICATE, SHARD))
        yield World(device, rank, size, init_device_mesh(device.type, shape, mesh_dim_names=names))
    finally:
        distributed.destroy_process_group()
