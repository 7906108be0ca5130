"""From a config to a run: models, data, scores, and the refusals that belong to their fitting together."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.data import (
    MicroBatching,
    PairDataset,
    ScoreCache,
    ScoreManifest,
    build_dataset,
    fingerprint_tokenizer,
)
from tvkd_fast.data.folders import whole_folder
from tvkd_fast.data.formats import ReadRow, to_preference
from tvkd_fast.data.scores import check_score_folder
from tvkd_fast.distributed import World, joined, whole_weights
from tvkd_fast.models import (
    PolicyWithHead,
    WithoutAdapters,
    fingerprint_model,
    is_adapter,
    load_stop_ids,
    load_tokenizer,
    merged,
    save_adapter,
    save_model,
)
from tvkd_fast.training.checkpoint import Checkpoints, check_same_run, read_state
from tvkd_fast.training.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ScoreConfig,
    TrainConfig,
    micro_batching,
)
from tvkd_fast.training.evaluate import Evaluation, evaluate
from tvkd_fast.training.metrics import METRICS, RESUMES, read_metrics
from tvkd_fast.training.optim import make_optimizer
from tvkd_fast.training.outputs import ready_folder, written
from tvkd_fast.training.refusals import check_run
from tvkd_fast.training.replay import Replayed, read_record, replay_pairs
from tvkd_fast.training.run_models import (
    FrozenModels,
    Sharing,
    check_readable,
    frozen_copy,
    load_frozen,
    load_policy,
    precision,
    resolve_device,
)
from tvkd_fast.training.scoring import CachedScorer, OnlineScorer, Scorer, score_dataset, score_to_disk
from tvkd_fast.training.stop import Stopped, StopSignal
from tvkd_fast.training.summary import model_card, summary
from tvkd_fast.training.trainer import CHECKPOINTS, Trainer
from tvkd_fast.training.usage import memory_by_part
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINAL, ADAPTER = "final", "adapter"
EXPORTED = "exported.json"
"""Of which run the model in final/ is."""
OF_TEACHER = ("teacher", "teacher_reference", "teacher_tokens")
"""What a score cache knows of the teacher."""


def train(config: TrainConfig, *, show_progress: bool = True) -> Evaluation | None:
    """`tvkd train`: build the run, train, and leave a folder `final/` that `from_pretrained` loads.

    Under torchrun every process calls it, and they share the model. Raises `Stopped` after SIGTERM or SIGINT, once the
    steps that are done are saved.
    """
    check_run(config)
    open_outputs(config)
    with world_of(config) as world:
        try:
            return _train(config, world, show_progress=show_progress)
        except Stopped as error:
            # Every process has come here: they part as after a run that was finished.
            stopped = error
    raise stopped


def open_outputs(config: TrainConfig) -> None:
    """Make the folders that the run will write to, before it begins."""
    folder = ready_folder(config.output_dir, holds=(FINAL, ADAPTER))
    if config.save_every >= 0:
        ready_folder(folder / CHECKPOINTS)


def world_of(config: TrainConfig | ScoreConfig | EvalConfig) -> AbstractContextManager[World]:
    parallel = config.parallel
    return joined(resolve_device(config.model), replicas=parallel.replicas, timeout_s=parallel.timeout_s)


def _train(config: TrainConfig, world: World, *, show_progress: bool) -> Evaluation | None:
    made = _prepared(config, world, say=show_progress and world.first)
    with StopSignal() as stop:
        trainer = Trainer(
            config,
            made.policy,
            made.scorer,
            made.dataset,
            held_out=made.held_out,
            held_out_scorer=made.held_out_scorer,
            identity=made.identity,
            show_progress=show_progress,
            world=world,
            stop=stop,
        )
        evaluation = trainer.run()
        folder = Path(config.output_dir)
        # A run that was finished before has written it, unless it was killed at that.
        if trainer.trained or not world.told(_exported(folder, trainer)):
            _save_trained(made.policy, made.tokenizer, folder / FINAL, world, model_card(config, evaluation))
            if world.first:
                with written(folder / EXPORTED, RESUMES):
                    (folder / EXPORTED).write_text(json.dumps(_of_run(trainer)) + "\n")
        if trainer.trained:
            memory = world.everyone(memory_by_part(made.policy, trainer.optimizer))
            if show_progress and world.first:
                most = {part: max(of_one[part] for of_one in memory) for part in memory[0]}
                print(summary(read_metrics(folder / METRICS), evaluation, most, world.size))
    return evaluation


def _of_run(trainer: Trainer) -> dict[str, Any]:
    """What tells the run whose model lies in final/ from an earlier one in the same folder."""
    return {"steps": trainer.max_steps, "identity": trainer.identity}


def _exported(folder: Path, trainer: Trainer) -> bool:
    try:
        found = json.loads((folder / EXPORTED).read_text())
    except (OSError, ValueError):
        return False
    return (folder / FINAL).exists() and found == json.loads(json.dumps(_of_run(trainer)))


def best_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that keep_best keeps of a run that is through; None where none was to be kept."""
    if config.keep_best == "none":
        return None
    return Checkpoints(Path(config.output_dir) / CHECKPOINTS, World(torch.device("cpu")), keep=1).best()


def replay(record: str) -> list[Replayed]:
    """`tvkd replay`: the pairs of a step that was not finite, one by one, under the newest checkpoint before it."""
    step, pairs, config = read_record(record)
    config = replace(config, data=replace(config.data, eval=None), eval_every=0, eval_scores=None, keep_best="none")
    # A file does not decide that code from a hub is run.
    config.model.trust_remote_code = False
    world = World(resolve_device(config.model))
    made = _prepared(config, world, say=False)
    checkpoints = Checkpoints(Path(record).expanduser().parent / CHECKPOINTS, world, keep=config.keep_checkpoints)
    newest = checkpoints.newest()
    if newest is not None and read_state(newest)["step"] <= step:
        check_same_run(newest, made.identity)
        checkpoints.load(newest, made.policy, make_optimizer(made.policy, config.optim))
    made.policy.train()
    return replay_pairs(made.policy, made.scorer, made.dataset, pairs, config, world)


@dataclass
class _Prepared:
    """What a trainer is given."""

    tokenizer: PreTrainedTokenizerBase
    policy: PolicyWithHead
    scorer: Scorer
    dataset: PairDataset
    held_out: PairDataset | None
    held_out_scorer: Scorer | None
    identity: dict[str, Any]


def _prepared(config: TrainConfig, world: World, *, say: bool) -> _Prepared:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    batching = micro_batching(config)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("train", config.data, tokenizer, batching, stop_ids=stops, say=say)
    held_out = None
    if config.data.eval:
        held_out = load_dataset("eval", config.data, tokenizer, batching, stop_ids=stops, say=say)
    policy = _policy(config, world)
    for pairs in (dataset, held_out):
        if pairs is not None:
            check_readable(pairs, policy, "policy")
    identity: dict[str, Any] = {
        "policy": fingerprint_model(policy.model),
        "precision": precision(config.model, world),
    }
    scorer: Scorer = OnlineScorer(None, None)
    held_out_scorer = None
    if say and config.unkept_evaluations:
        warnings.warn(
            f"keep_best goes by every {config.save_every // config.eval_every}th evaluation alone, which is at a "
            f"checkpoint: set --save_every {config.eval_every} for all of them",
            stacklevel=2,
        )
    if config.objective != "sft":
        models = _frozen_models(config, policy, tokenizer, world)
        scorer = online = models.scorer(dataset, config, say=say)
        expected = _expected(config, tokenizer, models, identity["policy"])
        expected["teacher_tokens"] = online.teacher_reads(dataset)
        if config.scores is not None:
            cache = _fitting_cache(config.scores, config, dataset, expected, online)
            expected |= {name: getattr(cache.manifest, name) for name in OF_TEACHER}
            scorer = CachedScorer(cache)
        if held_out is not None:
            held_out_scorer = _held_out_scorer(config, policy, models, held_out, tokenizer, expected, world, say)
        identity |= {name: expected[name] for name in ("reference", *OF_TEACHER)}
        if config.scores is not None:
            # What was loaded to be compared or to score the held-out pairs is not needed any longer.
            models.reference = models.teacher = online.reference = online.teacher = None
    for pairs in (dataset, held_out):
        if pairs is not None:
            # Only another tokenizer's tokens are made of them, and those are made.
            pairs.texts.clear()
    return _Prepared(tokenizer, policy, scorer, dataset, held_out, held_out_scorer, identity)


def _policy(config: TrainConfig | ScoreConfig, world: World, *, frozen: bool = False) -> PolicyWithHead:
    """The policy as it is at the start."""
    return load_policy(
        config.policy,
        config.model,
        layers=config.student_layers,
        sharing=sharing_of(config, world),
        frozen=frozen,
        lora=config.lora if isinstance(config, TrainConfig) else None,
    )


def sharing_of(config: TrainConfig | ScoreConfig | EvalConfig, world: World) -> Sharing:
    return Sharing(world, config.parallel, config.tokens_per_micro_batch)


def score(config: ScoreConfig, *, show_progress: bool = True) -> ScoreCache:
    """`tvkd score`: run reference and teacher once over the data and keep what they say."""
    check_score_folder(Path(config.output_dir))
    with world_of(config) as world:
        return _score(config, world, say=show_progress and world.first)


def _score(config: ScoreConfig, world: World, *, say: bool) -> ScoreCache:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset(config.which, config.data, tokenizer, micro_batching(config), stop_ids=stops, say=say)
    models = load_frozen(config, tokenizer, kappa=config.kappa, sharing=sharing_of(config, world))
    if models.reference is None:
        models.reference = _policy(config, world, frozen=True)
    assert isinstance(models.reference, PolicyWithHead)
    scorer = models.scorer(dataset, config, say=say)
    dataset.texts.clear()
    manifest = _manifest(
        dataset,
        tokenizer,
        scorer,
        **models.teacher_fingerprints(),
        reference=fingerprint_model(models.reference.model),
        kappa=config.kappa,
        model=config.model,
    )
    return score_to_disk(
        dataset,
        scorer,
        replace(manifest, value_dtype=config.value_dtype),
        config.output_dir,
        pairs_per_shard=config.pairs_per_shard,
        batching=micro_batching(config),
        world=world,
        progress=say,
    )


def evaluate_policy(config: EvalConfig, *, show_progress: bool = True) -> Evaluation:
    """`tvkd eval`: a policy, with or without a reference, on data.eval."""
    if config.teacher is not None and config.reference is None:
        raise ValueError("shaping margins stand beside rewards: give --reference with --teacher")
    with world_of(config) as world:
        return _evaluated(config, world, say=show_progress and world.first)


def _evaluated(config: EvalConfig, world: World, *, say: bool) -> Evaluation:
    tokenizer = load_tokenizer(config.policy, trust_remote_code=config.model.trust_remote_code)
    stops = load_stop_ids(config.policy, trust_remote_code=config.model.trust_remote_code)
    dataset = load_dataset("eval", config.data, tokenizer, micro_batching(config), stop_ids=stops, say=say)
    sharing = sharing_of(config, world)
    policy = load_policy(config.policy, config.model, sharing=sharing, frozen=True)
    check_readable(dataset, policy, "policy")
    models = load_frozen(config, tokenizer, kappa=config.loss.kappa, sharing=sharing)
    return evaluate(
        policy,
        dataset,
        scorer=models.scorer(dataset, config, say=say),
        loss=config.loss,
        objective="dpo" if models.teacher is None else "tvkd",
        batching=micro_batching(config),
        world=world,
    )


def save_final(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str | None = None,
) -> None:
    """Write the model whole or not at all: a folder of this name is never half of one. `weights` None: its own."""
    with whole_folder(folder, "the model") as partial:
        save_model(model, tokenizer, partial, weights)
        if card is not None:
            (partial / "README.md").write_text(card)


def _save_trained(
    policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World, card: str
) -> None:
    """The same of a policy that processes share; the first of them writes. Adapters are merged, and kept beside it."""
    adapted = any(is_adapter(name) for name, _ in policy.named_parameters())
    weights = whole_weights(policy) if world.mesh is not None or adapted else None
    problem = None
    if world.first:
        try:
            if adapted:
                assert weights is not None
                with whole_folder(folder.with_name(ADAPTER), "the adapter") as partial:
                    save_adapter(policy.model, weights, partial)
                save_final(*merged(policy.model, weights), tokenizer, folder, card)
            else:
                save_final(policy.model, weights, tokenizer, folder, card)
        except Exception as error:
            if world.size == 1:
                raise
            problem = str(error)
    problem = world.told(problem)
    if problem is not None:
        raise ValueError(problem)


def load_dataset(
    which: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batching: MicroBatching | None = None,
    *,
    stop_ids: Collection[int] = (),
    say: bool = False,
    read: ReadRow = to_preference,
) -> PairDataset:
    """The training ("train") or held-out ("eval") pairs that the config names, tokenized, truncated, and fit to be
    batched so.

    `stop_ids` are `models.load_stop_ids` of the model that reads them; `say` prints on stderr what was cut and what was
    dropped; `read` makes a pair of a row, as in `load_preferences`.
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
        stop_ids=stop_ids,
        batching=batching,
        read=read,
    )
    if say:
        print(f"{which}: {dataset.report}", file=sys.stderr)
    return dataset


def _frozen_models(
    config: TrainConfig, policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase, world: World
) -> FrozenModels:
    """The reference and the teacher that this run has to hold, or was given to compare with a cache of scores."""
    with_teacher = config.objective == "tvkd"
    sharing = sharing_of(config, world)
    models = load_frozen(config, tokenizer, kappa=config.loss.kappa, with_teacher=with_teacher, sharing=sharing)
    if models.reference is None and config.scores is None:
        models.reference = _policy_at_start(config, policy, world)
    return models


def _policy_at_start(config: TrainConfig, policy: PolicyWithHead, world: World) -> PolicyWithHead | WithoutAdapters:
    if config.lora.rank:
        return WithoutAdapters(policy)
    return frozen_copy(policy) if world.mesh is None else _policy(config, world, frozen=True)


def _expected(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, models: FrozenModels, policy_at_start: str
) -> dict[str, Any]:
    """What a cache of scores must have been made of to serve this run; None is not compared."""
    return {
        **expected_of_settings(config, tokenizer),
        "precision": precision(config.model, models.world),
        "reference": fingerprint_model(models.reference.model)
        if isinstance(models.reference, PolicyWithHead)
        else policy_at_start,
        **models.teacher_fingerprints(),
    }


def expected_of_settings(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The part of it that no model has to be loaded for."""
    needs_sums = config.objective == "tvkd" and config.loss.value_from != "implicit_reward"
    return {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "kappa": config.loss.kappa if needs_sums else None,
    }


def _fitting_cache(
    folder: str, config: TrainConfig, dataset: PairDataset, expected: dict[str, Any], scorer: OnlineScorer
) -> ScoreCache:
    """The cache, if it holds what `scorer` would say of the dataset."""
    return open_scores(folder, config, dataset, expected | {"teacher_tokens": scorer.teacher_reads(dataset)})


def open_scores(folder: str, config: TrainConfig, dataset: PairDataset, expected: dict[str, Any]) -> ScoreCache:
    """The cache of scores of a dataset. ValueError where it was made of other things than expected, or holds no
    values that the run's loss could be made of."""
    cache = ScoreCache.load(folder, dataset)
    cache.check(**expected)
    if config.objective == "tvkd" and not cache.has_values(config.loss.value_from):
        raise ValueError(
            f"the scores at {folder} hold no teacher's values of the kind {config.loss.value_from}: run `tvkd score` "
            "with --teacher (and --teacher_reference for implicit_reward), or train with --objective dpo"
        )
    return cache


def _held_out_scorer(
    config: TrainConfig,
    policy: PolicyWithHead,
    models: FrozenModels,
    held_out: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    expected: dict[str, Any],
    world: World,
    say: bool,
) -> CachedScorer:
    """Scores of the held-out pairs, made once: the policy changes under evaluation, reference and teacher do not."""
    # Here the policy is still its own reference, also when the run is resumed later on.
    scorer = replace(models, reference=models.reference or policy).scorer(held_out, config, say=say)
    if config.eval_scores is not None:
        return CachedScorer(_fitting_cache(config.eval_scores, config, held_out, expected, scorer))
    if config.objective == "tvkd" and models.teacher is None and world.first:
        warnings.warn(
            "held-out pairs have no teacher's values: evaluation leaves the loss and the shaping out. Score them too, "
            "`tvkd score --which eval`, and give --eval_scores",
            stacklevel=2,
        )
    names = {name: expected[name] for name in ("teacher", "teacher_reference", "reference")}
    names["kappa"] = config.loss.kappa
    return CachedScorer(
        score_dataset(
            held_out,
            scorer,
            _manifest(held_out, tokenizer, scorer, **names, model=config.model),
            batching=micro_batching(config),
            world=world,
            progress=say,
        )
    )


def _manifest(
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
    )
