"""From a config to a run: models, data, scores, and the refusals that belong to their fitting together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.data import (
    PairDataset,
    ScoreCache,
    ScoreLayout,
    ScoreManifest,
    build_dataset,
    check_token_ids,
    fingerprint_tokenizer,
)
from tvkd_fast.models import (
    PolicyWithHead,
    TeacherWithHead,
    fingerprint_weights,
    load_model,
    load_tokenizer,
    prune_layers,
    save_model,
)
from tvkd_fast.training.config import DataConfig, EvalConfig, ModelConfig, ScoreConfig, TrainConfig
from tvkd_fast.training.evaluate import Evaluation, evaluate
from tvkd_fast.training.scoring import CachedScorer, OnlineScorer, Scorer, score_dataset
from tvkd_fast.training.trainer import Trainer
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINAL = "final"


def train(config: TrainConfig, *, show_progress: bool = True) -> Evaluation | None:
    """`tvkd train`: build the run, train, and leave a folder `final/` that `from_pretrained` loads."""
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("train", config.data, tokenizer)
    held_out = load_dataset("eval", config.data, tokenizer) if config.data.eval else None
    if show_progress:
        for name, pairs in (("train", dataset), ("eval", held_out)):
            print(f"{name}: {pairs.report}" if pairs else f"{name}: none")
    policy = PolicyWithHead(_load_policy(config.policy, config.student_layers, config.model))
    for pairs in (dataset, held_out):
        if pairs is not None:
            check_token_ids(pairs, policy.head.out_features)
    start = fingerprint_weights(policy.model)
    models = OnlineScorer(*_frozen_models(config, policy, tokenizer))
    scorer: Scorer = models
    if config.scores is not None and config.objective != "sft":
        scorer = CachedScorer(_fitting_cache(config.scores, config, dataset, tokenizer, start, models))
    held_out_scorer = None
    if held_out is not None and config.objective != "sft":
        if config.eval_scores is not None:
            cache = _fitting_cache(config.eval_scores, config, held_out, tokenizer, start, models)
        else:
            # Here the policy is still its own reference, also when the run is resumed later on.
            reference = policy if models.reference is None else models.reference
            cache = score_dataset(
                held_out,
                OnlineScorer(reference, models.teacher),
                _manifest(held_out, tokenizer, None, None, config.loss.kappa),
                pairs_per_micro_batch=config.pairs_per_micro_batch,
                device=next(policy.parameters()).device,
                progress=show_progress,
            )
        held_out_scorer = CachedScorer(cache)
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
        identity={"policy": start},
        show_progress=show_progress,
    )
    evaluation = trainer.run()
    save_final(policy.model, tokenizer, Path(config.output_dir) / FINAL)
    return evaluation


def score(config: ScoreConfig, *, show_progress: bool = True) -> ScoreCache:
    """`tvkd score`: run reference and teacher once over the data and keep what they say."""
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset(config.which, config.data, tokenizer)
    if config.reference is not None:
        reference_model = _load_policy(config.reference, None, config.model)
    else:
        reference_model = _load_policy(config.policy, config.student_layers, config.model)
    reference = _frozen(PolicyWithHead(reference_model))
    teacher = None
    if config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.kappa, config.model, tokenizer)
    for model in (reference, teacher):
        if model is not None:
            check_token_ids(dataset, model.head.out_features)
    manifest = _manifest(
        dataset,
        tokenizer,
        None if teacher is None else fingerprint_weights(teacher.model),
        fingerprint_weights(reference.model),
        config.kappa,
    )
    cache = score_dataset(
        dataset,
        OnlineScorer(reference, teacher),
        manifest,
        pairs_per_micro_batch=config.pairs_per_micro_batch,
        device=next(reference.parameters()).device,
        progress=show_progress,
    )
    cache.save(config.output_dir)
    return cache


def evaluate_policy(config: EvalConfig) -> Evaluation:
    """`tvkd eval`: a policy, with or without a reference, on data.eval."""
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("eval", config.data, tokenizer)
    if config.teacher is not None and config.reference is None:
        raise ValueError("shaping margins stand beside rewards: give --reference with --teacher")
    policy = _frozen(PolicyWithHead(_load_policy(config.policy, None, config.model)))
    reference = teacher = None
    if config.reference is not None:
        reference = _frozen(PolicyWithHead(_load_policy(config.reference, None, config.model)))
    if config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.loss.kappa, config.model, tokenizer)
    check_token_ids(dataset, policy.head.out_features)
    return evaluate(
        policy,
        dataset,
        scorer=OnlineScorer(reference, teacher),
        loss=config.loss,
        objective="dpo" if teacher is None else "tvkd",
        pairs_per_micro_batch=config.pairs_per_micro_batch,
        device=next(policy.parameters()).device,
    )


def load_dataset(which: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PairDataset:
    """The training ("train") or held-out ("eval") pairs that the config names, tokenized and truncated."""
    source = config.train if which == "train" else config.eval
    if source is None:
        raise ValueError(
            f"no {which} data: set --data.{which} to a hub name, a .jsonl(.gz) or .parquet file, a `datasets` folder, "
            f"or bundled:{which}"
        )
    return build_dataset(
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
    )


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model whole or not at all: a folder of this name is never half of one."""
    partial = folder.with_name(f"{folder.name}.partial")
    save_model(model, tokenizer, partial)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)


def resolve_device(config: ModelConfig) -> torch.device:
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_same_tokenizer(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Teacher and policy must read the same token ids: the teacher's states are taken at the policy's tokens."""
    ours, theirs = policy.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    odd = next((t for t in ours if theirs.get(t) != ours[t]), None) or next(t for t in theirs if t not in ours)
    raise ValueError(
        f"the teacher {name} has another tokenizer than the policy ({len(theirs):,} tokens against {len(ours):,}; they "
        f"differ at {odd!r}): its soft values would be of other text. Choose a teacher of the policy's family"
    )


def _load_policy(name: str, student_layers: int | None, config: ModelConfig) -> PreTrainedModel:
    model = load_model(
        name,
        dtype=getattr(torch, config.dtype),
        device=resolve_device(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    return model if student_layers is None else prune_layers(model, student_layers)


def _load_teacher(name: str, kappa: float, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> TeacherWithHead:
    check_same_tokenizer(tokenizer, load_tokenizer(name, trust_remote_code=config.trust_remote_code), name)
    return TeacherWithHead(_load_policy(name, None, config), kappa=kappa)


def _frozen_models(
    config: TrainConfig, policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase
) -> tuple[PolicyWithHead | None, TeacherWithHead | None]:
    """The reference and the teacher that this run has to hold, or has to compare with a cache of scores."""
    if config.objective == "sft":
        return None, None
    if config.objective == "tvkd" and config.teacher is None and config.scores is None:
        raise ValueError(
            "tvkd needs a teacher: set --teacher, or --scores to a folder made by `tvkd score`; --objective dpo needs "
            "none"
        )
    reference = None
    if config.reference is not None:
        reference = _frozen(PolicyWithHead(_load_policy(config.reference, None, config.model)))
    elif config.scores is None:
        reference = _frozen(copy.deepcopy(policy))
    teacher = None
    if config.objective == "tvkd" and config.teacher is not None:
        teacher = _load_teacher(config.teacher, config.loss.kappa, config.model, tokenizer)
    return reference, teacher


def _fitting_cache(
    folder: str,
    config: TrainConfig,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    policy_at_start: str,
    models: OnlineScorer,
) -> ScoreCache:
    cache = ScoreCache.load(folder, dataset)
    shaped = config.objective == "tvkd"
    cache.check(
        tokenizer=fingerprint_tokenizer(tokenizer),
        dataset=dataset.fingerprint,
        reference=policy_at_start if models.reference is None else fingerprint_weights(models.reference.model),
        teacher=None if models.teacher is None else fingerprint_weights(models.teacher.model),
        kappa=config.loss.kappa if shaped else None,
    )
    if shaped and cache.scores.lse is None:
        raise ValueError(
            f"the scores at {folder} hold no teacher's values: run `tvkd score` with --teacher, or train with "
            "--objective dpo"
        )
    return cache


def _manifest(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str | None,
    reference: str | None,
    kappa: float,
) -> ScoreManifest:
    import transformers

    return ScoreManifest(
        dataset=dataset.fingerprint,
        tokenizer=fingerprint_tokenizer(tokenizer),
        teacher=teacher,
        reference=reference,
        kappa=kappa,
        pairs=len(dataset),
        states=ScoreLayout(dataset).num_states,
        versions={"tvkd_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
