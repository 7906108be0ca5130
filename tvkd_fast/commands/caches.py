"""The choice of the score cache that serves a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import torch

from tvkd_fast.commands.models import (
    FrozenModels,
    of_teacher,
    precision,
)
from tvkd_fast.data import PairDataset, fingerprint_tokenizer
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.models import (
    PolicyWithHead,
    fingerprint_model,
)
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives import TEACHER, Need, known
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.kinds import SAMPLED, TOP_K, kind_of, token_kinds
from tvkd_fast.scoring.manifest import ScoreManifest
from tvkd_fast.scoring.reward_folder import load_rewards, read_reward_manifest
from tvkd_fast.scoring.scorer import OnlineScorer
from tvkd_fast.training.train_config import TrainConfig, micro_batching
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OF_TEACHER = ("teacher", "teacher_reference", "teacher_tokens")
"""The fields of a score cache that describe the teacher."""

ADDED_BY = {
    Need.TEACHER_SUMS: "--teacher MODEL",
    Need.TEACHER_REWARDS: "--teacher MODEL --teacher_reference MODEL",
    Need.TEACHER_LOGPS: "--teacher MODEL --keep [logps]",
    Need.TEACHER_STATES: "--teacher MODEL --keep [states]",
    Need.TEACHER_TOP_K: f"--teacher MODEL --keep [{TOP_K}]",
    Need.TEACHER_SAMPLES: f"--teacher MODEL --keep [{SAMPLED}]",
}
"""The options of `tvkd score` that add a number to a folder of scores."""


def expected_of_models(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, models: FrozenModels, policy_at_start: str
) -> dict[str, Any]:
    """Return the fields that a score cache must share with this run; a field that is None is not compared."""
    return {
        **expected_of_settings(config, tokenizer),
        "precision": precision(config.model, models.world),
        "reference": fingerprint_model(models.reference.model)
        if isinstance(models.reference, PolicyWithHead)
        else policy_at_start,
        **models.teacher_fingerprints(),
    }


def expected_of_settings(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return those of `expected_of_models` that are known before any model is loaded."""
    return {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "kappa": config.loss.teacher_kappa if Need.TEACHER_SUMS in config.loss.needs else None,
    }


def fitting_cache(
    folder: str,
    config: TrainConfig,
    dataset: PairDataset,
    expected: dict[str, Any],
    scorer: OnlineScorer,
    needs: frozenset[Need],
) -> ScoreCache:
    """Open the cache, and check that it holds the scores that `scorer` would compute for the dataset."""
    return open_scores(folder, config, dataset, expected | {"teacher_tokens": scorer.teacher_reads(dataset)}, needs)


def open_scores(
    folder: str, config: TrainConfig, dataset: PairDataset, expected: dict[str, Any], needs: frozenset[Need]
) -> ScoreCache:
    """Open the score cache of a dataset. Raises ValueError where a field differs from `expected`, or where the cache
    lacks the values among `needs`."""
    cache = ScoreCache.load(folder, dataset)
    cache.check(**expected)
    held = known(cache.of(torch.empty(0, dtype=torch.int64)))
    missing = [need for need in Need if need in needs & TEACHER - held]
    if missing:
        without = config.loss.without(missing)
        other = "" if without is None or without is config.loss else f", or train with --objective {without.name}"
        need = missing[0]
        raise ValueError(
            f"the scores at {folder} do not hold {need.value}: add them with `tvkd score --output_dir {folder} "
            f"{ADDED_BY[need]}` and the other settings as before{other}"
        )
    if config.loss.trains_beside and cache.manifest.rotation is not None:
        raise ValueError(
            f"{config.objective} learns the coordinates of the teacher's states, and the scores at {folder} hold them "
            "in int8 under a rotation: score anew with --states_dtype bfloat16, or leave --scores out"
        )
    return cache


def load_pairs(
    which: Literal["train", "eval"],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Collection[int],
    verbose: bool = False,
) -> PairDataset:
    """The training or held-out pairs of a run, with the labels and rewards that its objective reads.

    Rewards are those in the folder of scores, where it has those that are asked for, and columns otherwise. Where
    training reads a folder's, held-out pairs have theirs from their own folder or have none.
    """
    needs, held_out = config.loss.needs, which == "eval"
    names = rewards_in(config.scores, config)
    from_folder = names is not None
    folder = config.scores
    if held_out and from_folder:
        folder = config.eval_scores
        names = rewards_in(folder, config)
    labels = Need.LABELS in needs
    read = config.data.reader(
        rewards=Need.REWARDS in needs and not from_folder,
        paired=held_out or Need.REJECTED in needs,
        labels=None if labels and held_out else labels,
    )
    batching = micro_batching(config)
    dataset = load_dataset(which, config.data, tokenizer, batching, stop_ids=stop_ids, verbose=verbose, read=read)
    if folder is None or names is None:
        return dataset
    return dataset.with_rewards(load_rewards(folder, dataset, names), names)


def rewards_in(folder: str | None, config: TrainConfig) -> list[str] | None:
    """The reward models whose numbers in a folder of scores this run reads; None where it reads none of them.

    Raises ValueError where some of those that are asked for are missing, or there are more than the objective takes.
    """
    if folder is None or Need.REWARDS not in config.loss.needs:
        return None
    manifest = read_reward_manifest(folder)
    held, asked = [] if manifest is None else manifest.names, config.data.rewards
    if asked is None:
        if len(held) > 1 and not config.loss.several_rewards:
            raise ValueError(
                f"{config.objective} reads one reward and {folder} holds {len(held)}: name one, --data.rewards "
                f"[{held[0]}]"
            )
        return held or None
    missing = [name for name in asked if name not in held]
    if 0 < len(missing) < len(asked):
        raise ValueError(
            f"{folder} holds rewards of {', '.join(held)} and not of {', '.join(missing)}: add them by `tvkd score "
            f"--output_dir {folder} --reward_model [...]` and the other settings as before"
        )
    return None if missing else list(asked)


def kept_per_token(needs: Collection[Need]) -> tuple[str, ...]:
    """Return the kinds of a folder's rows per token that are to be read of it."""
    return tuple(kind_of(name) for name in token_kinds(of_teacher(needs)))


def manifest_of(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    scorer: OnlineScorer,
    *,
    teacher: str | None,
    teacher_reference: str | None,
    reference: str | None,
    kappa: float,
    model: ModelConfig,
) -> ScoreManifest:
    import transformers

    return ScoreManifest(
        dataset=dataset.fingerprint,
        tokenizer=fingerprint_tokenizer(tokenizer),
        teacher=teacher,
        teacher_reference=teacher_reference,
        reference=reference,
        precision=precision(model, scorer.world),
        kappa=kappa,
        pairs=len(dataset),
        states=scorer.layout(dataset).num_states,
        versions={"tvkd_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        teacher_tokens=scorer.teacher_reads(dataset),
        numbers=scorer.names,
    )
