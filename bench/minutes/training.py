"""Step 7: a whole training step of DPO, ours and with logits, of a model of Llama-3.2-1B's shape with random weights.

Eight pairs of 512 tokens, a prompt of 128 and two responses of 384; bfloat16, AdamW, one micro-batch, no checkpointing.
Tokens are those of prompts and responses, each prompt counted once, whichever way a trainer reads it.

Letters: P pairs, 2P responses, N response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.checker import largest
from bench.minutes.cases import Case, Row, Scale, judged

LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 500000.0,
}
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
PAIRS, PROMPT, RESPONSE = 8, 128, 384
TINY_PAIRS, TINY_PROMPT, TINY_RESPONSE = 2, 3, 5
BETA, LR, CLIP = 0.1, 1e-6, 1.0
ROUNDS = 5
ROWS = 512
"""Tokens whose logits the check holds at once."""
NATS = 2.0
"""What a response's log-probability may be off in 16 bits, of some 4,500 nats; in float32 a thousandth of it."""
LIMIT = 40.0
PEAK_FLOPS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}
"""Dense bfloat16 operations per second that the maker gives, by a part of the device's name."""


def cases(scale: Scale) -> list[Case]:
    return [
        Case(name="tvkd_fast, shared prompts", run=partial(step, scale, ours, "shared"), limit=LIMIT),
        Case(name="tvkd_fast, padded rows", run=partial(step, scale, ours, "padded"), limit=LIMIT),
        Case(name="logits, padded rows", run=partial(step, scale, with_logits, "padded"), limit=LIMIT, peer=True),
    ]


def random_model(scale: Scale) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**scale.of(LLAMA, TINY), tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device(scale.device):
        return AutoModelForCausalLM.from_config(config, dtype=scale.of(torch.bfloat16, torch.float32)).train()


def random_batch(scale: Scale, packing: str) -> Any:
    """A `PairBatch` of pairs of equal lengths, packed or padded."""
    from tvkd_fast.data import TokenizedPair, collate_packed, collate_pairs

    count, prompt, response = scale.of((PAIRS, PROMPT, RESPONSE), (TINY_PAIRS, TINY_PROMPT, TINY_RESPONSE))
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(scale.of(LLAMA, TINY)["vocab_size"], (length,), generator=draw).tolist()

    pairs = [TokenizedPair(ids(prompt), ids(response), ids(response), True, True, f"pair {i}") for i in range(count)]
    collate = collate_packed if packing == "shared" else collate_pairs
    return collate(pairs, range(count)).to(scale.device)


Made = tuple[Callable[[], object], float, Row]
"""A step to time, the floating-point operations of one, and the row of its check."""


def ours(scale: Scale, packing: Any) -> Made:
    """`train_step` of DPO, whose log-probabilities are checked by float64 over the model's own states."""
    from bench.step.contenders import KnownScores
    from tvkd_fast.models import PolicyWithHead
    from tvkd_fast.objectives.dpo import DPO
    from tvkd_fast.training.optim import OptimConfig, make_optimizer
    from tvkd_fast.training.step import train_step
    from tvkd_fast.training.usage import StepFlops

    batch = random_batch(scale, packing)
    # Probes are of the family, which the tests probe, and would take time of the step.
    policy = PolicyWithHead(random_model(scale), packing=packing, probe=False)
    optimizer = make_optimizer(policy, OptimConfig(lr=LR, clip_norm=CLIP))
    scores = KnownScores(torch.zeros(batch.num_pairs, 2, device=scale.device))
    with torch.no_grad():
        found = policy(batch)
        states, weight = policy.hidden(batch, batch.predicting), policy.head.weight
        exact = torch.cat(
            [
                (h.double() @ weight.double().T).log_softmax(1).gather(1, y[:, None])[:, 0]
                for h, y in zip(states.split(ROWS), batch.labels.split(ROWS), strict=True)
            ]
        )
    sums = [torch.stack([x.double().sum() for x in logps.split(batch.lengths.tolist())]) for logps in (found, exact)]
    checked = judged({"responses, nats": largest(*sums)}, NATS * (1.0 if scale.dtypes[0] == torch.bfloat16 else 1e-3))
    run = partial(train_step, policy, scores, [batch], optimizer, DPO(beta=BETA), clip_norm=CLIP)
    return run, StepFlops(policy).of(batch.num_tokens, batch.labels.numel()), checked


def with_logits(scale: Scale, packing: str) -> Made:
    """The same step as it is written without us: the model's own head over the states that predict a response."""
    from torch.nn.functional import logsigmoid
    from torch.nn.utils import clip_grad_norm_

    batch, model = random_batch(scale, packing), random_model(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    pair_of = torch.arange(2 * batch.num_pairs, device=scale.device).repeat_interleave(batch.lengths)

    def logps() -> Tensor:
        """(2P,) summed log-probabilities."""
        states = model.model(batch.input_ids).last_hidden_state.flatten(0, 1)[batch.predicting]
        by_token = model.lm_head(states).float().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return by_token.new_zeros(2 * batch.num_pairs).index_add(0, pair_of, by_token)

    def run() -> None:
        chosen, rejected = logps().chunk(2)
        (-logsigmoid(BETA * (chosen - rejected))).mean().backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    weights = sum(x.numel() for x in model.model.layers.parameters() if x.dim() > 1)
    flops = 6.0 * (weights * batch.num_tokens + model.lm_head.weight.numel() * batch.labels.numel())
    return run, flops, {}


def step(scale: Scale, make: Callable[[Scale, str], Made], packing: str) -> Row:
    """Time of a step, pairs' tokens per second, peak memory, and the share of the device's published rate."""
    run, flops, row = make(scale, packing)
    if "wrong" in row:
        return row
    taken = scale.milliseconds({"step": run}, ROUNDS)
    return row | (figures(run, flops, taken["step"]) if taken else {"shown": "ran, not timed"})


def figures(run: Callable[[], object], flops: float, ms: float) -> Row:
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    tokens = PAIRS * (PROMPT + 2 * RESPONSE)
    found: Row = {"ms": ms, "tokens_per_s": 1e3 * tokens / ms, "peak_mb": torch.cuda.max_memory_allocated() / 2**20}
    device = torch.cuda.get_device_name()
    rates = [rate for name, rate in PEAK_FLOPS.items() if name in device]
    return found | ({"mfu": flops / (ms / 1e3) / rates[0]} if rates else {})
