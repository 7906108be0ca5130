"""More than one process: who is there, and a policy's weights over them. Applied from outside the model."""

from tvkd_fast.distributed.shard import shard_policy
from tvkd_fast.distributed.world import World, joined

__all__ = ["World", "joined", "shard_policy"]
