"""`tvkd train --dry_run`: what a run would need, counted from shapes and data. No weights are loaded or downloaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tvkd_fast.commands.caches import expected_of_settings, load_pairs, open_scores
from tvkd_fast.commands.prepare import room_of
from tvkd_fast.commands.refusals import check_family, check_run, check_same_tokenizer
from tvkd_fast.data import PairDataset, check_positions, check_token_ids, pairs_of_epochs
from tvkd_fast.data.order import check_step
from tvkd_fast.data.reading.splits import FILE_SUFFIXES
from tvkd_fast.files import check_folder
from tvkd_fast.models import (
    ModelShape,
    load_stop_ids,
    load_tokenizer,
    longest_sequence,
    model_config,
    model_shape,
)
from tvkd_fast.models.load import PACKAGED
from tvkd_fast.objectives import SCORED, TEACHER, Need
from tvkd_fast.planning.footprint import Footprint, PairTokens, compares
from tvkd_fast.rollout.prompts import prompt_dataset
from tvkd_fast.training.final import ADAPTER, FINAL
from tvkd_fast.training.train_config import TrainConfig
from tvkd_fast.training.usage import process_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
_KEPT_BY_MALLOC = 0.25
"""Share of the allocated memory that the C library's heap keeps beside it as holes (`bench/runs/planned.py`)."""

_LOADED_LATER = 0.15 * GIB
"""Memory of models, optimizer and threads that a dry run has not loaded (measured likewise)."""


def plan(config: TrainConfig) -> str:
    """Return the plan as text: models, tokens, memory by part, steps. Raises ValueError for what the run itself would
    refuse, as far as that can be found without weights and downloads."""
    check_run(config)
    check_folder(config.output_dir, holds=(FINAL, ADAPTER))
    check_family(config)
    trust = config.model.trust_remote_code
    policy = model_shape(config.policy, layers=config.student_layers, trust_remote_code=trust)
    teacher = None
    if config.needs & TEACHER and config.teacher is not None and config.scores is None:
        teacher = model_shape(config.teacher, trust_remote_code=trust)
    tokens, pairs, source = _tokens(config, policy)
    share = config.sampled_share
    # In the mean, and of a step that samples.
    responses = config.pairs_per_step * (1 + share * (config.rollout.n - 1))
    most = config.pairs_per_step * (config.rollout.n if share else 1)
    passes = pairs_of_epochs(config.epochs, pairs) / config.pairs_taken if pairs else None
    steps = config.max_steps or (math.ceil(passes) if passes else None)
    learned = replace(config, pairs_per_step=most)
    found = Footprint(learned, policy, teacher, tokens, int(os.environ.get("WORLD_SIZE", config.nproc)))
    per_step = responses * tokens.of(config.model.packing, compares(config))
    operations = found.arithmetic() * responses / most
    lines = [
        f"objective   {config.objective}: {config.loss.describe()}",
        f"policy      {_shape_line(policy)}",
        f"reference   {_reference_line(config)}",
        f"teacher     {_teacher_line(config, teacher)}",
        f"data        {source}",
        f"steps       {steps if steps else 'set --max_steps, or give data that can be counted'}: "
        f"{config.pairs_per_step} pairs each, {_batching_line(config)}",
        f"a step      {per_step:,.0f} tokens{'' if pairs else ' at most'}, {operations:.2e} floating-point operations",
    ]
    if config.sampled_share:
        lines.insert(-2, _rollout_line(config))
    if steps:
        taken = config.max_steps or passes or 0
        lines[-1] += f"; in all {taken * per_step:,.0f} and {taken * operations:.2e}"
    return "\n".join([*lines, *_memory_lines(found)])


def _rollout_line(config: TrainConfig) -> str:
    rollout = config.rollout
    share = "" if config.sampled_share == 1 else f" in {config.sampled_share:.0%} of the steps"
    return (
        f"rollout     responses per prompt: {rollout.n}, of at most {rollout.max_new_tokens} tokens{share}; the "
        "sampler's own passes are not counted"
    )


def _memory_lines(found: Footprint) -> Iterator[str]:
    whose = "the process" if found.processes == 1 else f"each of {found.processes} processes"
    moment, held = _held(found)
    yield f"memory      of {whose} at its peak, {moment}"
    peak = sum(held.values())
    yield from _sizes(held | {"in all": peak})
    memory = _device_memory(found.config)
    if memory is not None:
        (line,) = _sizes({"available": memory})
        yield f"{line}: {_verdict(found, peak, memory)}"
    else:
        yield "            --device_memory_gib N says whether that fits, and what would"
    if found.config.model.device == "auto" and not _on_gpu(found.config):
        yield "            counted for a CPU, since there is no GPU here: --model.device cuda counts for one"
    elsewhere = found.host_memory()
    if elsewhere and _on_gpu(found.config):
        yield "offloaded   by each process to its host's memory"
        yield from _sizes(elsewhere)
    if found.processes > 1:
        yield "sent        by each process in a step of the policy"
        yield from _sizes(found.communication())


def _sizes(parts: Mapping[str, float]) -> list[str]:
    return [f"  {part:<24}{size / GIB:>9.2f} GiB" for part, size in parts.items()]


def _held(found: Footprint) -> tuple[str, dict[str, float]]:
    moment, held = found.memory()
    return moment, held if _on_gpu(found.config) else on_a_cpu(found.config, held | found.host_memory())


def on_a_cpu(config: TrainConfig, held: dict[str, float]) -> dict[str, float]:
    """Add the memory of a CPU process that the run did not ask for: libraries, data, and what malloc keeps."""
    more = {"Python, libraries, data": _LOADED_LATER + process_bytes("VmRSS")}
    if not config.model.return_memory:
        more["freed, kept by malloc"] = _KEPT_BY_MALLOC * sum(held.values())
    return held | more


def _verdict(found: Footprint, peak: float, memory: float) -> str:
    if peak <= memory:
        return f"it fits, {1 - peak / memory:.0%} to spare"
    fitting = [name for name, one in _smaller(found) if sum(_held(one)[1].values()) <= memory]
    remedy = f"what would: {', or '.join(fitting)}" if fitting else "nor would what is cheap to try"
    return f"it does not fit; {remedy}"


def _smaller(found: Footprint) -> Iterator[tuple[str, Footprint]]:
    """Yield changes of the run that need less memory, the cheapest first."""
    config = found.config
    full = replace(config, model=replace(config.model, activation_checkpointing="full"))
    yield "--model.activation_checkpointing full", replace(found, config=full)
    if config.model.packing != "padded":
        half = config.tokens_per_micro_batch // 2
        yield f"--tokens_per_micro_batch {half}", replace(found, config=replace(config, tokens_per_micro_batch=half))
    if config.scores is None and config.needs & SCORED:
        scored = replace(config, scores="scores of `tvkd score`")
        yield "scores on disk (tvkd score, --scores)", replace(found, config=scored, teacher=None)
    if config.lora.rank == 0:
        lora = replace(config, lora=replace(config.lora, rank=16))
        yield "--lora.rank 16", replace(found, config=lora)
    if found.processes > 1 and not config.parallel.cpu_offload and _on_gpu(config):
        offloaded = replace(config, parallel=replace(config.parallel, cpu_offload=True))
        yield "--parallel.cpu_offload true", replace(found, config=offloaded)
    if not _on_gpu(config) and not config.model.return_memory:
        returned = replace(config, model=replace(config.model, return_memory=True))
        yield "--model.return_memory true", replace(found, config=returned)
    yield f"--nproc {2 * found.processes}", replace(found, processes=2 * found.processes)


def _on_gpu(config: TrainConfig) -> bool:
    device = config.model.device
    return torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"


def _device_memory(config: TrainConfig) -> float | None:
    """Return the memory of a process's device in bytes: as configured, or that of the GPU found here."""
    if config.device_memory_gib is not None:
        return config.device_memory_gib * GIB
    if _on_gpu(config) and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _tokens(config: TrainConfig, policy: ModelShape) -> tuple[PairTokens, int, str]:
    """Return the tokens per pair, the number of pairs, and a line on where the figures come from."""
    source = config.data.train
    if source is None:
        raise ValueError("no train data: set --data.train")
    if config.sampled_share == 1 and _counted(source):
        return _prompts(config, source)
    if not _counted(source):
        longest = config.data.max_length
        return (
            PairTokens(0, longest, longest, longest),
            0,
            f"{source} (not downloaded in a dry run: every response counted at {longest} tokens)",
        )
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = _read("train", config, tokenizer, policy, config.scores)
    check_step(config.pairs_per_step, dataset, taken=config.pairs_taken)
    if config.data.eval is not None and _counted(config.data.eval):
        _read("eval", config, tokenizer, policy, config.eval_scores)
    return tokens_of(dataset), dataset.report.pairs, str(dataset.report)


def _prompts(config: TrainConfig, source: str) -> tuple[PairTokens, int, str]:
    """The same of prompts whose responses are sampled, each as long as it may be."""
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(config.policy, trust_remote_code=trust)
    stops = load_stop_ids(config.policy, trust_remote_code=trust)
    room = room_of(config, model_config(config.policy, trust_remote_code=trust))
    dataset = prompt_dataset(config.data, tokenizer, stop_ids=stops, max_length=room, verbose=False)
    check_step(config.pairs_per_step, dataset)
    lengths = [len(pair.prompt_ids) for pair in dataset]
    responses = [min(config.rollout.max_new_tokens, room - length) for length in lengths]
    longest = max(map(sum, zip(lengths, responses, strict=True)))
    tokens = PairTokens(sum(lengths) / len(dataset), sum(responses) / len(dataset), 0, longest)
    return tokens, len(dataset), f"{len(dataset):,} prompts of {source}"


def _counted(source: str) -> bool:
    """Return whether the data can be counted on this machine. A name with a file's suffix is never looked up on the
    hub."""
    return source.startswith("bundled:") or Path(source).exists() or source.endswith(FILE_SUFFIXES)


def _read(
    which: Literal["train", "eval"],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    policy: ModelShape,
    scores: str | None,
) -> PairDataset:
    """Read the pairs, and check that every model of the run that is on this machine can read them."""
    trust = config.model.trust_remote_code
    stops = load_stop_ids(config.policy, trust_remote_code=trust)
    dataset = load_pairs(which, config, tokenizer, stop_ids=stops)
    check_token_ids(dataset, policy.vocab)
    check_positions(dataset, policy.positions, "policy")
    if not config.needs & SCORED:
        return dataset
    if config.reference is not None and _is_here(config.reference):
        check_same_tokenizer(tokenizer, config.reference, config.model, whose="policy")
        check_positions(dataset, longest_sequence(model_config(config.reference, trust_remote_code=trust)), "reference")
    if config.needs & TEACHER and config.teacher is not None and _is_here(config.teacher):
        theirs = load_tokenizer(config.teacher, trust_remote_code=trust)
        if theirs.get_vocab() == tokenizer.get_vocab():
            check_positions(dataset, longest_sequence(model_config(config.teacher, trust_remote_code=trust)), "teacher")
    if scores is not None:
        read_here = config.needs if which == "train" else config.loss.needs
        open_scores(scores, config, dataset, expected_of_settings(config, tokenizer), read_here)
    return dataset


def _is_here(name: str) -> bool:
    return name in PACKAGED or Path(name).exists()


def tokens_of(dataset: PairDataset) -> PairTokens:
    report = dataset.report
    prompt, chosen, rejected = (
        total / report.pairs for total in (report.prompt_tokens, report.chosen_tokens, report.rejected_tokens)
    )
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in dataset)
    return PairTokens(prompt, chosen, rejected, longest)


def _batching_line(config: TrainConfig) -> str:
    if config.model.packing == "padded":
        return f"padded, in micro-batches of {config.pairs_per_micro_batch} pairs"
    prompts = "once per pair" if config.model.packing == "shared" else "once per response"
    return f"packed in rows of {config.tokens_per_micro_batch:,} tokens, each prompt {prompts}"


def _shape_line(shape: ModelShape) -> str:
    return (
        f"{shape.name}: {shape.parameters / 1e6:,.1f} M parameters, {shape.layers} layers, hidden {shape.hidden:,}, "
        f"vocabulary {shape.vocab:,}"
    )


def _reference_line(config: TrainConfig) -> str:
    if not config.loss.needs & {Need.REFERENCE, Need.REFERENCE_STATES}:
        return f"none ({config.objective})"
    if config.scores is not None:
        return f"scored already, in {config.scores}"
    return config.reference or "the policy at the start"


def _teacher_line(config: TrainConfig, teacher: ModelShape | None) -> str:
    if not config.needs & TEACHER:
        return f"none ({config.objective})"
    return f"scored already, in {config.scores}" if teacher is None else _shape_line(teacher)
