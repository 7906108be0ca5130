"""A policy's weights over a mesh: FSDP2, in the order below.

    1. `checkpoint_activations`: what a block keeps for its backward; around the block, so before it is a unit
       `compile_blocks`, where it is asked for: the block within
    2. `share_vocabulary`, where it is asked for: head and tied embedding are shards that stay where they are
    3. `shard_policy`: every block of the backbone is a unit, whose weights are gathered as it runs, and let go after it
    4. … and the policy itself is the root unit: embedding, final norm and head, tied or not, gathered for the whole
       forward
    5. `fill`: weights from disk, each process its own rows, where the model was made without any

What is called afterwards is the policy and nothing within it: the head's weight is a plain tensor inside the root's
forward, and a shard outside, whose gradient would be wrong.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tvkd_fast._compat import blocks_not_to_split
from tvkd_fast.distributed.vocabulary import share_vocabulary
from tvkd_fast.distributed.world import World
from tvkd_fast.models import PolicyWithHead, saved_tensors

P = TypeVar("P", bound=PolicyWithHead)


def shard_policy(
    policy: P, world: World, *, cpu_offload: bool = False, vocabulary: bool = False, reduce_always: bool = False
) -> P:
    """The policy with sharded weights, in place; as it was in a world of one.

    Gradients are *averaged* over processes: multiply a process's part of the loss by `world.size`, so that they are of
    the sum. (A factor set on FSDP2 instead is refused by gloo, or ignored.) Weights and their sums keep their dtype;
    products take the policy's `autocast`, and the gathered weights with them.

    With `vocabulary` the head stays in shards, and tokens go to them (`share_vocabulary`). With `cpu_offload` shards,
    their gradients and the optimizer live in the host's memory, and what is gathered alone is on the device. With
    `reduce_always` every micro-batch reduces its gradients, and none are held whole from one to the next. Raises
    ValueError where the backbone's blocks cannot be found, and where the vocabulary cannot be shared.
    """
    if world.mesh is None:
        return policy
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=policy.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    if cpu_offload and vocabulary:
        raise ValueError(
            "a shared vocabulary stays on the device: set --parallel.vocabulary gathered, or no cpu_offload"
        )
    shared = share_vocabulary(policy, world.mesh) if vocabulary else set()
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for block in blocks_of(policy, "train it in one process"):
        fully_shard(block, **options)
    fully_shard(policy, ignored_params=shared, **options)
    policy.register_forward_hook(_let_go_without_backward)
    policy.reduce_always = reduce_always
    return policy


def blocks_of(policy: PolicyWithHead, remedy: str) -> list[nn.Module]:
    """The backbone's transformer blocks, in their order: the modules that the family names as not to be split.

    Raises ValueError with the remedy where it names none.
    """
    names = blocks_not_to_split(policy.model)
    found = [module for module in policy.model.modules() if type(module).__name__ in names]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outer = [module for module in found if id(module) not in inner]
    if not outer:
        raise ValueError(
            f"{type(policy.model).__name__} does not say what its blocks are (_no_split_modules), so that they cannot "
            f"be taken one by one: {remedy}"
        )
    return outer


def sync_gradients(policy: nn.Module, *, now: bool) -> None:
    """Set whether the next backward reduces gradients over processes: `now`, or always if the policy was sharded so."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(now or bool(policy.reduce_always))


def _let_go_without_backward(policy: nn.Module, arguments: Any, output: Any) -> None:
    """The root stays gathered for its backward. Where none will come its weights would stay so for whoever asks next,
    an optimizer or a checkpoint among them."""
    if not torch.is_grad_enabled():
        assert isinstance(policy, FSDPModule)
        policy.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """Return the tensor that `x` is a shard of, on every process, or `x` itself where it is none. A collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_weights(policy: PolicyWithHead) -> dict[str, Tensor]:
    """Return the model's state dict in the first process's host memory, gathered weight by weight; empty in the others.

    Tied weights are in it once.
    """
    found = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = saved_tensors(policy.model)
    return {name: x for name, x in found.items() if isinstance(x, Tensor) and name in once}
