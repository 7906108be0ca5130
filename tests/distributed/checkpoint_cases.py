"""The script of a process of `test_checkpoint`: saves of two processes that go well, are damaged, and are refused."""

import resource
import signal
import sys
import warnings
from pathlib import Path

import torch
from sharded_step import PAIRS, pairs, policy_of, step

from tvkd_fast.data import MicroBatching
from tvkd_fast.distributed import World, full_tensor, init_distributed, shard_policy
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.training.checkpoint import CheckpointError, Checkpoints
from tvkd_fast.training.optim import OptimConfig, make_optimizer


def weights(policy: PolicyWithHead) -> list[torch.Tensor]:
    return [full_tensor(parameter).detach().clone() for parameter in policy.parameters()]


def train(policy: PolicyWithHead, optimizer: torch.optim.Optimizer, world: World) -> None:
    batches = MicroBatching(tokens=60).share(pairs(), range(PAIRS), rank=world.rank, size=world.size)
    step(policy, batches, world.size, optimizer)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with init_distributed(torch.device("cpu"), timeout_s=120) as world:
        policy = shard_policy(policy_of("llama, tied"), world)
        optimizer = make_optimizer(policy, OptimConfig(lr=1e-2))
        checkpoints = Checkpoints(folder, world, keep=3)
        train(policy, optimizer, world)
        first = weights(policy)
        checkpoints.save(1, policy, optimizer, {"note": 7})
        # While it is being saved.
        train(policy, optimizer, world)
        second = weights(policy)
        checkpoints.save(2, policy, optimizer, {})
        checkpoints.wait()
        for path, want in ((folder / "step-000001", first), (folder / "step-000002", second)):
            checkpoints.load(path, policy, optimizer)
            assert all(torch.equal(a, b) for a, b in zip(weights(policy), want, strict=True)), path
        train(policy, optimizer, world)
        third = weights(policy)
        checkpoints.load(folder / "step-000002", policy, optimizer)
        train(policy, optimizer, world)
        assert all(torch.equal(a, b) for a, b in zip(weights(policy), third, strict=True))
        print("saved and loaded", flush=True)

        if world.first:
            shard = folder / "step-000002" / "shard-00002-model-00001-of-00001.safetensors"
            content = shard.read_bytes()
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        world.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert checkpoints.newest() == folder / "step-000001"
        print([str(warning.message) for warning in caught], flush=True)

        if world.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            checkpoints.save(3, policy, optimizer, {})
            checkpoints.wait()
        except CheckpointError as error:
            print(error, flush=True)
        # What a process leaves as it ends is no checkpoint: what coverage saw, above all.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
        checkpoints.close()


if __name__ == "__main__":
    main()
