"""`tvkd score`: reference and teacher once over the data, and their numbers on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tvkd_fast.commands.caches import (
    manifest_of,
)
from tvkd_fast.commands.models import (
    FrozenModels,
    load_frozen,
    load_policy,
    precision,
    resolve_device,
    sharing_of,
    world_of,
)
from tvkd_fast.commands.refusals import check_processes
from tvkd_fast.data import PairDataset, check_token_ids, retokenize
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.distributed import World, is_main_process
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.files import at_home, written_here_alone
from tvkd_fast.models import (
    PolicyWithHead,
    fingerprint_model,
    load_stop_ids,
    load_tokenizer,
    longest_sequence,
)
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives import SCORED, Need, objectives
from tvkd_fast.ranges import POSITIVE, at_least, check_numbers, number
from tvkd_fast.scoring.adding import joined, leave_out, scores_to_keep
from tvkd_fast.scoring.cache import ScoreCache, check_score_folder
from tvkd_fast.scoring.kinds import check_kinds, token_kinds
from tvkd_fast.scoring.reward_folder import RewardMember, rewards_to_disk
from tvkd_fast.scoring.reward_model import RewardModel, load_reward_model
from tvkd_fast.scoring.score_passes import score_to_disk
from tvkd_fast.scoring.scorer import OnlineScorer
from tvkd_fast.scoring.token_codec import StatesDtype
from tvkd_fast.training.train_config import micro_batching

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROTATION = 0
"""The seed of the rotation that int8 states are kept under."""


@dataclass(kw_only=True)
class ScoreConfig:
    """The settings of one scoring pass: `tvkd score`."""

    output_dir: str
    """Folder to write the scores to."""
    policy: str
    """The policy to be trained: its tokenizer makes the tokens."""
    teacher: str | None = None
    """Teacher whose soft values to keep; none for DPO's reference alone."""
    teacher_reference: str | None = None
    """The teacher's own reference: keep the teacher's rewards instead, for loss.value_from implicit_reward."""
    reference: str | None = None
    """Reference whose log-probabilities to keep; the policy where not given."""
    reward_model: list[str] = field(default_factory=list)
    """Sequence-classification models with one label whose rewards of both responses to keep, each in its own tokens and
    chat template; --data.rewards of `tvkd train` asks for them by the last parts of their names."""
    student_layers: int | None = number(None, at_least(1))
    """As in `tvkd train`: the reference is the policy pruned to so many layers."""
    kappa: float = number(1.0, POSITIVE)
    """κ of the soft values; alpha, gamma, terminal and value_scale can be chosen later."""
    keep: list[str] = field(default_factory=lambda: ["values"])
    """The teacher's numbers to keep: `values` (sums, or rewards with teacher_reference), `logps` of the responses, and
    of every response token its distribution: whole as `states`, the 50 most probable tokens as `topk:50`, 50 draws as
    `sampled:50`. What a folder holds already of the same data and models is kept and not computed again."""
    states_dtype: StatesDtype = "int8"
    """Dtype of kept states: int8 under a rotation that the kept head has as well, or bfloat16 for twice the bytes."""
    which: Literal["train", "eval"] = "train"
    """Which of data.train and data.eval to score."""
    value_dtype: Literal["float32", "float16"] = "float32"
    """Dtype in which the teacher's sums are kept: 4 or 2 bytes per response state, twice that where kappa is not 1."""
    pairs_per_shard: int = number(512, at_least(1))
    """Pairs per file: a pass that was killed resumes after the last complete one."""
    tokens_per_micro_batch: int = number(2048, at_least(1))
    """Most tokens that go through a model at once, of whole pairs."""
    pairs_per_micro_batch: int = number(8, at_least(1))
    """The same in pairs, where model.packing is `padded`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; pairs and weights are shared among them."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        if self.teacher_reference is not None and self.teacher is None:
            raise ValueError("--teacher_reference is the reference of a teacher: set --teacher")
        if not self.keep:
            raise ValueError("keep names nothing: set --keep [values], [logps] or [values,logps]")
        names = [last_part(name) for name in self.reward_model]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two reward models are called {twice}, by which their rewards are told apart: rename one")
        check_kinds(self.keep)
        if self.teacher is None and token_kinds(self.keep):
            raise ValueError(f"--keep {' '.join(token_kinds(self.keep))} is of a teacher: set --teacher")


def score(config: ScoreConfig, *, show_progress: bool = True) -> ScoreCache:
    """`tvkd score`: run reference and teacher once over the data and keep their scores."""
    folder = Path(config.output_dir)
    check_score_folder(folder)
    with world_of(config) as world, written_here_alone(folder) if world.first else nullcontext():
        return _score(config, world, verbose=show_progress and world.first)


def _score(config: ScoreConfig, world: World, *, verbose: bool) -> ScoreCache:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset(
        config.which,
        config.data,
        tokenizer,
        micro_batching(config),
        stop_ids=stops,
        verbose=verbose,
        read=config.data.reader(rewards=False, labels=None),
    )
    # Before other models: of a reward model is known whether it can be read, and it is let go of again.
    readers = [reward_reader(name, dataset, tokenizer, config) for name in config.reward_model]
    sharing = sharing_of(config, world)
    if token_kinds(config.keep) and config.parallel.vocabulary == "auto":
        # No process has whole logits, or the head to keep, while the vocabulary is shared.
        sharing = replace(sharing, parallel=replace(config.parallel, vocabulary="gathered"))
    models = load_frozen(config, tokenizer, kappa=config.kappa, of_teacher=config.keep, sharing=sharing)
    if models.reference is None:
        models.reference = load_policy(
            config.policy, config.model, layers=config.student_layers, sharing=sharing, frozen=True
        )
    scorer = models.scorer(dataset, config, verbose=verbose)
    dataset.texts.clear()
    cache = _of_frozen(config, dataset, tokenizer, models, scorer, world, verbose)
    del models, scorer
    if readers:
        rewards_to_disk(
            dataset,
            readers,
            config.output_dir,
            pairs_per_shard=config.pairs_per_shard,
            world=world,
            progress=verbose,
        )
    return cache


def _of_frozen(
    config: ScoreConfig,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    models: FrozenModels,
    scorer: OnlineScorer,
    world: World,
    verbose: bool,
) -> ScoreCache:
    """The numbers of reference and teacher."""
    assert isinstance(models.reference, PolicyWithHead)
    manifest = manifest_of(
        dataset,
        tokenizer,
        scorer,
        **models.teacher_fingerprints(),
        reference=fingerprint_model(models.reference.model),
        kappa=config.kappa,
        model=config.model,
    )
    manifest = replace(manifest, value_dtype=config.value_dtype)
    if "states" in config.keep:
        rotation = ROTATION if config.states_dtype == "int8" else None
        manifest = replace(manifest, states_dtype=config.states_dtype, rotation=rotation)
    held = scores_to_keep(config.output_dir, dataset, manifest) if world.first else None
    names, manifest = world.broadcast(((), manifest) if held is None else (held.numbers, joined(held, manifest)))
    if not leave_out(scorer, names):
        return ScoreCache.load(config.output_dir, dataset)
    return score_to_disk(
        dataset,
        scorer,
        manifest,
        config.output_dir,
        pairs_per_shard=config.pairs_per_shard,
        batching=micro_batching(config),
        world=world,
        progress=verbose,
        held=held,
    )


def reward_reader(
    name: str, dataset: PairDataset, tokenizer: PreTrainedTokenizerBase, config: ScoreConfig
) -> tuple[RewardMember, Callable[[], RewardModel]]:
    """What identifies a model's rewards, and what loads it with the dataset in its tokens, in every process.

    Raises the errors of loading at once.
    """
    trust = config.model.trust_remote_code
    load = partial(load_reward_model, name, dtype=getattr(torch, config.model.dtype), trust_remote_code=trust)
    model = load()
    own = retokenize(
        dataset,
        tokenizer,
        load_tokenizer(name, trust_remote_code=trust),
        max_length=longest_sequence(model.config),
        chat_template=config.data.chat_template,
        other_chat_template=config.data.teacher_chat_template,
        stop_ids=load_stop_ids(config.policy, trust_remote_code=trust),
        other_stop_ids=load_stop_ids(name, trust_remote_code=trust),
    )
    check_token_ids(own, model.get_input_embeddings().num_embeddings)
    autocast = torch.bfloat16 if config.model.autocast == "bfloat16" else None
    member = RewardMember(last_part(name), fingerprint_model(model), own.fingerprint, precision(config.model))
    device = resolve_device(config.model)
    return member, lambda: RewardModel(load(device=device), own, config.tokens_per_micro_batch, autocast)


def last_part(name: str) -> str:
    """The last part of a hub name or of a folder."""
    return Path(name).name


def check(config: ScoreConfig) -> None:
    """The checks that need no process group, before several processes are started."""
    check_score_folder(Path(config.output_dir))
    check_processes(config)


def run(config: ScoreConfig) -> None:
    """Score, and print a description of the scores."""
    manifest = score(config).manifest
    if not is_main_process():
        return
    print(f"scored {manifest.pairs:,} pairs ({manifest.states:,} states, kappa {manifest.kappa}): {config.output_dir}")
    for name in config.reward_model:
        print(f"rewards of {last_part(name)}: --data.rewards [{last_part(name)}]")
    if config.teacher is None:
        plain = [name for name, cls in objectives().items() if cls().needs & SCORED == {Need.REFERENCE}]
        names = f"{', '.join(plain[:-1])} or {plain[-1]}"
        print(f"no --teacher was given: this is the reference alone, for --objective {names}")
