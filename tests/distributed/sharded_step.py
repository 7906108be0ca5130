"""The script of a process of `test_shard`: one step of a tiny policy, whole and sharded, compared."""

import sys

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from tvkd_fast.data import MicroBatching, TokenizedPair, collate_packed
from tvkd_fast.distributed import World, init_distributed, shard_policy
from tvkd_fast.distributed.shard import sync_gradients
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.training.usage import memory_by_part

SIZES = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=5.0, attn_implementation="eager"
    ),
}
PAIRS = 6


def pairs() -> list[TokenizedPair]:
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(250, (count,), generator=draw).tolist()

    return [TokenizedPair(ids(5 + i), ids(4 + i % 3), ids(3 + i % 4), True, True, f"pair {i}") for i in range(PAIRS)]


def policy_of(name: str) -> PolicyWithHead:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    return PolicyWithHead(model, packing="shared")


def step(
    policy: PolicyWithHead, batches: list, scale: int, optimizer: torch.optim.Optimizer | None = None
) -> torch.Tensor:
    """Accumulates over the micro-batches, clips and updates; the sum of its parts of the loss."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    optimizer.zero_grad()
    losses = []
    for i, batch in enumerate(batches):
        sync_gradients(policy, now=i == len(batches) - 1)
        logps = segment_sums(policy(batch), batch.cu_seqlens)
        chosen, rejected = logps.chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).sum() / PAIRS
        (loss * scale).backward()
        losses.append(loss.detach())
    clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return torch.stack(losses).sum()


def check(name: str, world: World, replicas: int, *, vocabulary: bool) -> None:
    batches = list(MicroBatching(tokens=40).batches(pairs(), range(PAIRS)))
    whole, sharded = policy_of(name), shard_policy(policy_of(name), world, vocabulary=vocabulary)
    mine = batches[world.rank :: world.size]
    mine += [collate_packed([], [])] * (-(-len(batches) // world.size) - len(mine))
    want = step(whole, batches, 1)
    before = {key: p.grad.clone() for key, p in whole.named_parameters()}
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3, fused=True)
    got = world.all_reduce(step(sharded, mine, world.size, optimizer))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    # Weights, gradients and moments: a share of each, and what does not divide.
    own = sum(memory_by_part(sharded, optimizer).values())
    all_of_it = 4 * sum(4 * parameter.numel() for parameter in whole.parameters())
    assert own <= (1.2 / (world.size / replicas)) * all_of_it
    for key, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() < parameter.numel()
        torch.testing.assert_close(parameter.full_tensor(), whole.get_parameter(key), rtol=0, atol=1e-5)
        gradient = parameter.grad.full_tensor()
        assert (gradient - before[key]).norm() <= 1e-5 * before[key].norm(), key


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu"), replicas=int(sys.argv[1]), timeout_s=120) as world:
        for name in CONFIGS:
            for vocabulary in (False, True):
                check(name, world, int(sys.argv[1]), vocabulary=vocabulary)
                if world.first:
                    print("done:", name, "shared" if vocabulary else "gathered")


if __name__ == "__main__":
    main()
