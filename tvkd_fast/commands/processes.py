"""The processes of a command, and how they share its models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tvkd_fast.commands.models import (
    RunConfig,
    Sharing,
    resolve_device,
)
from tvkd_fast.distributed import World, joined

if TYPE_CHECKING:
    pass


def world_of(config: RunConfig) -> AbstractContextManager[World]:
    parallel = config.parallel
    return joined(resolve_device(config.model), replicas=parallel.replicas, timeout_s=parallel.timeout_s)


def sharing_of(config: RunConfig, world: World) -> Sharing:
    return Sharing(world, config.parallel, config.tokens_per_micro_batch)
