"""A trainer's inputs from a training config: models, data and scores that fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvkd_fast.commands.caches import (
    OF_TEACHER,
    expected_of_models,
    fitting_cache,
    kept_per_token,
    load_pairs,
    manifest_of,
)
from tvkd_fast.commands.models import (
    FrozenModels,
    freeze,
    frozen_copy,
    load_frozen,
    load_policy,
    of_teacher,
    precision,
    sharing_of,
)
from tvkd_fast.commands.refusals import check_readable, check_sampled_tokens
from tvkd_fast.data import PairDataset
from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.distributed import World, compile_blocks
from tvkd_fast.models import (
    PolicyWithHead,
    WithoutAdapters,
    fingerprint_model,
    load_stop_ids,
    load_tokenizer,
    longest_sequence,
    model_config,
)
from tvkd_fast.models.parts.beside import draw_beside
from tvkd_fast.objectives import SCORED, TEACHER, Need
from tvkd_fast.rollout import PolicySampler, Sampler
from tvkd_fast.rollout.prompts import prompt_dataset
from tvkd_fast.scoring.score_passes import score_dataset
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer, Scorer
from tvkd_fast.training.train_config import TrainConfig, micro_batching

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_OF_REFERENCE = frozenset({Need.REFERENCE, Need.REFERENCE_STATES})


@dataclass
class Prepared:
    """The arguments of a trainer."""

    tokenizer: PreTrainedTokenizerBase
    policy: PolicyWithHead
    scorer: Scorer
    dataset: PairDataset
    held_out: PairDataset | None
    held_out_scorer: Scorer | None
    identity: dict[str, Any]
    sampler: Sampler | None = None
    selection_scorer: Scorer | None = None
    """What a selection reads, where there is one."""


def prepare(config: TrainConfig, world: World, *, verbose: bool) -> Prepared:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    check_sampled_tokens(config, tokenizer)
    if config.sampled_share == 1:
        room = room_of(config, model_config(config.policy, trust_remote_code=config.model.trust_remote_code))
        dataset = prompt_dataset(config.data, tokenizer, stop_ids=stops, max_length=room, verbose=verbose)
    else:
        dataset = load_pairs("train", config, tokenizer, stop_ids=stops, verbose=verbose)
    held_out = load_pairs("eval", config, tokenizer, stop_ids=stops, verbose=verbose) if config.data.eval else None
    policy = _policy(config, world)
    config.loss.check_policy(policy)
    for pairs in (dataset, held_out):
        if pairs is not None:
            check_readable(pairs, policy, "policy")
    identity: dict[str, Any] = {
        "policy": fingerprint_model(policy.model),
        "precision": precision(config.model, world),
    }
    if Need.REWARDS in config.loss.needs:
        identity["rewards"] = dataset.rewards_fingerprint
    scorer: Scorer = OnlineScorer(None, None)
    held_out_scorer = selection_scorer = None
    if verbose and config.unkept_evaluations:
        warnings.warn(
            f"keep_best goes by every {config.save_every // config.eval_every}th evaluation alone, which is at a "
            f"checkpoint: set --save_every {config.eval_every} for all of them",
            stacklevel=2,
        )
    if config.needs & SCORED:
        models = frozen_models(config, policy, tokenizer, world)
        scorer = online = models.scorer(dataset, config, verbose=verbose)
        online.teacher_learns = config.loss.teacher_lora is not None
        expected = expected_of_models(config, tokenizer, models, identity["policy"])
        expected["teacher_tokens"] = online.teacher_reads(dataset)
        if config.scores is not None:
            cache = fitting_cache(config.scores, config, dataset, expected, online, config.needs)
            # A folder may hold rewards beside what this run reads, and the held-out pairs' need not.
            own = Need.TEACHER_REWARDS in config.loss.needs
            compared = [name for name in OF_TEACHER if own or name != "teacher_reference"]
            expected |= {name: getattr(cache.manifest, name) for name in compared}
            scorer = CachedScorer(cache, kept_per_token(config.loss.needs))
        selection_scorer = scorer if config.data.selection is not None else None
        if selection_scorer is online:
            scorer = online.asking(of_teacher(config.loss.needs))
        if held_out is not None:
            held_out_scorer = held_out_scorer_of(config, policy, models, held_out, tokenizer, expected, world, verbose)
        identity |= {name: expected[name] for name in ("reference", *OF_TEACHER)}
        if config.loss.trains_beside:
            one = next(iter(micro_batching(config).batches(dataset, range(1))))
            config.loss.attach(policy, models.teacher, lambda: scorer.of(one.to(world.device)))
            draw_beside(policy, config.seed)
        if config.scores is not None:
            # What was loaded to be compared or to score the held-out pairs is not needed any longer.
            models.reference = models.teacher = online.reference = online.teacher = None
    for pairs in (dataset, held_out):
        if pairs is not None:
            # Only another tokenizer's tokens are made of them, and those are made.
            pairs.texts.clear()
    sampler = sampler_of(config, policy, PairTokenizer(tokenizer, stop_ids=stops).ends.generation_stops, world)
    return Prepared(tokenizer, policy, scorer, dataset, held_out, held_out_scorer, identity, sampler, selection_scorer)


def room_of(config: TrainConfig, model: PretrainedConfig) -> int:
    """The most tokens of a prompt and a response that the policy samples: as many as its rows and positions hold."""
    rows = [config.tokens_per_micro_batch] if config.model.packing != "padded" else []
    return min(config.data.max_length, longest_sequence(model), *rows)


def sampler_of(
    config: TrainConfig, policy: PolicyWithHead, stops: Collection[int], world: World
) -> PolicySampler | None:
    """The policy as one that samples; None where the run learns from the data's responses alone."""
    if not config.sampled_share:
        return None
    whole = None
    if world.mesh is not None:
        alone = replace(config.model, packing="padded", compile=False, activation_checkpointing="none")
        whole = freeze(load_policy(config.policy, alone, layers=config.student_layers, lora=config.lora))
    return PolicySampler(
        policy,
        stops,
        max_length=room_of(config, policy.model.config),
        tokens_at_once=config.rollout.tokens_at_once,
        whole=whole,
    )


def _policy(config: TrainConfig, world: World, *, frozen: bool = False) -> PolicyWithHead:
    """The policy as it is at the start."""
    return load_policy(
        config.policy,
        config.model,
        layers=config.student_layers,
        sharing=sharing_of(config, world, config.loss),
        frozen=frozen,
        lora=config.lora,
        seed=config.seed,
    )


def frozen_models(
    config: TrainConfig, policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase, world: World
) -> FrozenModels:
    """The reference and the teacher that this run has to hold, or was given to compare with a cache of scores."""
    needs, sharing = config.needs, sharing_of(config, world, config.loss)
    models = load_frozen(
        config,
        tokenizer,
        kappa=config.loss.teacher_kappa,
        of_teacher=of_teacher(needs),
        needs=needs,
        sharing=sharing,
    )
    if config.sampled_share:
        # `check_sampled_tokens` has found it to read the policy's, and prompts have no text to write anew.
        models.teacher_tokenizer = None
    if models.reference is None and config.scores is None and needs & _OF_REFERENCE:
        models.reference = policy_at_start(config, policy, world)
    return models


def policy_at_start(config: TrainConfig, policy: PolicyWithHead, world: World) -> PolicyWithHead | WithoutAdapters:
    if config.lora.rank:
        return WithoutAdapters(policy)
    if world.mesh is not None:
        return _policy(config, world, frozen=True)
    copy = frozen_copy(policy)
    if config.model.compile:
        # A module's copy is not compiled, and its numbers would differ from the policy's by their rounding.
        compile_blocks(copy)
    return copy


def held_out_scorer_of(
    config: TrainConfig,
    policy: PolicyWithHead,
    models: FrozenModels,
    held_out: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    expected: dict[str, Any],
    world: World,
    verbose: bool,
) -> Scorer:
    """Scores of the held-out pairs, made once: the policy changes under evaluation, reference and teacher do not."""
    # Here the policy is still its own reference, also when the run is resumed later on.
    reference = models.reference or policy if config.loss.needs & _OF_REFERENCE else None
    scorer = replace(models, reference=reference).scorer(held_out, config, verbose=verbose)
    if config.eval_scores is not None:
        cache = fitting_cache(config.eval_scores, config, held_out, expected, scorer, config.loss.needs)
        return CachedScorer(cache, kept_per_token(config.loss.needs))
    if config.loss.needs & TEACHER and models.teacher is None and world.first:
        warnings.warn(
            "held-out pairs have no teacher's values: evaluation leaves the loss and the shaping out. Score them too, "
            "`tvkd score --which eval`, and give --eval_scores",
            stacklevel=2,
        )
    if config.loss.joint or Need.TEACHER_STATES in config.loss.needs:
        # States are not held in memory: the frozen models are run at every evaluation.
        if models.reference is None and Need.REFERENCE in config.loss.needs:
            scorer.reference = policy_at_start(config, policy, world)
        return scorer
    if not scorer.names:
        return scorer
    names = {name: expected[name] for name in ("teacher", "teacher_reference", "reference")}
    names["kappa"] = config.loss.teacher_kappa
    return CachedScorer(
        score_dataset(
            held_out,
            scorer,
            manifest_of(held_out, tokenizer, scorer, **names, model=config.model),
            batching=micro_batching(config),
            world=world,
            progress=verbose,
        )
    )
