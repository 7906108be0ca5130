"""Scores made once against scores made online, and what does not fit together."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resumed import losses
from safetensors.torch import load_file

from tvkd_fast.commands.eval import EvalConfig, evaluate_policy
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.models import PolicyWithHead, load_model, load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.scorer import OnlineScorer
from tvkd_fast.training import trainer as trainer_module


@pytest.fixture
def make_scores(files):
    def make(config, **changes):
        settings = {
            "output_dir": str(files / "scores"),
            "policy": config.policy,
            "teacher": config.teacher,
            "kappa": config.loss.teacher_kappa,
            "data": config.data,
        }
        score(ScoreConfig(**(settings | changes)), show_progress=False)
        return str(files / "scores")

    return make


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss_gamma": 0.9, "loss_terminal": "eos"},
        {"loss_gamma": 0.9, "loss_terminal": "zero", "loss_kappa": 0.7},
        {"loss_kappa": 0.7, "loss_value_from": "logprobs", "loss_alpha": -2.0},
    ],
)
def test_a_run_on_scores_is_the_online_run(loss, make_config, make_scores, run, files):
    online = make_config(output_dir=str(files / "online"), **loss)
    scores = make_scores(online)
    cached = make_config(output_dir=str(files / "cached"), scores=scores, data_eval=None, **loss)
    cached = replace(cached, teacher=None)
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=1e-6)


def test_one_scoring_serves_other_settings_of_the_loss(make_config, make_scores, run, files):
    scores = make_scores(make_config())
    for i, loss in enumerate([{"loss_gamma": 0.9}, {"loss_alpha": 0.3, "loss_beta": 0.4}, {"loss_terminal": "eos"}]):
        online = make_config(output_dir=str(files / f"online-{i}"), **loss)
        cached = make_config(output_dir=str(files / f"cached-{i}"), scores=scores, data_eval=None, **loss)
        cached = replace(cached, teacher=None)
        run(online)
        run(cached)
        assert losses(cached) == pytest.approx(losses(online), abs=1e-6)


def test_dpo_runs_on_a_reference_scored_alone(make_config, make_scores, run, files):
    config = make_config(objective="dpo", output_dir=str(files / "online"))
    scores = make_scores(config, teacher=None)
    run(config)
    cached = replace(config, output_dir=str(files / "cached"), scores=scores)
    run(cached)
    assert losses(cached) == pytest.approx(losses(config), abs=1e-6)
    with pytest.raises(ValueError, match="do not hold the teacher's log-sum-exps: add them with `tvkd score"):
        run(replace(cached, objective="tvkd", loss=TVKD(), teacher=None, output_dir=str(files / "other")))


def test_a_reference_of_its_own_is_used(make_config, model_folder, run, files):
    config = make_config(objective="dpo", reference=model_folder(seed=8), max_steps=1)
    run(config)
    assert losses(config)[0] != pytest.approx(0.6931472, abs=1e-3)


def test_a_pruned_policy_is_its_own_reference(make_config, make_scores, run, files):
    config = make_config(student_layers=2, output_dir=str(files / "online"))
    scores = make_scores(config, student_layers=2)
    cached = replace(config, scores=scores, output_dir=str(files / "cached"))
    run(config)
    run(cached)
    assert losses(cached) == pytest.approx(losses(config), abs=1e-6)
    assert load_model(Path(config.output_dir) / "final").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_max_length": 24}, "dataset"),
        ({"loss_kappa": 0.5}, "kappa"),
        ({"policy": "other"}, "reference"),
        ({"teacher": "other"}, "teacher"),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_name(changes, field, make_config, make_scores, model_folder, run):
    config = make_config(data_max_length=30)
    scores = make_scores(config)
    changes = {k: model_folder(seed=7) if v == "other" else v for k, v in changes.items()}
    fields = {"data_max_length": 30} | changes
    with pytest.raises(ValueError, match=rf"made with another {field} |was made of other data"):
        run(make_config(scores=scores, **fields))


def test_scores_under_another_tokenizer_are_refused(make_config, make_scores, model_folder, make_tokenizer, run):
    scores = make_scores(make_config())
    other = model_folder(seed=0, tokenizer=make_tokenizer(chat_template="{{ messages }}"))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        run(make_config(policy=other, teacher=None, scores=scores))


def test_a_reference_with_another_tokenizer_is_refused_with_the_reason(make_config, model_folder, chatml, run):
    other = copy.deepcopy(chatml)
    other.add_tokens(["extra"])
    folder = model_folder(seed=1, tokenizer=other, vocab_size=263)
    with pytest.raises(
        ValueError, match=r"the policy's reference .* has another tokenizer than the policy \(263 tokens"
    ):
        run(make_config(objective="dpo", reference=folder))


def test_scores_under_autocast_are_the_online_runs(make_config, make_scores, run, files):
    # A bfloat16 product rounds by the shape of its batch: a pair by itself is one batch in scoring and in training.
    online = make_config(output_dir=str(files / "online"), objective="dpo", pairs_per_micro_batch=1)
    online.model.autocast, online.model.packing = "bfloat16", "padded"
    scores = make_scores(online, teacher=None, model=online.model, pairs_per_micro_batch=1)
    cached = replace(online, output_dir=str(files / "cached"), scores=scores)
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=1e-6)
    assert losses(cached)[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="made with another precision"):
        run(make_config(output_dir=str(files / "float32"), objective="dpo", scores=scores))


def test_tvkd_without_a_teacher_names_the_ways_out(make_config, run):
    with pytest.raises(ValueError, match=r"tvkd needs a teacher: set --teacher, or --scores .*--objective dpo needs"):
        run(make_config(teacher=None))


def test_tokens_outside_the_vocabulary_are_refused_by_row(make_config, model_folder, run):
    with pytest.raises(ValueError, match=r"row \d+ has token id \d+, but the model's vocabulary ends at 99"):
        run(make_config(policy=model_folder(vocab_size=100), objective="dpo"))


def test_no_data_names_the_option(make_config, run):
    with pytest.raises(ValueError, match=r"no train data: set --data\.train"):
        run(make_config(data_train=None))


def test_scores_are_what_the_models_say(make_config, make_scores, files, chatml):
    from tvkd_fast.data import build_dataset

    config = make_config()
    folder = make_scores(config)
    dataset = build_dataset(config.data.train, chatml)
    cache = ScoreCache.load(folder, dataset)
    pair = dataset[3]
    for model, side in ((config.policy, "ref"), (config.teacher, "values")):
        ids = torch.tensor([pair.prompt_ids + pair.rejected_ids])
        logits = load_model(model)(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 :].double()
        scores = cache.of(torch.tensor([3]))
        if side == "ref":
            logps = logits[:-1].log_softmax(-1).gather(1, torch.tensor(pair.rejected_ids)[:, None])
            assert float(scores.ref_logps[1]) == pytest.approx(float(logps.sum().detach()), abs=1e-4)
        else:
            torch.testing.assert_close(
                scores.lse[-logits.shape[0] :].double(), logits.logsumexp(-1).detach(), rtol=1e-5, atol=1e-5
            )
    tensors = load_file(Path(folder) / "scores-00000.safetensors")
    assert set(tensors) == {"ref_logps", "lse", "pair_digests"}
    assert tensors["lse"].dtype == torch.float32


def test_scores_in_float16_cost_half_and_a_little(make_config, make_scores, run, files):
    online = make_config(output_dir=str(files / "online"))
    scores = make_scores(online, value_dtype="float16")
    cached = replace(online, output_dir=str(files / "cached"), scores=scores)
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=2e-3)
    tensors = load_file(Path(scores) / "scores-00000.safetensors")
    assert (tensors["lse"].dtype, tensors["ref_logps"].dtype) == (torch.float16, torch.float32)


def test_a_teachers_rewards_are_scored_and_cached_like_values(make_config, make_scores, model_folder, run, files):
    changes = {"loss_value_from": "implicit_reward", "loss_terminal": "eos", "teacher_reference": model_folder(seed=5)}
    online = make_config(output_dir=str(files / "online"), **changes)
    scores = make_scores(online, teacher_reference=online.teacher_reference, kappa=0.3)
    tensors = load_file(Path(scores) / "scores-00000.safetensors")
    assert set(tensors) == {"ref_logps", "reward", "pair_digests"}
    cached = replace(online, teacher=None, teacher_reference=None, scores=scores, eval_scores=None)
    cached = replace(cached, output_dir=str(files / "cached"), data=replace(cached.data, eval=None))
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=1e-6)
    assert losses(online)[0] != pytest.approx(0.6931472, abs=1e-4)
    with pytest.raises(ValueError, match="do not hold the teacher's log-sum-exps: add them with `tvkd score"):
        run(replace(cached, loss=replace(cached.loss, value_from="logits", kappa=0.3)))
    other = replace(online, teacher_reference=model_folder(seed=6), scores=scores, output_dir=str(files / "other"))
    with pytest.raises(ValueError, match="made with another teacher_reference"):
        run(other)


def test_rewards_need_both_models(make_config):
    with pytest.raises(ValueError, match="before DPO: set --teacher_reference"):
        make_config(loss_value_from="implicit_reward")
    with pytest.raises(ValueError, match="set all or none"):
        make_config(teacher_reference="some")
    with pytest.raises(ValueError, match="is the reference of a teacher: set --teacher"):
        ScoreConfig(output_dir="x", policy="y", teacher_reference="z")


class KilledError(Exception):
    pass


def test_scoring_that_was_killed_goes_on_and_says_the_same(make_config, make_scores, files, monkeypatch):
    config = make_config()
    whole = ScoreCache.load(make_scores(config), dataset_of(config))
    calls = []
    real = OnlineScorer.of

    def killed(self, batch):
        calls.append(batch.num_pairs)
        if sum(calls) > 10:
            raise KilledError
        return real(self, batch)

    options = {"output_dir": str(files / "again"), "pairs_per_shard": 4, "tokens_per_micro_batch": 200}
    with monkeypatch.context() as patch:
        patch.setattr(OnlineScorer, "of", killed)
        with pytest.raises(KilledError):
            make_scores(config, **options)
    calls.clear()
    monkeypatch.setattr(OnlineScorer, "of", lambda self, batch: calls.append(batch.num_pairs) or real(self, batch))
    make_scores(config, **options)
    assert sum(calls) == 24 - 8
    again = ScoreCache.load(files / "again", dataset_of(config))
    pairs = torch.arange(24)
    assert len(again.pieces) == 6
    torch.testing.assert_close(again.of(pairs).ref_logps, whole.of(pairs).ref_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.of(pairs).lse, whole.of(pairs).lse, rtol=1e-5, atol=1e-5)


def dataset_of(config):
    return load_dataset("train", config.data, load_tokenizer(config.policy))


def test_a_step_takes_the_same_pairs_with_and_without_scores(make_config, make_scores, run, files, monkeypatch):
    taken = []
    real = trainer_module.train_step

    def watched(policy, scorer, batches, *args, **options):
        taken.append(([batch.pairs.tolist() for batch in batches], torch.random.get_rng_state().tolist()))
        return real(policy, scorer, batches, *args, **options)

    monkeypatch.setattr(trainer_module, "train_step", watched)
    online = make_config(output_dir=str(files / "online"))
    run(online)
    run(replace(online, output_dir=str(files / "cached"), scores=make_scores(online)))
    assert taken[: len(taken) // 2] == taken[len(taken) // 2 :]


def test_evaluation_is_the_same_whatever_the_batch(make_config, model_folder):
    config = make_config()
    models = {"policy": config.policy, "reference": model_folder(seed=3), "data": config.data}
    padded = [EvalConfig(**models, model=ModelConfig(packing="padded"), pairs_per_micro_batch=n) for n in (1, 3, 10)]
    packed = [EvalConfig(**models, model=ModelConfig(packing=packing)) for packing in ("unshared", "shared")]
    found = [evaluate_policy(config) for config in (*padded, *packed)]
    for other in found[1:]:
        assert other.known() == pytest.approx(found[0].known(), abs=1e-5)
    assert found[0].pairs == 10
    assert found[0].reward_accuracy is not None


def test_evaluation_without_a_reference_has_no_rewards(make_config):
    config = make_config()
    found = evaluate_policy(EvalConfig(policy=config.policy, data=config.data))
    assert set(found.known()) == {"pairs", "accuracy", "accuracy_ci", "margin", "margin_ci"}
    own = PolicyWithHead(load_model(config.policy))
    assert not own.head.weight.is_meta


def test_evaluation_with_a_teacher_reports_the_shaping(make_config, model_folder):
    config = make_config()
    models = {"policy": config.policy, "teacher": config.teacher, "data": config.data}
    found = evaluate_policy(EvalConfig(**models, reference=model_folder(seed=3)))
    assert found.shaping_std_ratio is not None
    assert found.shaping_margin is not None
    with pytest.raises(ValueError, match="give --reference with --teacher"):
        evaluate_policy(EvalConfig(**models))


def test_held_out_scores_serve_as_well_as_the_models(make_config, make_scores, run, files):
    online = make_config(output_dir=str(files / "online"))
    scores = make_scores(online)
    held_out = make_scores(online, which="eval", output_dir=str(files / "held-out"))
    cached = make_config(output_dir=str(files / "cached"), scores=scores, eval_scores=str(files / "held-out"))
    assert held_out
    assert run(cached).known() == pytest.approx(run(online).known(), abs=1e-5)
    with pytest.raises(ValueError, match="was made of other data"):
        run(make_config(output_dir=str(files / "wrong"), scores=scores, eval_scores=scores))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta", 0, "beta must be a positive number"),
        ("gamma", 1.1, "gamma must be in"),
        ("kappa", 0, "kappa must be a positive number"),
        ("label_smoothing", 0.5, "label_smoothing must be in"),
        ("alpha", math.inf, "alpha must be finite"),
    ],
)
def test_impossible_losses_are_refused_before_anything_is_loaded(field, value, message):
    with pytest.raises(ValueError, match=message):
        TVKD(**{field: value})


def test_a_device_that_is_not_there_is_refused(make_config, run):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here, so asking for one is no mistake")
    config = make_config()
    config.model.device = "cuda"
    with pytest.raises(ValueError, match=r"no CUDA device is available: set --model\.device cpu"):
        run(config)


def test_evaluation_without_the_teachers_values_says_so_and_leaves_the_loss_out(make_config, make_scores, run, files):
    config = replace(make_config(), scores=make_scores(make_config()), teacher=None)
    with pytest.warns(UserWarning, match="held-out pairs have no teacher's values.*give --eval_scores"):
        found = run(config)
    assert found.loss is None
    assert found.reward_accuracy is not None


def test_logprob_values_at_kappa_one_are_refused():
    with pytest.raises(ValueError, match=r"value_from='logprobs' is 0 everywhere at kappa=1: set --loss\.kappa"):
        TVKD(value_from="logprobs")
