"""Numbers that are added to a folder of scores: what it holds is kept, and what it lacks is named with a command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resumed import losses

from tvkd_fast.commands.score import ScoreConfig
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.models import load_model, load_tokenizer
from tvkd_fast.objectives.dadpo import DaDPO
from tvkd_fast.objectives.rewards.m_dpo import MDPO
from tvkd_fast.scoring import score_passes
from tvkd_fast.scoring.cache import describe
from tvkd_fast.scoring.manifest import MANIFEST, read_manifest


def contents(cache):
    whole = cache.of(torch.arange(cache.layout.num_pairs))
    return {name: x for name, x in vars(whole).items() if x is not None}


def test_numbers_are_added_and_nothing_is_computed_twice(scored, computed, model_folder, files):
    first = contents(scored(teacher=None))
    assert set().union(*computed) == {"ref_logps"}
    computed.clear()
    scored(keep=["logps"])
    assert set().union(*computed) == {"teacher_logps"}
    computed.clear()
    scored(kappa=0.7)
    assert set().union(*computed) == {"lse", "lse_kappa"}
    computed.clear()
    cache = scored(keep=["values", "logps"], kappa=0.7)
    assert computed == []
    assert (cache.manifest.kappa, cache.manifest.numbers) == (0.7, ("ref_logps", "lse", "lse_kappa", "teacher_logps"))
    cache = scored(teacher_reference=model_folder(seed=4), kappa=0.7)
    assert set().union(*computed) == {"reward"}
    found = contents(cache)
    assert torch.equal(found["ref_logps"], first["ref_logps"])
    whole = contents(scored(output_dir=str(files / "whole"), keep=["values", "logps"], kappa=0.7))
    for name in ("ref_logps", "lse", "lse_kappa", "teacher_logps"):
        torch.testing.assert_close(found[name], whole[name])
    assert "teacher's logps" in describe(files / "scores")


def test_log_probabilities_are_the_teachers(scored, make_config, files):
    config = make_config()
    model = load_model(config.teacher).double()
    cache = scored(keep=["logps"])
    found, dataset = contents(cache)["teacher_logps"], load_dataset("train", config.data, load_tokenizer(config.policy))
    for i in (0, 5, 23):
        for side, ids in enumerate((dataset[i].chosen_ids, dataset[i].rejected_ids)):
            logits = model(input_ids=torch.tensor([dataset[i].prompt_ids + ids])).logits[
                0, len(dataset[i].prompt_ids) - 1 : -1
            ]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
            assert float(found[i + side * len(dataset)]) == pytest.approx(float(wanted.detach()), abs=1e-4)


@pytest.mark.parametrize("change", [{"kappa": 0.5}, {"value_dtype": "float16"}, {"other": True}])
def test_under_other_settings_or_models_a_folder_is_made_anew(change, scored, computed, model_folder):
    scored(keep=["values", "logps"])
    computed.clear()
    if change.pop("other", False):
        change = {"teacher": model_folder(seed=7)}
    cache = scored(**change)
    assert set().union(*computed) == {"ref_logps", "lse", "lse_kappa"}
    assert "teacher_logps" not in cache.numbers


def test_other_settings_of_values_do_not_matter_to_log_probabilities(scored, computed):
    scored(kappa=0.7, value_dtype="float16")
    computed.clear()
    cache = scored(keep=["logps"])
    assert set().union(*computed) == {"teacher_logps"}
    assert (cache.manifest.kappa, cache.manifest.value_dtype) == (0.7, "float16")


def test_a_killed_addition_leaves_the_old_scores_and_is_gone_on_with(scored, computed, killed_at, files):
    before = contents(scored())
    computed.clear()
    killed_at(14, lambda: scored(keep=["logps"]))
    assert read_manifest(files / "scores").numbers == ("ref_logps", "lse", "lse_kappa")
    computed.clear()
    found = contents(scored(keep=["logps"]))
    assert len(computed) <= 2
    assert all(torch.equal(found[name], x) for name, x in before.items())
    assert found["teacher_logps"].isfinite().all()
    assert found["teacher_logps"].all()


@pytest.mark.parametrize("written", [False, True])
def test_a_second_pass_over_one_folder_is_refused_while_the_first_runs(written, scored, monkeypatch, files):
    """Before its scores are in place, and behind that, as rewards are added."""
    order = ["finish", "second"] if written else ["second", "finish"]
    finish, refused = score_passes.ScoreWriter.finish, []

    def second():
        with monkeypatch.context() as patch:
            patch.setattr(score_passes.ScoreWriter, "finish", finish)
            with pytest.raises(ValueError, match=r"scores is being written by another process: wait for it to end"):
                scored(keep=["logps"])
        refused.append(True)

    def meanwhile(self):
        for step in order:
            finish(self) if step == "finish" else second()

    monkeypatch.setattr(score_passes.ScoreWriter, "finish", meanwhile)
    scored()
    assert refused == [True]
    monkeypatch.undo()
    assert read_manifest(files / "scores").finished


def test_a_kill_as_added_numbers_take_their_place_loses_none(scored, computed, monkeypatch, files):
    """Between two renames no folder has the name, and the old numbers lie aside."""
    before = contents(scored(keep=["values", "states"]))
    rename = Path.rename

    def killed(self, target):
        if self.name == ".scores.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            scored(keep=["logps"])
    assert sorted(path.name for path in files.glob("*scores*")) == [".scores.old", ".scores.partial"]
    computed.clear()
    cache = scored(keep=["logps"])
    assert computed == []
    assert cache.numbers == ("ref_logps", "lse", "lse_kappa", "teacher_logps", "states")
    found = contents(cache)
    assert all(torch.equal(found[name], x) for name, x in before.items() if name != "teacher_head")
    assert [path.name for path in files.glob("*scores*")] == ["scores"]


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4)])
@pytest.mark.parametrize("keep", [["values"], ["values", "states", "sampled:5"]])
def test_a_killed_pass_is_gone_on_with_in_shards_of_another_size(keep, sizes, scored, killed_at, files):
    whole = contents(scored(keep=keep, output_dir=str(files / "whole")))
    killed_at(18 if sizes[0] == 9 else 4, lambda: scored(keep=keep, pairs_per_shard=sizes[0]))
    cache = scored(keep=keep, pairs_per_shard=sizes[1])
    assert [shard.pairs for shard in cache.manifest.shards] == ([4, 9, 9, 2] if sizes[0] == 4 else [9, 9, 4, 2])
    found = contents(cache)
    assert found.keys() == whole.keys()
    for name, x in whole.items():
        if name != "teacher_head":
            torch.testing.assert_close(found[name], x)


def test_a_killed_addition_does_not_go_on_beside_rows_in_shards_of_another_size(scored, killed_at, files):
    killed_at(8, lambda: scored(keep=["states", "topk:8"], pairs_per_shard=4))
    (files / ".scores.partial").rename(files / "aside")
    scored(keep=["states"])
    (files / "aside").rename(files / ".scores.partial")
    with pytest.raises(
        ValueError, match=r"\.scores\.partial has shards of other sizes than .*delete it and score again"
    ):
        scored(keep=["states", "topk:8"])


@pytest.mark.parametrize("old", [3, 4])
def test_scores_of_older_formats_are_read_and_added_to(old, scored, computed, files):
    scored()
    manifest = files / "scores" / MANIFEST
    found = read_manifest(files / "scores")
    manifest.write_text(replace(found, numbers=None if old == 3 else found.numbers, format=old).text())
    assert ("numbers" in json.loads(manifest.read_text())) is (old == 4)
    assert "head" not in json.loads(manifest.read_text())
    computed.clear()
    assert scored(keep=["logps"]).manifest.format == 5
    assert set().union(*computed) == {"teacher_logps"}


@pytest.mark.parametrize("loss", [DaDPO(), MDPO(score_from="perplexity")], ids=lambda loss: loss.name)
def test_a_run_on_scores_is_the_online_run(loss, scored, make_config, run, files):
    online = make_config(objective=loss.name, output_dir=str(files / "online"))
    online = replace(online, loss=loss)
    cached = replace(online, teacher=None, scores=str(files / "scores"), output_dir=str(files / "cached"))
    cached = replace(cached, data=replace(cached.data, eval=None))
    scored()
    with pytest.raises(
        ValueError, match=r"do not hold the teacher's log-probabilities: add them with `tvkd score"
    ) as bad:
        run(cached)
    assert f"--output_dir {files / 'scores'} --teacher MODEL --keep [logps]`" in str(bad.value)
    assert "or train with --objective dpo" in str(bad.value)
    scored(keep=["logps"])
    run(online)
    run(cached)
    assert losses(cached) == pytest.approx(losses(online), abs=1e-6)


def test_a_teacher_with_other_tokens_has_a_log_probability_of_each_response(
    scored, computed, model_folder, train_tokenizer
):
    merged = train_tokenizer(["say red green blue sun moon sea tree bread stone"] * 9)
    own = model_folder(seed=1, tokenizer=merged, vocab_size=404)
    scored(teacher=own)
    computed.clear()
    cache = scored(teacher=own, keep=["logps"])
    assert set().union(*computed) == {"teacher_logps", "teacher_states", "teacher_ended"}
    assert contents(cache)["teacher_logps"].isfinite().all()


def test_nothing_to_keep_is_refused():
    with pytest.raises(ValueError, match=r"keep names nothing: set --keep \[values\], \[logps\] or \[values,logps\]"):
        ScoreConfig(output_dir="x", policy="y", keep=[])


def test_a_folder_of_both_kinds_of_values_serves_both(scored, make_config, model_folder, run, files):
    """Its held-out pairs' folder has the one kind that the run reads."""
    own = model_folder(seed=4)
    scored()
    scored(teacher_reference=own)
    scored(output_dir=str(files / "held-out"), which="eval")
    config = make_config(scores=str(files / "scores"), eval_scores=str(files / "held-out"), max_steps=1, eval_every=1)
    run(replace(config, teacher=None))
    config = make_config(loss_value_from="implicit_reward", teacher_reference=own, scores=config.scores, max_steps=1)
    run(replace(config, output_dir=str(files / "rewards"), data=replace(config.data, eval=None)))
