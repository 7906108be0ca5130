"""A policy's weights over a mesh: FSDP2, in the order below.

    1. every block of the backbone is a unit: its weights are gathered as it runs, and let go after it
    2. the policy itself is the root unit: embedding, final norm and head, tied or not, gathered for the whole forward

What is called afterwards is the policy and nothing within it: the head's weight is a plain tensor inside the root's
forward, and a shard outside, whose gradient would be wrong.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tvkd_fast.distributed.world import World
from tvkd_fast.models import PolicyWithHead


def shard_policy(policy: PolicyWithHead, world: World) -> PolicyWithHead:
    """The policy with sharded weights, in place; as it was in a world of one.

    Gradients are *averaged* over processes: multiply a process's part of the loss by `world.size`, so that they are of
    the sum. (A factor set on FSDP2 instead is refused by gloo, or ignored.) Weights and their sums keep their dtype;
    products take the policy's `autocast`, and the gathered weights with them.

    Raises ValueError where the backbone's blocks cannot be found.
    """
    if world.mesh is None:
        return policy
    mixed = MixedPrecisionPolicy(param_dtype=policy.autocast, reduce_dtype=torch.float32)
    for block in blocks_of(policy):
        fully_shard(block, mesh=world.mesh, mp_policy=mixed)
    fully_shard(policy, mesh=world.mesh, mp_policy=mixed)
    return policy


def blocks_of(policy: PolicyWithHead) -> list[nn.Module]:
    """The backbone's transformer blocks, in their order: the modules that the family names as not to be split."""
    names = policy.model._no_split_modules or ()
    found = [module for module in policy.model.modules() if type(module).__name__ in names]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outer = [module for module in found if id(module) not in inner]
    if not outer:
        raise ValueError(
            f"{type(policy.model).__name__} does not say what its blocks are (_no_split_modules), so that they cannot "
            "be sharded one by one: train it in one process"
        )
    return outer


def sync_gradients(policy: nn.Module, *, now: bool) -> None:
    """Whether the next backward reduces gradients over processes: the last micro-batch's of a step alone does."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(now)
