"""A dry run refuses what the run refuses before it loads a model, in the same words."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoConfig

from tvkd_fast.cli.main import main
from tvkd_fast.commands.models import resolve_device
from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.models.settings import LoraConfig, ModelConfig

SETTINGS = {
    "replicas": (
        {"parallel": ParallelConfig(replicas=3)},
        r"3 replicas do not divide 1 processes.*--parallel\.replicas",
    ),
    "device": ({"model": ModelConfig(device="foo")}, r"'foo' is no device: set --model\.device to auto, cpu, cuda"),
    "meta": ({"model": ModelConfig(device="meta")}, "'meta' is no device"),
    "teacher": ({"teacher": None}, "tvkd needs a teacher: set --teacher"),
    "trackers": ({"trackers": ["trackio"]}, "trackio is not installed: pip install trackio"),
    "best": ({"keep_best": "margin", "eval_every": 2}, "with --save_every 0 there is none but the last"),
    "packed": (
        {"lora": LoraConfig(rank=2, quantize="nf4"), "student_layers": 2},
        "a backbone in four bits cannot be pruned",
    ),
    "ratio": ({"data_select_ratio": 0.5}, r"select_ratio would be ignored: set --data\.select to .*, or leave --data"),
    "temperature": ({"data_select_temperature": 0.5}, "select_temperature would be ignored: set"),
    "step": ({"pairs_per_step": 100}, "a step takes 100 pairs and the data has 24"),
    "layers": ({"student_layers": 9}, "9"),
    "targets": ({"lora": LoraConfig(rank=2, targets=["no_such"])}, r"no_such.* Set --lora\.targets"),
    "head": ({"lora": LoraConfig(rank=2, targets=["lm_head"])}, "leave it out of --lora.targets"),
    "scores": ({"scores": "nowhere"}, "no score cache at nowhere"),
    "eval_scores": ({"eval_scores": "nowhere"}, "no score cache at nowhere"),
}


def refused(config, message):
    for act in (plan, lambda config: train(config, show_progress=False)):
        with pytest.raises(ValueError, match=message):
            act(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_refused_by_both(name, make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    changes, message = SETTINGS[name]
    if "lora" in changes:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    refused(make_config(**changes), message)


def test_models_are_refused_by_both(make_config, model_folder, make_tokenizer):
    short = {"max_position_embeddings": 16}
    for changes in ({"reference": model_folder(seed=0, **short)}, {"teacher": model_folder(seed=1, **short)}):
        refused(make_config(**changes), f"the {next(iter(changes))} was made for 16 positions")
    refused(make_config(policy=model_folder(seed=0, **short)), "the policy was made for 16 positions")
    refused(make_config(policy=model_folder(seed=0, vocab_size=200)), r"train.jsonl row 0 has token id 2\d\d")
    other = model_folder(seed=0, tokenizer=_with_another_token(make_tokenizer()))
    refused(make_config(reference=other), "the policy's reference .* has another tokenizer")


def _with_another_token(tokenizer):
    tokenizer.add_tokens(["another"])
    return tokenizer


def test_held_out_pairs_are_read_by_both(make_config, files):
    (files / "eval.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    refused(make_config(), "eval.jsonl row 0")


def test_scores_of_other_settings_are_refused_by_both(make_config, files):
    config = make_config()
    folder = str(files / "scores")
    scored = ScoreConfig(policy=config.policy, teacher=config.teacher, data=config.data, output_dir=folder)
    score(replace(scored, kappa=0.7), show_progress=False)
    refused(replace(config, scores=folder, teacher=None), "was made with another kappa")
    refused(replace(config, scores=folder, data=replace(config.data, max_length=30)), "was made of other data")


def test_places_are_refused_by_both(make_config, files):
    (files / "file").write_text("theirs")
    refused(make_config(output_dir=str(files / "file" / "run")), "no folder can be written at")
    (files / "run").mkdir()
    (files / "run" / "final").write_text("theirs")
    refused(make_config(), "is a file, where a folder is to be")


def test_what_an_objective_needs_and_has_not_is_named(make_config):
    refused(make_config(objective="d_dpo", teacher=None), r"row 0: missing reward columns .*--data\.rewards \[NAME\]")
    refused(make_config(objective="dadpo", teacher=None), r"dadpo needs a teacher: set --teacher, .*; --objective dpo")
    with pytest.raises(
        ValueError, match=r"d_dpo reads one reward and --data\.rewards names 2: name one, such as \[a\]"
    ):
        make_config(objective="d_dpo", data_rewards=["a", "b"])
    with pytest.raises(ValueError, match=r"dpo reads no rewards: leave --data\.rewards out"):
        make_config(objective="dpo", data_rewards=["a"])


def test_a_dry_run_leaves_nothing_behind(make_config, files):
    before = sorted(Path(files).rglob("*"))
    plan(make_config(output_dir=str(files / "in" / "it")))
    assert sorted(Path(files).rglob("*")) == before


def test_a_family_without_a_place_for_packed_rows_is_refused_by_both(make_config, tiny_model, chatml, tmp_path):
    shape = {"vocab_size": 262, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256}
    model = tiny_model(config=GPTNeoConfig(**shape, attention_types=[[["global"], 2]]))
    model.save_pretrained(tmp_path / "gpt_neo")
    chatml.save_pretrained(tmp_path / "gpt_neo")
    refused(make_config(policy=str(tmp_path / "gpt_neo"), objective="dpo"), "packing")


def test_a_gpu_that_is_not_there_is_refused_where_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs here, and no cuda:5"):
        resolve_device(ModelConfig(device="cuda:5"))


@pytest.mark.parametrize("command", ["train", "score", "eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [("--parallel.replicas 3", "3 replicas do not divide 2 processes"), ("--model.device foo", "'foo' is no device")],
)
def test_several_processes_are_not_started_for_a_refusal(
    command, options, message, make_config, files, capsys, monkeypatch
):
    monkeypatch.setattr("tvkd_fast.cli.main.launch", None)
    config = make_config()
    arguments = ["--policy", config.policy, "--data.eval", config.data.eval, "--nproc", "2", *options.split()]
    if command != "eval":
        arguments += ["--output_dir", str(files / "out"), "--teacher", config.teacher]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([command, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
