"""A teacher whose tokenizer is not the policy's."""

import copy
from dataclasses import replace

import pytest
import torch
from resumed import losses
from safetensors.torch import load_file

from tvkd_fast.commands.eval import EvalConfig, evaluate_policy
from tvkd_fast.commands.models import load_frozen, load_policy
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.data import collate_packed
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.models import load_model, load_tokenizer
from tvkd_fast.objectives import PolicyNumbers
from tvkd_fast.scoring.cache import describe
from tvkd_fast.scoring.manifest import read_manifest
from tvkd_fast.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def merged(train_tokenizer):
    """Merges what the policy's tokenizer does not, so that its responses have fewer tokens."""
    return train_tokenizer(["say red green blue sun moon sea tree bread stone"] * 9)


@pytest.fixture
def teacher(model_folder, merged):
    return model_folder(seed=1, tokenizer=merged, vocab_size=404)


def score_config(config, folder, **changes):
    settings = {
        "output_dir": str(folder),
        "policy": config.policy,
        "teacher": config.teacher,
        "teacher_reference": config.teacher_reference,
        "kappa": config.loss.kappa,
        "data": config.data,
    }
    return ScoreConfig(**(settings | changes))


@pytest.mark.parametrize("terminal", ["last_content", "eos", "zero"])
def test_returns_run_over_the_teachers_own_states(terminal, make_config, teacher, merged):
    config = make_config(teacher=teacher, loss_gamma=0.9, loss_terminal=terminal, data_max_length=30)
    tokenizer = load_tokenizer(config.policy)
    dataset = load_dataset("train", config.data, tokenizer)
    assert any(not pair.rejected_ended for pair in dataset)
    models_ = load_frozen(config, tokenizer, kappa=1.0)
    models_.reference = load_policy(config.policy, config.model)
    scorer = models_.scorer(dataset, config)
    batch = next(scorer.teacher_tokens.batching.batches(dataset, range(6)))
    logps = torch.zeros(2 * batch.num_pairs)
    out = config.loss.loss(PolicyNumbers(logps, batch.lengths), scorer.of(batch), batch)
    model = load_model(teacher).double()
    for i, margin in zip(batch.pairs.tolist(), out.shaping_margins.tolist(), strict=True):
        pair, text = scorer.teacher_tokens.dataset[i], dataset.texts[i]
        assert merged.decode(pair.chosen_ids) == f"{text.chosen}</s>"
        returns = []
        for ids, ended in ((pair.chosen_ids, pair.chosen_ended), (pair.rejected_ids, pair.rejected_ended)):
            logits = model(input_ids=torch.tensor([pair.prompt_ids + ids])).logits[0, len(pair.prompt_ids) - 1 :]
            values = 0.1 * logits.logsumexp(-1).detach()
            if terminal == "zero":
                values[-1] = 0.0
            if terminal == "last_content" and ended:
                values = values[:-1]
            returns.append(float((0.9 * values[1:] - values[:-1]).sum()))
        assert margin == pytest.approx(returns[0] - returns[1], abs=2e-5)


@pytest.mark.parametrize(
    "loss", [{"loss_gamma": 0.9, "loss_kappa": 0.7}, {"loss_gamma": 0.8, "loss_value_from": "implicit_reward"}]
)
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_cached_it_is_the_online_run(loss, packing, make_config, model_folder, merged, teacher, run, files):
    if "loss_value_from" in loss:
        loss = loss | {"teacher_reference": model_folder(seed=5, tokenizer=merged, vocab_size=404)}
    online = make_config(teacher=teacher, output_dir=str(files / "online"), data_max_length=30, **loss)
    online = replace(online, model=replace(online.model, packing=packing))
    score(score_config(online, files / "scores", model=online.model, pairs_per_shard=10), show_progress=False)
    cached = replace(online, teacher=None, teacher_reference=None, scores=str(files / "scores"))
    cached = replace(cached, output_dir=str(files / "cached"), data=replace(online.data, eval=None))
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=1e-6)
    tensors = load_file(files / "scores" / "scores-00000.safetensors")
    kept = {"reward"} if "teacher_reference" in loss else {"lse", "lse_kappa"}
    assert set(tensors) == {"ref_logps", "pair_digests", "teacher_states", "teacher_ended"} | kept
    assert tensors["teacher_states"].sum() == len(tensors[min(kept)])
    assert "teacher_tokens" in describe(files / "scores")


def test_the_same_tokens_by_either_way_are_the_same_run(make_config, model_folder, chatml, run, files):
    """A vocabulary with a token more that no text has: the teacher reads the policy's ids, as tokens of its own."""
    other = copy.deepcopy(chatml)
    other.add_tokens(["\u2603"])
    changes = {"loss_gamma": 0.9, "data_max_length": 30}
    for name, tokenizer in (("theirs", other), ("ours", chatml)):
        folder = model_folder(seed=1, tokenizer=tokenizer, vocab_size=320)
        run(make_config(teacher=folder, output_dir=str(files / name), **changes))
    theirs, ours = (losses(make_config(output_dir=str(files / name))) for name in ("theirs", "ours"))
    assert theirs == pytest.approx(ours, abs=1e-6)


def test_padded_vocabularies_need_no_word(make_config, model_folder, run, files):
    """262 tokens, a head of 272 columns in the policy, of 304 in the teacher."""
    policy, teacher = model_folder(seed=0, vocab_size=272), model_folder(seed=1, vocab_size=304)
    config = make_config(policy=policy, teacher=teacher, loss_gamma=0.9)
    assert run(config).pairs == 10
    score(score_config(config, files / "scores"), show_progress=False)
    cached = replace(config, teacher=None, scores=str(files / "scores"), output_dir=str(files / "cached"))
    with pytest.warns(UserWarning, match="held-out pairs have no teacher's values"):
        run(cached)
    assert losses(cached) == pytest.approx(losses(config), abs=1e-6)
    assert not read_manifest(files / "scores").own_tokens


def test_scores_of_other_tokens_of_the_teachers_are_refused_by_name(make_config, teacher, merged, run, files):
    config = make_config(teacher=teacher)
    score(score_config(config, files / "scores"), show_progress=False)
    tokenizer = copy.deepcopy(merged)
    tokenizer.add_tokens(["say re"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ValueError, match="made with another teacher_tokens"):
        run(replace(config, scores=str(files / "scores")))


def test_a_teacher_that_comes_to_the_same_tokens_has_none_of_its_own(make_config, model_folder, chatml, run, files):
    other = copy.deepcopy(chatml)
    other.add_tokens(["\u2603"])
    teacher = model_folder(seed=1, tokenizer=other, vocab_size=320)
    config = make_config(teacher=teacher, data_max_length=30)
    score(score_config(config, files / "scores"), show_progress=False)
    # The snowman is nowhere in the text.
    assert not read_manifest(files / "scores").own_tokens
    assert run(replace(config, scores=str(files / "scores"))) is not None


def test_an_empty_micro_batch_has_a_teacher_too(make_config, teacher):
    config = make_config(teacher=teacher)
    tokenizer = load_tokenizer(config.policy)
    dataset = load_dataset("train", config.data, tokenizer)
    models_ = load_frozen(config, tokenizer, kappa=1.0)
    models_.reference = load_policy(config.policy, config.model)
    scores = models_.scorer(dataset, config).of(collate_packed([], []))
    assert scores.teacher_states.numel() == scores.ref_logps.numel() == 0


def test_resuming_under_other_tokens_of_the_teachers_is_refused_by_name(make_config, teacher, merged, run):
    config = make_config(teacher=teacher, max_steps=2)
    run(config)
    tokenizer = copy.deepcopy(merged)
    tokenizer.add_tokens(["say re"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(CheckpointError, match="made with another teacher_tokens"):
        run(replace(config, resume=True))


def test_rows_are_as_long_as_the_teachers_longest_pair(make_config, teacher):
    """The policy's rows are made for what trains; the teacher has no backward."""
    config = make_config(teacher=teacher, tokens_per_micro_batch=60)
    tokenizer = load_tokenizer(config.policy)
    dataset = load_dataset("train", config.data, tokenizer)
    assert load_frozen(config, tokenizer, kappa=1.0).scorer(dataset, config).teacher_tokens.batching.tokens == 60
    config = replace(config, tokens_per_micro_batch=8)
    assert load_frozen(config, tokenizer, kappa=1.0).scorer(dataset, config).teacher_tokens.batching.tokens > 8


def test_evaluation_reports_the_shaping(make_config, teacher):
    config = make_config(teacher=teacher, loss_gamma=0.9)
    found = evaluate_policy(
        EvalConfig(policy=config.policy, reference=config.policy, teacher=teacher, data=config.data, loss=config.loss),
        show_progress=False,
    )
    assert found.shaping_margin


def test_the_report_says_what_the_teacher_reads(make_config, teacher, files, capsys):
    config = make_config(teacher=teacher)
    score(score_config(config, files / "scores"))
    assert "train.jsonl in the teacher's tokens; tokens a pair" in capsys.readouterr().err
