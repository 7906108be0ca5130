"""From a config to a run: models, data, scores, and the refusals that belong to their fitting together."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.data import (
    MicroBatching,
    PairDataset,
    ScoreCache,
    ScoreLayout,
    ScoreManifest,
    build_dataset,
    check_token_ids,
    fingerprint_tokenizer,
)
from tvkd_fast.data.folders import whole_folder
from tvkd_fast.models import (
    PolicyWithHead,
    TeacherWithHead,
    fingerprint_weights,
    load_model,
    load_tokenizer,
    prune_layers,
    save_model,
)
from tvkd_fast.training.config import DataConfig, EvalConfig, ModelConfig, ScoreConfig, TrainConfig, micro_batching
from tvkd_fast.training.evaluate import Evaluation, evaluate
from tvkd_fast.training.scoring import CachedScorer, OnlineScorer, RewardTeacher, Scorer, score_dataset, score_to_disk
from tvkd_fast.training.trainer import Trainer
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINAL = "final"


def train(config: TrainConfig, *, show_progress: bool = True) -> Evaluation | None:
    """`tvkd train`: build the run, train, and leave a folder `final/` that `from_pretrained` loads."""
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    batching = micro_batching(config)
    dataset = load_dataset("train", config.data, tokenizer, batching, say=show_progress)
    held_out = load_dataset("eval", config.data, tokenizer, batching, say=show_progress) if config.data.eval else None
    policy = load_policy(config.policy, config.model, layers=config.student_layers)
    for pairs in (dataset, held_out):
        if pairs is not None:
            check_token_ids(pairs, policy.head.out_features)
    identity: dict[str, Any] = {"policy": fingerprint_weights(policy.model), "precision": _precision(config.model)}
    scorer: Scorer = OnlineScorer(None, None)
    held_out_scorer = None
    if config.objective != "sft":
        models = _frozen_models(config, policy, tokenizer)
        expected = _expected(config, tokenizer, models, identity["policy"])
        scorer = models
        if config.scores is not None:
            cache = _fitting_cache(config.scores, config, dataset, expected)
            expected |= {name: getattr(cache.manifest, name) for name in ("teacher", "teacher_reference")}
            scorer = CachedScorer(cache)
        if held_out is not None:
            held_out_scorer = _held_out_scorer(config, policy, models, held_out, tokenizer, expected, show_progress)
        identity |= {name: expected[name] for name in ("reference", "teacher", "teacher_reference")}
        if scorer is not models:
            # What was loaded to be compared or to score the held-out pairs is not needed any longer.
            models.reference = models.teacher = None
    if config.model.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    trainer = Trainer(
        config,
        policy,
        scorer,
        dataset,
        held_out=held_out,
        held_out_scorer=held_out_scorer,
        identity=identity,
        show_progress=show_progress,
    )
    evaluation = trainer.run()
    save_final(policy.model, tokenizer, Path(config.output_dir) / FINAL)
    return evaluation


def score(config: ScoreConfig, *, show_progress: bool = True) -> ScoreCache:
    """`tvkd score`: run reference and teacher once over the data and keep what they say."""
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset(config.which, config.data, tokenizer, micro_batching(config), say=show_progress)
    if config.reference is not None:
        reference = _load_reference(config.reference, config.model, tokenizer)
    else:
        reference = _frozen(load_policy(config.policy, config.model, layers=config.student_layers))
    teacher = None
    if config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.teacher_reference, config.kappa, config.model, tokenizer)
    check_token_ids(dataset, reference.head.out_features)
    manifest = _manifest(
        dataset,
        tokenizer,
        **_teacher_fingerprints(teacher),
        reference=fingerprint_weights(reference.model),
        kappa=config.kappa,
        model=config.model,
    )
    return score_to_disk(
        dataset,
        OnlineScorer(reference, teacher),
        replace(manifest, value_dtype=config.value_dtype),
        config.output_dir,
        pairs_per_shard=config.pairs_per_shard,
        batching=micro_batching(config),
        device=next(reference.parameters()).device,
        progress=show_progress,
    )


def evaluate_policy(config: EvalConfig, *, show_progress: bool = True) -> Evaluation:
    """`tvkd eval`: a policy, with or without a reference, on data.eval."""
    if config.teacher is not None and config.reference is None:
        raise ValueError("shaping margins stand beside rewards: give --reference with --teacher")
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("eval", config.data, tokenizer, micro_batching(config), say=show_progress)
    policy = _frozen(load_policy(config.policy, config.model))
    check_token_ids(dataset, policy.head.out_features)
    reference = teacher = None
    if config.reference is not None:
        reference = _load_reference(config.reference, config.model, tokenizer)
    if config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.teacher_reference, config.loss.kappa, config.model, tokenizer)
    return evaluate(
        policy,
        dataset,
        scorer=OnlineScorer(reference, teacher),
        loss=config.loss,
        objective="dpo" if teacher is None else "tvkd",
        batching=micro_batching(config),
        device=next(policy.parameters()).device,
    )


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model whole or not at all: a folder of this name is never half of one."""
    with whole_folder(folder, "the model") as partial:
        save_model(model, tokenizer, partial)


def load_dataset(
    which: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batching: MicroBatching | None = None,
    *,
    say: bool = False,
) -> PairDataset:
    """The training ("train") or held-out ("eval") pairs that the config names, tokenized, truncated, and fit to be
    batched so.

    `say` prints on stderr what was cut and what was dropped.
    """
    source = config.train if which == "train" else config.eval
    if source is None:
        raise ValueError(
            f"no {which} data: set --data.{which} to a hub name, a .jsonl(.gz) or .parquet file, a `datasets` folder, "
            f"or bundled:{which}"
        )
    dataset = build_dataset(
        source,
        tokenizer,
        split=config.train_split if which == "train" else config.eval_split,
        subset=config.subset,
        limit=config.train_limit if which == "train" else config.eval_limit,
        max_length=config.max_length,
        truncation=config.truncation,
        overlong=config.overlong,
        bad_pairs=config.bad_pairs,
        chat_template=config.chat_template,
        batching=batching,
    )
    if say:
        print(f"{which}: {dataset.report}", file=sys.stderr)
    return dataset


def load_policy(name: str, config: ModelConfig, *, layers: int | None = None) -> PolicyWithHead:
    """A model on the run's device and in its precision, pruned to `layers` where given."""
    return PolicyWithHead(_load(name, config, layers=layers), packing=config.packing, autocast=_autocast(config))


def resolve_device(config: ModelConfig) -> torch.device:
    """Where the run's models live; ValueError where the device asked for is not there."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: set --model.device cpu, or install a CUDA build of torch")
    return device


def check_same_tokenizer(
    policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, *, role: str
) -> None:
    """Every model must read the policy's token ids, at which its states and log-probabilities are taken."""
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    odd = next((t for t in ours if theirs.get(t) != ours[t]), None) or next(t for t in theirs if t not in ours)
    raise ValueError(
        f"the {role} {name} has another tokenizer than the policy ({len(theirs):,} tokens against {len(ours):,}; they "
        f"differ at {odd!r}): what it says would be of other text. Choose a {role} of the policy's family"
    )


def _load(name: str, config: ModelConfig, *, layers: int | None = None) -> PreTrainedModel:
    model = load_model(
        name,
        dtype=getattr(torch, config.dtype),
        device=resolve_device(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    return model if layers is None else prune_layers(model, layers)


def _load_reference(name: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PolicyWithHead:
    theirs = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    check_same_tokenizer(tokenizer, theirs, name, role="reference")
    return _frozen(load_policy(name, config))


def _load_teacher(
    name: str, reference: str | None, kappa: float, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> TeacherWithHead | RewardTeacher:
    """A teacher of soft values; of rewards where its own reference is given."""
    theirs = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    check_same_tokenizer(tokenizer, theirs, name, role="teacher")
    if reference is not None:
        return RewardTeacher(_frozen(load_policy(name, config)), _load_reference(reference, config, tokenizer))
    model = _load(name, config)
    return TeacherWithHead(model, kappa=kappa, packing=config.packing, autocast=_autocast(config))


def _frozen_models(config: TrainConfig, policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase) -> OnlineScorer:
    """The reference and the teacher that this run has to hold, or was given to compare with a cache of scores."""
    if config.objective == "tvkd" and config.teacher is None and config.scores is None:
        raise ValueError(
            "tvkd needs a teacher: set --teacher, or --scores to a folder made by `tvkd score`; --objective dpo needs "
            "none"
        )
    reference = None
    if config.reference is not None:
        reference = _load_reference(config.reference, config.model, tokenizer)
    elif config.scores is None:
        reference = _frozen(copy.deepcopy(policy))
    teacher = None
    if config.objective == "tvkd" and config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.teacher_reference, config.loss.kappa, config.model, tokenizer)
    return OnlineScorer(reference, teacher)


def _teacher_fingerprints(teacher: TeacherWithHead | RewardTeacher | None) -> dict[str, str | None]:
    """Of the weights of the teacher and of its own reference."""
    own = teacher.reference.model if isinstance(teacher, RewardTeacher) else None
    return {
        "teacher": None if teacher is None else fingerprint_weights(teacher.model),
        "teacher_reference": None if own is None else fingerprint_weights(own),
    }


def _expected(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, models: OnlineScorer, policy_at_start: str
) -> dict[str, Any]:
    """What a cache of scores must have been made of to serve this run; None is not compared."""
    needs_sums = config.objective == "tvkd" and config.loss.value_from != "implicit_reward"
    return {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "precision": _precision(config.model),
        "kappa": config.loss.kappa if needs_sums else None,
        "reference": policy_at_start if models.reference is None else fingerprint_weights(models.reference.model),
        **_teacher_fingerprints(models.teacher),
    }


def _fitting_cache(folder: str, config: TrainConfig, dataset: PairDataset, expected: dict[str, Any]) -> ScoreCache:
    cache = ScoreCache.load(folder, dataset)
    cache.check(**expected, dataset=dataset.fingerprint)
    if config.objective == "tvkd" and not cache.has_values(config.loss.value_from):
        raise ValueError(
            f"the scores at {folder} hold no teacher's values of the kind {config.loss.value_from}: run `tvkd score` "
            "with --teacher (and --teacher_reference for implicit_reward), or train with --objective dpo"
        )
    return cache


def _held_out_scorer(
    config: TrainConfig,
    policy: PolicyWithHead,
    models: OnlineScorer,
    held_out: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    expected: dict[str, Any],
    show_progress: bool,
) -> CachedScorer:
    """Scores of the held-out pairs, made once: the policy changes under evaluation, reference and teacher do not."""
    if config.eval_scores is not None:
        return CachedScorer(_fitting_cache(config.eval_scores, config, held_out, expected))
    if config.objective == "tvkd" and models.teacher is None:
        warnings.warn(
            "held-out pairs have no teacher's values: evaluation leaves the loss and the shaping out. Score them too, "
            "`tvkd score --which eval`, and give --eval_scores",
            stacklevel=2,
        )
    # Here the policy is still its own reference, also when the run is resumed later on.
    reference = policy if models.reference is None else models.reference
    names = {name: expected[name] for name in ("teacher", "teacher_reference", "reference")}
    names["kappa"] = config.loss.kappa
    return CachedScorer(
        score_dataset(
            held_out,
            OnlineScorer(reference, models.teacher),
            _manifest(held_out, tokenizer, **names, model=config.model),
            batching=micro_batching(config),
            device=next(policy.parameters()).device,
            progress=show_progress,
        )
    )


def _manifest(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
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
        precision=_precision(model),
        kappa=kappa,
        pairs=len(dataset),
        states=ScoreLayout(dataset).num_states,
        versions={"tvkd_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _autocast(config: ModelConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.autocast == "bfloat16" else None


def _precision(config: ModelConfig) -> str:
    return config.dtype if config.autocast == "off" else f"{config.dtype}, products in {config.autocast}"


def _frozen(policy: PolicyWithHead) -> PolicyWithHead:
    return policy.eval().requires_grad_(False)
