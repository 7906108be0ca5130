"""Several processes: their group, and a policy's weights over them. Applied from outside the model."""

from tvkd_fast.distributed.compiler import check_compiler, compile_blocks
from tvkd_fast.distributed.fill import fill, local
from tvkd_fast.distributed.launcher import launch
from tvkd_fast.distributed.once import is_main_process, print_once
from tvkd_fast.distributed.recompute import Recompute, checkpoint_activations
from tvkd_fast.distributed.shard import full_tensor, full_weights, shard_policy, sync_gradients
from tvkd_fast.distributed.vocabulary import can_share_vocabulary
from tvkd_fast.distributed.world import World, check_replicas, init_distributed

__all__ = [
    "Recompute",
    "World",
    "can_share_vocabulary",
    "check_compiler",
    "check_replicas",
    "checkpoint_activations",
    "compile_blocks",
    "fill",
    "full_tensor",
    "full_weights",
    "init_distributed",
    "is_main_process",
    "launch",
    "local",
    "print_once",
    "shard_policy",
    "sync_gradients",
]
