"""A run's models: the policy as its config wants it, and the frozen teacher and reference."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from tvkd_fast.commands.refusals import check_device, check_lora, check_readable, check_same_tokenizer, lora_of
from tvkd_fast.data import PairDataset, check_token_ids, packed_length, retokenize
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.distributed import (
    World,
    can_share_vocabulary,
    checkpoint_activations,
    compile_blocks,
    fill,
    init_distributed,
    shard_policy,
)
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.models import (
    EmptyModel,
    PolicyWithHead,
    TeacherWithHead,
    WithoutAdapters,
    add_lora,
    empty_model,
    fingerprint_model,
    load_model,
    load_stop_ids,
    load_tokenizer,
    longest_sequence,
    prune_layers,
    pruned_from,
    stop_ids_of,
)
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.objectives import Need, Objective
from tvkd_fast.objectives.contract import KEPT_NEEDS
from tvkd_fast.scoring.kinds import SAMPLED, TOP_K, VALUES, kind_of, token_kinds
from tvkd_fast.scoring.scorer import OnlineScorer, RewardTeacher, Teacher, TeacherTokens
from tvkd_fast.training.train_config import micro_batching
from tvkd_fast.training.usage import return_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

P = TypeVar("P", bound=PolicyWithHead)


class RunConfig(Protocol):
    """The fields that the configs of train, score and eval have in common."""

    policy: str
    reference: str | None
    teacher: str | None
    teacher_reference: str | None
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig
    tokens_per_micro_batch: int
    pairs_per_micro_batch: int


@dataclass(frozen=True)
class Sharing:
    """The layout of a run's models over its processes."""

    world: World
    parallel: ParallelConfig
    tokens: int
    """Most that a process sends through a model at once."""

    def of_vocabulary(self, policy: PolicyWithHead) -> bool:
        """Return whether the head stays in shards, and the tokens of every process are sent to it."""
        if self.parallel.vocabulary != "auto":
            return self.parallel.vocabulary == "shared"
        group = self.world.size // self.parallel.replicas
        possible = can_share_vocabulary(policy) and not self.parallel.cpu_offload
        return possible and policy.packing != "padded" and group * self.tokens < policy.vocab_size


@dataclass
class FrozenModels:
    """Reference and teacher, where there are such."""

    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    reference: PolicyWithHead | WithoutAdapters | None = None
    teacher: Teacher | None = None
    of_teacher: tuple[str, ...] = VALUES
    """What the teacher is asked for."""
    base: PolicyWithHead | None = None
    """The teacher's own reference, where its states are wanted."""
    reference_states: bool = False
    """Whether the reference's states are wanted."""
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    """None where the teacher reads the policy's tokens."""
    world: World | None = None
    """The processes that they are sharded over."""

    def known(self) -> frozenset[Need]:
        """Return the needs of an objective that these models can score."""
        found = {Need.REJECTED}
        if self.reference is not None:
            found.add(Need.REFERENCE)
        if self.teacher is not None and "values" in self.of_teacher:
            found.add(Need.TEACHER_REWARDS if isinstance(self.teacher, RewardTeacher) else Need.TEACHER_SUMS)
        if self.teacher is not None and "logps" in self.of_teacher:
            found.add(Need.TEACHER_LOGPS)
        if self.teacher is not None and "states" in self.of_teacher:
            found.add(Need.TEACHER_STATES)
        if self.teacher is not None:
            found |= {KEPT_NEEDS[kind] for kind in map(kind_of, self.of_teacher) if kind in KEPT_NEEDS}
        if self.reference is not None and self.reference_states:
            found.add(Need.REFERENCE_STATES)
        if self.base is not None:
            found.add(Need.BASE_STATES)
        return frozenset(found)

    def scorer(self, dataset: PairDataset, config: RunConfig, *, verbose: bool = False) -> OnlineScorer:
        """Return a scorer of this dataset's batches, once the models are known to be able to read them.

        `verbose` prints on stderr what the teacher reads.
        """
        if isinstance(self.reference, PolicyWithHead):
            check_readable(dataset, self.reference, "reference")
        if self.teacher is not None and self.teacher_tokenizer is None:
            for model in self.teacher.policies:
                check_readable(
                    dataset, model, "teacher" if model is self.teacher.policies[0] else "teacher's reference"
                )
        tokens = None
        if self.teacher is not None and self.teacher_tokenizer is not None:
            tokens = self._tokens(self.teacher, self.teacher_tokenizer, dataset, config)
            if tokens.dataset.fingerprint == dataset.fingerprint:
                tokens = None
            elif kinds := token_kinds(self.of_teacher):
                raise ValueError(
                    f"{' and '.join(kinds)} of this teacher would be of other tokens than the policy's, since it has "
                    "another tokenizer, and no divergence could be taken: choose a teacher of the policy's tokenizer, "
                    "or an objective over its values or log-probabilities"
                )
            elif verbose:
                print(tokens.dataset.report, file=sys.stderr)
        if self.base is not None:
            check_readable(dataset, self.base, "teacher's reference")
        return OnlineScorer(
            self.reference,
            self.teacher,
            tokens,
            self.world,
            of_teacher=self.of_teacher,
            reference_states=self.reference_states,
            base=self.base,
        )

    def _tokens(
        self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, dataset: PairDataset, config: RunConfig
    ) -> TeacherTokens:
        own = retokenize(
            dataset,
            self.tokenizer,
            tokenizer,
            max_length=min(longest_sequence(policy.model.config) for policy in teacher.policies),
            chat_template=config.data.chat_template,
            other_chat_template=config.data.teacher_chat_template,
            stop_ids=load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code),
            other_stop_ids=stop_ids_of(teacher.model),
        )
        check_token_ids(own, teacher.vocab_size)
        batching = micro_batching(config)
        # It goes forward only, so a row may be as long as its longest pair.
        longest = max(packed_length(pair, shared=batching.packing == "shared") for pair in own)
        return TeacherTokens(own, replace(batching, tokens=max(batching.tokens, longest)))

    def teacher_fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprints of the teacher and of its own reference; None for one that there is not."""
        base = self.teacher.reference if isinstance(self.teacher, RewardTeacher) else self.base
        own = None if base is None else base.model
        return {
            "teacher": None if self.teacher is None else fingerprint_model(self.teacher.model),
            "teacher_reference": None if own is None else fingerprint_model(own),
        }


def of_teacher(needs: Collection[Need]) -> tuple[str, ...]:
    """Return what a teacher has to be asked for."""
    found: list[str] = []
    if not {Need.TEACHER_SUMS, Need.TEACHER_REWARDS}.isdisjoint(needs):
        found.append("values")
    if Need.TEACHER_LOGPS in needs:
        found.append("logps")
    if Need.TEACHER_STATES in needs:
        found.append("states")
    found += [name for name in (TOP_K, SAMPLED) if KEPT_NEEDS[kind_of(name)] in needs]
    return tuple(found)


def load_policy(
    name: str,
    config: ModelConfig,
    *,
    layers: int | None = None,
    sharing: Sharing | None = None,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> PolicyWithHead:
    """A model on the run's device and in its precision, pruned to `layers` where given, and shared by processes.

    With `lora.rank` its adapters are what learns, from a start that the seed draws.
    """
    return _made(PolicyWithHead, name, config, layers, sharing, frozen=frozen, lora=lora, seed=seed)


def load_frozen(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kappa: float,
    of_teacher: Collection[str] = VALUES,
    needs: Collection[Need] = (),
    sharing: Sharing | None = None,
) -> FrozenModels:
    """The reference and the teacher that the config names, with what each must read.

    `of_teacher` is what the teacher is asked for, nothing for no teacher; of `needs` it counts whose states are wanted.
    """
    found = FrozenModels(tokenizer, world=None if sharing is None else sharing.world)
    found.reference_states = Need.REFERENCE_STATES in needs
    if config.reference is not None:
        found.reference = _load_reference(config.reference, config.model, tokenizer, sharing, whose="policy")
    if config.teacher is None or not of_teacher:
        return found
    theirs = load_tokenizer(config.teacher, trust_remote_code=config.model.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        found.teacher_tokenizer = theirs
    found.of_teacher = tuple(of_teacher)
    own = None
    if config.teacher_reference is not None:
        own = _load_reference(config.teacher_reference, config.model, theirs, sharing, whose="teacher")
    if Need.BASE_STATES in needs:
        found.base = own
    if own is not None and (found.base is None or Need.TEACHER_REWARDS in needs):
        teacher = load_policy(config.teacher, config.model, sharing=sharing, frozen=True)
        found.teacher = RewardTeacher(teacher, own)
    else:
        make = partial(TeacherWithHead, kappa=kappa)
        found.teacher = _made(make, config.teacher, config.model, None, sharing, frozen=True)
    return found


def freeze(policy: P) -> P:
    """Put the policy in evaluation mode, without gradients."""
    return policy.eval().requires_grad_(False)


def frozen_copy(policy: PolicyWithHead) -> PolicyWithHead:
    """Return a frozen copy of the policy as it is now."""
    return freeze(copy.deepcopy(policy))


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device of the run's models. Raises ValueError where that device does not exist."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    if config.return_memory:
        return_freed_memory()
    check_device(config)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: set --model.device cpu, or install a CUDA build of torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs here, and no {config.device}: set --model.device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no {config.device} device can be used ({reason}): set --model.device cpu") from error
    return device


def precision(config: ModelConfig, world: World | None = None) -> str:
    """Describe the dtypes of weights and products, as scores and checkpoints record and compare them."""
    if config.autocast == "off":
        return config.dtype
    # Sharded weights are gathered in the products' dtype, those of norms and of the embedding too.
    gathered = f", gathered in {config.autocast}" if world is not None and world.size > 1 else ""
    return f"{config.dtype}, products in {config.autocast}{gathered}"


def _made(
    make: Callable[..., P],
    name: str,
    config: ModelConfig,
    layers: int | None,
    sharing: Sharing | None,
    *,
    frozen: bool,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> P:
    """Make a model, and shard it over the processes where there are several. Each process reads its own shards alone
    where the model's files allow it; otherwise each loads the whole model first."""
    if sharing is not None and sharing.world.mesh is None:
        sharing = None
    quantize = lora is not None and lora.quantize == "nf4"
    if lora is not None:
        check_lora(lora, processes=1 if sharing is None else sharing.world.size, layers=layers)
    empty = None if sharing is None else _empty(name, config, layers)
    model = _load(name, config, layers=layers, nf4=quantize) if empty is None else empty.model
    policy = make(model, packing=config.packing, autocast=_autocast(config))
    if frozen:
        freeze(policy)
    elif lora is not None and lora.rank:
        add_lora(policy, replace(lora_of(lora), seed=str(seed)))
    if not frozen:
        checkpoint_activations(policy, config.activation_checkpointing)
    if config.compile:
        compile_blocks(policy)
    if sharing is not None:
        offload = sharing.parallel.cpu_offload
        shard_policy(
            policy,
            sharing.world,
            cpu_offload=offload,
            vocabulary=sharing.of_vocabulary(policy),
            reduce_always=sharing.parallel.reduce == "micro_batch",
        )
        if empty is not None:
            device = torch.device("cpu") if offload else sharing.world.device
            fill(policy.model, empty.places, device, seed=str(seed))
    return policy


def _empty(name: str, config: ModelConfig, layers: int | None) -> EmptyModel | None:
    empty = empty_model(
        name,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    if empty is None or layers is None:
        return empty
    student = prune_layers(empty.model, layers)
    return EmptyModel(student, {n: empty.places[old] for n, old in pruned_from(empty.model, student).items()})


def _load(name: str, config: ModelConfig, *, layers: int | None = None, nf4: bool = False) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    model = load_model(
        name,
        dtype=dtype,
        device=resolve_device(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        nf4=(_autocast(config) or dtype) if nf4 else None,
    )
    return model if layers is None else prune_layers(model, layers)


def _load_reference(
    name: str,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    sharing: Sharing | None,
    *,
    whose: str,
) -> PolicyWithHead:
    check_same_tokenizer(tokenizer, name, config, whose=whose)
    return load_policy(name, config, sharing=sharing, frozen=True)


def _autocast(config: ModelConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.autocast == "bfloat16" else None


def world_of(config: RunConfig) -> AbstractContextManager[World]:
    parallel = config.parallel
    return init_distributed(resolve_device(config.model), replicas=parallel.replicas, timeout_s=parallel.timeout_s)


def sharing_of(config: RunConfig, world: World, objective: Objective | None = None) -> Sharing:
    """Return how a run's models are laid out; an objective over whole distributions wants whole heads."""
    parallel = config.parallel
    if objective is not None and objective.whole_head and parallel.vocabulary == "auto":
        parallel = replace(parallel, vocabulary="gathered")
    return Sharing(world, parallel, config.tokens_per_micro_batch)
