"""The refusals of a run before it loads a weight, shared by `tvkd train` and its dry run."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

from tvkd_fast.data import PairDataset, check_positions, check_token_ids
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.distributed import check_compiler, check_replicas
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.models import Lora, PolicyWithHead, add_lora, empty_of_family, load_tokenizer, longest_sequence
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.objectives import SCORED, TEACHER, Need
from tvkd_fast.objectives.contract import NOT_CACHED
from tvkd_fast.ranges import changed
from tvkd_fast.training.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_run(config: TrainConfig) -> None:
    """Raise ValueError where the settings do not fit together, whatever the models and the data are."""
    processes = int(os.environ.get("WORLD_SIZE", config.nproc))
    config.check_keep_best()
    check_device(config.model)
    check_replicas(config.parallel.replicas, processes)
    for name in config.trackers:
        if not _is_installed(name):
            raise ValueError(f"{name} is not installed: pip install {name}, or leave it out of --trackers")
    check_lora(config.lora, processes=processes, layers=config.student_layers)
    check_distributions(config)
    check_selected(config.data)
    check_rollout(config)
    if config.loss.trains_beside and processes > 1:
        raise ValueError(
            f"{config.objective} trains weights beside the policy's, which one process holds: set --nproc 1, or choose "
            "another --objective"
        )
    if config.loss.teacher_lora is not None:
        _check_online(config)
    if config.loss.changes_input and config.scores is not None:
        raise ValueError(
            f"{config.objective} changes the input of every step, and scores on disk are of the data as it is: leave "
            "--scores out, and set --teacher"
        )
    if config.needs & TEACHER and config.teacher is None and config.scores is None:
        other = None if config.data.selection is not None else config.loss.without(TEACHER)
        whose = config.objective if config.loss.needs & TEACHER else "--data.select"
        raise ValueError(
            f"{whose} needs a teacher: set --teacher, or --scores to a folder made by `tvkd score`"
            f"{'' if other is None else f'; --objective {other.name} needs none'}"
        )


def check_distributions(config: TrainConfig) -> None:
    """Raise ValueError where an objective over whole distributions is asked for what it has not."""
    if config.loss.joint and config.head.grad_mode != "exact":
        raise ValueError(
            f"{config.objective} compares whole distributions, of which there are exact gradients alone: set "
            "--head.grad_mode exact"
        )
    if config.loss.whole_head and config.parallel.vocabulary == "shared":
        raise ValueError(
            f"{config.objective} compares whole distributions, and no process has them while the vocabulary is shared: "
            "set --parallel.vocabulary gathered"
        )
    lacking = [need for need in Need if need in config.loss.needs & NOT_CACHED]
    if lacking and config.scores is not None:
        raise ValueError(
            f"{config.objective} needs {lacking[0].value}, which no folder of scores holds: leave --scores and "
            "--eval_scores out"
        )


def check_selected(data: DataConfig) -> None:
    """Raise ValueError where the rule of a selection is set, and nothing is selected."""
    unread = [name for name in changed(data) if name in ("select_ratio", "select_temperature")]
    if data.selection is None and unread:
        raise ValueError(
            f"no pairs are selected, and {unread[0]} would be ignored: set --data.select to learnability or "
            f"easy_reference, or leave --data.{unread[0]} out"
        )


def check_rollout(config: TrainConfig) -> None:
    """Raise ValueError where a run cannot learn from samples of its policy, or its objective needs more of them."""
    share, rollout, name = config.sampled_share, config.rollout, config.objective
    if Need.SAMPLER_LOGPS in config.loss.needs and share < 1:
        raise ValueError(
            f"{name} weighs its samples by their log-probabilities when they were drawn, which the data's responses "
            "have not: set --rollout.share 1, or choose opd"
        )
    if not share:
        unread = [setting for setting in changed(rollout) if setting != "share"]
        if unread:
            raise ValueError(
                f"{name} samples nothing at share 0, and rollout.{unread[0]} would be ignored: set --rollout.share "
                f"above 0, or leave --rollout.{unread[0]} out"
            )
        return
    if not config.loss.on_policy and config.loss.needs.isdisjoint(SCORED):
        raise ValueError(
            f"{name} reads no other model, and there is nothing to learn from the policy's own samples by it: leave "
            "--rollout.share out, or choose an objective with a teacher, such as opd, reverse_kl or jsd"
        )
    if config.data.selection is not None:
        raise ValueError(
            "pairs are selected by their responses, and the run has yet to sample them: leave --data.select out"
        )
    if not config.loss.needs.isdisjoint({Need.REJECTED, Need.LABELS}):
        raise ValueError(
            f"{name} compares two responses, and a run samples single ones: set --rollout.share 0, or choose an "
            "objective over single responses, such as opd, reverse_kl or jsd"
        )
    if config.scores is not None:
        raise ValueError(
            "samples that the run has yet to draw have no scores on disk: leave --scores out and set --teacher"
        )
    if config.model.compile:
        raise ValueError(
            "a compiled block would be compiled anew for every token that is sampled: leave --model.compile out"
        )
    if config.loss.on_policy and not rollout.any_law and rollout.bent:
        raise ValueError(
            f"{name} needs samples of the policy's own law, and {' and '.join(rollout.bent)} would bend it: set "
            "--rollout.temperature 1, --rollout.top_p 1 and --rollout.top_k 0, or accept the bias by --rollout.any_law "
            "true"
        )


def _check_online(config: TrainConfig) -> None:
    """Raise ValueError where a teacher that learns would be read from disk, or cannot have adapters."""
    for name in ("scores", "eval_scores"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{config.objective} trains adapters in the teacher, and scores on disk are of the teacher before: "
                f"leave --{name} out, and set --teacher"
            )
    if not _is_installed("peft"):
        raise ValueError("LoRA is peft's: pip install 'tvkd_fast[lora]'")


class _Processes(Protocol):
    model: ModelConfig
    parallel: ParallelConfig
    nproc: int


def check_processes(config: _Processes) -> None:
    """Raise ValueError where the device is none, or the processes cannot be divided into replicas."""
    check_device(config.model)
    check_replicas(config.parallel.replicas, config.nproc)


def check_device(config: ModelConfig) -> None:
    """Raise ValueError where `device` is the name of none, and where torch.compile is asked for and cannot run; whether
    the device is here is `resolve_device`'s to find."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(f"{config.device!r} is no device: set --model.device to auto, cpu, cuda or cuda:N")
    # A run that is planned here for a GPU elsewhere has its compiler there.
    if config.compile and (device.type == "cpu" or torch.cuda.is_available()):
        check_compiler(device)


def check_lora(lora: LoraConfig, *, processes: int, layers: int | None) -> None:
    """Raise ValueError where adapters cannot be made whatever the model is."""
    if lora.rank and not _is_installed("peft"):
        raise ValueError("LoRA is peft's: pip install 'tvkd_fast[lora]'")
    if lora.quantize != "no" and (processes > 1 or layers is not None):
        what, remedy = "shared among processes", "--nproc 1"
        if layers is not None:
            what, remedy = "pruned", "--policy to a student that is pruned already, and no student_layers"
        raise ValueError(f"a backbone in four bits cannot be {what}: set {remedy}, or leave --lora.quantize out")


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None


def check_family(config: TrainConfig) -> None:
    """Raise ValueError where the policy's family takes no packed rows or adapters, or does not fit the objective; its
    weights are not needed for that."""
    trust = config.model.trust_remote_code
    model = empty_of_family(config.policy, layers=config.student_layers, trust_remote_code=trust)
    policy = PolicyWithHead(model, packing=config.model.packing, probe=False)
    if config.lora.rank:
        add_lora(policy, lora_of(config.lora))
    config.loss.check_policy(policy)


def lora_of(config: LoraConfig) -> Lora:
    """Rank, scale and places of a run's adapters."""
    return Lora(config.rank, 2.0 * config.rank if config.alpha is None else config.alpha, config.targets)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, config: ModelConfig, *, whose: str) -> None:
    """Raise ValueError where the reference `name` has another tokenizer than the model whose tokens it is asked
    about."""
    other = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    odd = next((t for t in ours if theirs.get(t) != ours[t]), None) or next(t for t in theirs if t not in ours)
    raise ValueError(
        f"the {whose}'s reference {name} has another tokenizer than the {whose} ({len(theirs):,} tokens against "
        f"{len(ours):,}; they differ at {odd!r}): what it says would be of other tokens. Choose a reference of the "
        f"{whose}'s family"
    )


def check_sampled_tokens(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where a teacher is to read what the policy samples, and a token of the policy's, or its id, is
    none of the teacher's. Tokens that the teacher has besides, and rows that pad its head, are in nobody's way."""
    if not config.sampled_share or config.teacher is None or not config.needs & TEACHER:
        return
    theirs = load_tokenizer(config.teacher, trust_remote_code=config.model.trust_remote_code).get_vocab()
    odd = next((token for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i), None)
    if odd is not None:
        raise ValueError(
            f"the teacher {config.teacher} reads what the policy samples token by token, and has another tokenizer "
            f"(they differ at {odd!r}): choose a teacher of the policy's tokenizer, or set --rollout.share 0 and an "
            "objective over a teacher's values or log-probabilities"
        )


def check_readable(dataset: PairDataset, policy: PolicyWithHead, whose: str) -> None:
    """Raises a ValueError that names the first row which the model cannot read: a token it does not have, or more of
    them than it has positions."""
    check_token_ids(dataset, policy.vocab_size)
    check_positions(dataset, longest_sequence(policy.model.config), whose)
