"""What a run would take: `tvkd train --dry_run`. Memory is an estimate from shapes; nothing is loaded or downloaded.

Letters: P pairs of a micro-batch, L row length, D hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from tvkd_fast.data.formats import FILE_SUFFIXES
from tvkd_fast.models import ModelShape, load_tokenizer, model_shape
from tvkd_fast.training.build import load_dataset
from tvkd_fast.training.config import TrainConfig, micro_batching

_BYTES = {"float32": 4, "bfloat16": 2}
_HEAD_WORKSPACE = 64 * 2**20


def plan(config: TrainConfig) -> str:
    """The plan as text: models, tokens, memory by part, steps."""
    trust = config.model.trust_remote_code
    policy = model_shape(config.policy, layers=config.student_layers, trust_remote_code=trust)
    teacher = None
    if config.objective == "tvkd" and config.teacher is not None and config.scores is None:
        teacher = model_shape(config.teacher, trust_remote_code=trust)
    tokens, pairs, source = _tokens(config)
    steps = config.max_steps or (max(1, round(config.epochs * pairs / config.pairs_per_step)) if pairs else None)
    lines = [
        f"objective   {config.objective}: {_loss_line(config)}",
        f"policy      {_shape_line(policy)}",
        f"reference   {_reference_line(config)}",
        f"teacher     {_teacher_line(config, teacher)}",
        f"data        {source}",
        f"steps       {steps if steps else 'set --max_steps, or give data that can be counted'}: "
        f"{config.pairs_per_step} pairs each, {_batching_line(config)}",
    ]
    if steps:
        pairs_seen = steps * config.pairs_per_step
        flops = 6 * policy.parameters * tokens * pairs_seen
        if teacher is not None:
            flops += 2 * teacher.parameters * tokens * pairs_seen
        if config.objective != "sft" and config.scores is None:
            flops += 2 * policy.parameters * tokens * pairs_seen
        lines.append(
            f"tokens      {tokens:,.0f} a pair at most, {tokens * pairs_seen:,.0f} in all; about {flops:.1e} floating-"
            "point operations (6 a parameter and token trained, 2 scored)"
        )
    processes = _processes(config)
    held = memory(config, policy, teacher, tokens, processes)
    whose = "one process" if processes == 1 else f"each of {processes} processes"
    lines.append(f"memory      (estimated, {whose})")
    lines += [f"  {part:<24}{size / 2**30:>9.2f} GiB" for part, size in held.items()]
    lines.append(f"  {'peak, about':<24}{sum(held.values()) / 2**30:>9.2f} GiB")
    if processes > 1:
        lines.append("sent        (counted, by each process in a step of the policy)")
        sent = communication(config, policy, tokens, processes)
        lines += [f"  {part:<24}{size / 2**30:>9.2f} GiB" for part, size in sent.items()]
    return "\n".join(lines)


def _processes(config: TrainConfig) -> int:
    return int(os.environ.get("WORLD_SIZE", config.nproc))


def _shares_vocabulary(config: TrainConfig, policy: ModelShape, group: int) -> bool:
    """As `run_models.Sharing` decides it, but for families whose embedding cannot be shared."""
    if group == 1 or config.parallel.vocabulary != "auto":
        return group > 1 and config.parallel.vocabulary == "shared"
    possible = config.model.packing != "padded" and not config.parallel.cpu_offload
    return possible and group * config.tokens_per_micro_batch < policy.vocab


def _learning(config: TrainConfig, policy: ModelShape) -> int:
    """Parameters that do."""
    if config.lora.rank == 0:
        return policy.parameters
    targets = config.lora.targets
    sizes = (size for name, size in policy.linears if targets is None or name.rsplit(".", 1)[-1] in targets)
    return config.lora.rank * sum(sizes)


def _micro_batches(config: TrainConfig, tokens_per_pair: float, processes: int) -> int:
    """Of each process in a step."""
    if config.model.packing == "padded":
        return math.ceil(config.pairs_per_step / config.pairs_per_micro_batch / processes)
    return math.ceil(config.pairs_per_step * tokens_per_pair / config.tokens_per_micro_batch / processes)


def communication(config: TrainConfig, policy: ModelShape, tokens_per_pair: float, processes: int) -> dict[str, float]:
    """Bytes that a process sends in a step of the policy, and receives, in rings: (S−1)/S of all."""
    group = processes // config.parallel.replicas
    compute = 2 if config.model.autocast == "bfloat16" else _BYTES[config.model.dtype]
    count = _micro_batches(config, tokens_per_pair, processes)
    shared = _shares_vocabulary(config, policy, group)
    head = policy.vocab * policy.hidden * (1 if policy.tied else 2)
    kept = policy.vocab * policy.hidden if shared else 0
    ring = (group - 1) / group
    learning = _learning(config, policy) - (kept if config.lora.rank == 0 else 0)
    reductions = count if config.parallel.reduce == "micro_batch" else 1
    rows = min(config.tokens_per_micro_batch, config.pairs_per_step * tokens_per_pair / processes)
    # Blocks are gathered for the forward and again for the backward, the root once for both.
    parts = {
        "weights, gathered": ring * count * compute * (2 * policy.blocks + head - kept),
        "gradients, reduced": ring * reductions * 4 * learning,
    }
    if shared:
        parts["states of tokens"] = ring * count * 2 * group * rows * policy.hidden * compute
    if config.parallel.replicas > 1:
        parts["gradients, replicas"] = 2 * (1 - 1 / config.parallel.replicas) * reductions * 4 * learning / group
    return parts


def _tokens(config: TrainConfig) -> tuple[float, int, str]:
    """Tokens that a pair takes, pairs, and a line on where the figures come from."""
    source = config.data.train
    if source is None:
        raise ValueError("no train data: set --data.train")
    most = 2 * config.data.max_length
    if not (source.startswith("bundled:") or Path(source).exists() or source.endswith(FILE_SUFFIXES)):
        return (
            most,
            0,
            f"{source} (not downloaded in a dry run: every response counted at {config.data.max_length} tokens)",
        )
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("train", config.data, tokenizer, micro_batching(config))
    report = dataset.report
    prompts = 1 if config.model.packing == "shared" else 2
    total = prompts * report.prompt_tokens + report.chosen_tokens + report.rejected_tokens
    return total / report.pairs, report.pairs, str(report)


def memory(
    config: TrainConfig, policy: ModelShape, teacher: ModelShape | None, tokens_per_pair: float, processes: int
) -> dict[str, float]:
    """Bytes that each process holds at the peak, by part: an estimate from shapes."""
    size = _BYTES[config.model.dtype]
    compute = 2 if config.model.autocast == "bfloat16" else size
    packed = config.model.packing != "padded"
    rows = config.tokens_per_micro_batch if packed else config.pairs_per_micro_batch * tokens_per_pair
    # Saved by a block for its backward: about 12 hidden-sized and 4 intermediate-sized tensors a token.
    per_block = rows * (12 * policy.hidden + 4 * policy.intermediate) * compute
    activations = rows * policy.hidden * compute * policy.layers + per_block
    if config.model.activation_checkpointing != "full":
        activations = per_block * policy.layers
    group = processes // config.parallel.replicas
    learning = _learning(config, policy)
    adapters = learning if config.lora.rank else 0
    parts = {
        "policy weights": (policy.parameters + adapters) * size / group,
        "gradients": learning * size / group,
        "AdamW's two moments": 2 * learning * size / group,
        "activations": activations,
        "head's workspace": _HEAD_WORKSPACE + config.head.workspace_mb * 2**20,
    }
    if group > 1:
        head = policy.vocab * policy.hidden * (1 if policy.tied else 2)
        kept = 0
        if _shares_vocabulary(config, policy, group):
            kept = policy.vocab * policy.hidden
            # And their gradient.
            parts["states of all tokens"] = 2 * group * rows * policy.hidden * compute
        # The block that runs, and the one that is fetched meanwhile.
        parts["gathered weights"] = compute * (head - kept + 2 * policy.blocks / policy.layers)
        if config.parallel.reduce == "step" and _micro_batches(config, tokens_per_pair, processes) > 1:
            parts["whole gradients"] = 4.0 * (learning - kept if config.lora.rank == 0 else learning)
    if config.objective != "sft" and config.scores is None and not config.lora.rank:
        parts["reference weights"] = policy.parameters * size / group
    if teacher is not None:
        parts["teacher weights"] = teacher.parameters * size / group
        if config.teacher_reference is not None:
            parts["its reference's weights"] = teacher.parameters * size / group
    return {name: float(value) for name, value in parts.items()}


def _batching_line(config: TrainConfig) -> str:
    if config.model.packing == "padded":
        return f"padded, in micro-batches of {config.pairs_per_micro_batch} pairs"
    prompts = "once a pair" if config.model.packing == "shared" else "once a response"
    return f"packed in rows of {config.tokens_per_micro_batch:,} tokens, each prompt {prompts}"


def _shape_line(shape: ModelShape) -> str:
    return (
        f"{shape.name}: {shape.parameters / 1e6:,.1f} M parameters, {shape.layers} layers, hidden {shape.hidden:,}, "
        f"vocabulary {shape.vocab:,}"
    )


def _reference_line(config: TrainConfig) -> str:
    if config.objective == "sft":
        return "none (sft)"
    if config.scores is not None:
        return f"scored already, in {config.scores}"
    return config.reference or "the policy at the start"


def _teacher_line(config: TrainConfig, teacher: ModelShape | None) -> str:
    if config.objective != "tvkd":
        return f"none ({config.objective})"
    if config.scores is not None:
        return f"scored already, in {config.scores}"
    return _shape_line(teacher) if teacher is not None else "none yet: set --teacher or --scores"


def _loss_line(config: TrainConfig) -> str:
    loss = config.loss
    if config.objective == "sft":
        return "mean negative log-likelihood of the chosen responses"
    line = f"beta {loss.beta}, label_smoothing {loss.label_smoothing}"
    if config.objective == "dpo":
        return line
    scale = loss.beta if loss.value_scale is None else loss.value_scale
    return (
        f"{line}, alpha {loss.alpha}, gamma {loss.gamma}, terminal {loss.terminal}, value {scale}·LSE from "
        f"{loss.value_from} at kappa {loss.kappa}"
    )
