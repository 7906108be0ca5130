"""Output folders are made, and tried, before the work; one that cannot be written is one line with its path."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvkd_fast.cli import main as cli
from tvkd_fast.cli.main import main
from tvkd_fast.commands import train
from tvkd_fast.commands.demo import DemoConfig
from tvkd_fast.commands.eval import EvalConfig
from tvkd_fast.commands.explain import ExplainConfig
from tvkd_fast.commands.export import export
from tvkd_fast.commands.score import ScoreConfig
from tvkd_fast.commands.train import best_checkpoint
from tvkd_fast.data import build_dataset
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.evaluation.evaluate import Evaluation
from tvkd_fast.models import fingerprint_weights, load_model, load_tokenizer
from tvkd_fast.models.adapter_folder import adapter_folder
from tvkd_fast.models.settings import LoraConfig
from tvkd_fast.training.record import from_record, to_record
from tvkd_fast.training.train_config import TrainConfig

WORK = (
    "tvkd_fast.commands.eval.load_tokenizer",
    "tvkd_fast.commands.prepare.load_tokenizer",
    "tvkd_fast.commands.score.load_tokenizer",
    "tvkd_fast.commands.compare.load_tokenizer",
    "tvkd_fast.commands.explain.load_tokenizer",
    "tvkd_fast.commands.demo._base",
)


@pytest.fixture
def error_of(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ("eval --model m --data bundled:eval:2 --output {}/x.jsonl", "{}/x.jsonl"),
        ("eval --model m --data bundled:eval:2 --generate {}", "{}"),
        ("explain --teacher m --data.eval bundled:eval:2 --output_dir {}", "{}"),
        ("score --policy m --teacher m --data.train bundled:train:2 --output_dir {}", "{}"),
        ("score --policy m --teacher m --data.train bundled:train:2 --output_dir {}/in/it", "{}/in/it"),
        ("train --policy m --teacher m --data.train bundled:train:2 --output_dir {}", "{}"),
        ("demo --out {}", "{}"),
    ],
)
def test_a_file_where_a_folder_is_to_be_is_named_before_the_work(arguments, place, error_of, monkeypatch, tmp_path):
    for name in WORK:
        monkeypatch.setattr(name, None)
    file = tmp_path / "file"
    file.write_text("theirs")
    line = error_of(*arguments.format(file).split())
    assert line.startswith(f"tvkd {arguments.split()[0]}: error: ")
    assert place.format(file) in line
    assert file.read_text() == "theirs"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/no/entry"), "/no/entry: Permission denied"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_any_error_of_a_file_is_a_line(error, message, error_of, monkeypatch, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    line = error_of("train", "--policy", "m", "--output_dir", tmp_path)
    assert line == f"tvkd train: error: {message}"


def test_an_outputs_folder_is_made(model_folder, files, tmp_path, capsys):
    output = tmp_path / "results" / "x.jsonl"
    main(["eval", "--model", model_folder(), "--data", str(files / "eval.jsonl"), "--output", str(output)])
    assert json.loads(output.read_text())["pairs"] == 10


def test_a_tilde_is_home(monkeypatch, tmp_path, model_folder, files):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    data = DataConfig(train="~/t.jsonl", eval="~/e.jsonl")
    assert (data.train, data.eval) == (f"{home}/t.jsonl", f"{home}/e.jsonl")
    paths = dict.fromkeys(("policy", "teacher", "reference", "output_dir", "scores"), "~/x")
    config = TrainConfig(**paths, data=data, eval_scores="~/x")
    assert {getattr(config, name) for name in (*paths, "eval_scores")} == {f"{home}/x"}
    assert EvalConfig(policy="~/p", compare=["~/a", "org/b"]).compare == [f"{home}/a", "org/b"]
    assert EvalConfig(policy="p", output="~/o", generate="~/g").generate == f"{home}/g"
    assert ScoreConfig(policy="p", output_dir="~/o").output_dir == f"{home}/o"
    assert ExplainConfig(teacher="p", output_dir="~/o").output_dir == f"{home}/o"
    assert DemoConfig(out="~/o").out == f"{home}/o"
    os.rename(model_folder(seed=8), tmp_path / "model")
    assert load_model("~/model").name_or_path == f"{home}/model"
    assert load_tokenizer("~/model")
    row = {"prompt": "say ab.", "chosen": "ab", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert len(build_dataset("~/pairs.jsonl", load_tokenizer("~/model"))) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "train --policy {policy} --objective sft --output_dir {out} --data.train ~nobody_here/x.jsonl",
        "train --policy ~nobody_here/m --objective sft --output_dir {out} --data.train bundled:train:2",
        "train --policy {policy} --scores ~nobody_here/s --output_dir {out} --data.train bundled:train:64 --dry_run",
        "scores ~nobody_here/s",
        "replay ~nobody_here/nonfinite-step-000001.json",
        "export ~nobody_here/checkpoints/step-000001",
        "plot ~nobody_here/run",
    ],
)
def test_the_home_of_nobody_is_refused_in_a_line(arguments, error_of, model_folder, capsys, tmp_path):
    given = arguments.format(policy=model_folder(seed=0), out=tmp_path / "out").split()
    capsys.readouterr()
    assert "~nobody_here/" in error_of(*given)


def test_a_file_of_a_cache_stands_for_its_folder(tmp_path, error_of):
    (tmp_path / "manifest.json").write_text("{}")
    assert f"{tmp_path / 'manifest.json'} is of format None" in error_of("scores", tmp_path / "manifest.json")
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "manifest.json").unlink()
    assert f"no score cache at {tmp_path}" in error_of("scores", tmp_path / "pairs.jsonl")


KEEPS = {"keep_best": "accuracy", "eval_every": 2, "max_steps": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "with --save_every 0 there is none but the last: set --save_every 2"),
        ({"save_every": 3}, "evaluations every 2 steps hardly ever meet checkpoints every 3: set --save_every 2"),
        ({"save_every": 2, "teacher": None, "scores": "s", "keep_best": "loss"}, "set --eval_scores or --teacher"),
    ],
)
def test_a_best_checkpoint_that_could_not_be_kept_is_refused(changes, message, make_config, run):
    with pytest.raises(ValueError, match=message):
        run(make_config(**KEEPS | changes))


def test_the_best_checkpoint_is_named_and_becomes_a_model(make_config, run):
    config = make_config(**KEEPS | {"save_every": 1, "objective": "dpo", "keep_checkpoints": 4})
    run(config)
    best = best_checkpoint(config)
    assert best.name in ("step-000002", "step-000004")
    last = Path(config.output_dir) / "checkpoints" / "step-000004"
    folder = export(last)
    assert folder == Path(config.output_dir).resolve() / "exported" / "step-000004"
    final = Path(config.output_dir) / "final"
    assert fingerprint_weights(load_model(folder)) == fingerprint_weights(load_model(final))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(final).get_vocab()
    with pytest.raises(ValueError, match="exists already"):
        export(last)


def test_an_evaluation_that_is_not_finite_is_reported_and_never_the_best(make_config, run, monkeypatch, capsys):
    evaluations = iter([math.nan, 0.25, math.nan])

    def evaluate(*args, **kwargs):
        return Evaluation(pairs=1, accuracy=next(evaluations), accuracy_ci=0.0, margin=0.0, margin_ci=0.0)

    monkeypatch.setattr("tvkd_fast.training.trainer.evaluate_held_out", evaluate)
    config = make_config(**KEEPS | {"save_every": 2, "max_steps": 6, "objective": "dpo", "keep_checkpoints": 1})
    with pytest.warns(UserWarning, match="is never the best") as warned:
        run(config)
    assert "eval/accuracy is nan at step 2: its checkpoint is never the best" in str(warned[0].message)
    assert best_checkpoint(config).name == "step-000004"
    evaluations = iter([math.nan] * 3)
    with pytest.warns(UserWarning, match="never the best"):
        train.run(replace(config, output_dir=f"{config.output_dir}2"))
    assert "best by accuracy: none, since no checkpoint on disk has a finite accuracy" in capsys.readouterr().out


def test_adapters_are_merged_into_an_export_as_into_final(make_config, run, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    config = make_config(objective="dpo", lora=LoraConfig(rank=2), student_layers=2, max_steps=2)
    run(config)
    out = Path(config.output_dir)
    main(["export", str(out / "checkpoints" / "step-000002"), "--output_dir", str(tmp_path / "model")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    found = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", out / "final")]
    assert fingerprint_weights(found[0]) == fingerprint_weights(found[1])


def test_a_checkpoint_is_distinguished_from_a_model(make_config, run, model_folder, tmp_path):
    config = make_config(objective="dpo", max_steps=1)
    run(config)
    out = Path(config.output_dir)
    step = out / "checkpoints" / "step-000001"
    load_tokenizer(config.policy).save_pretrained(step)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=rf"is a checkpoint of a run.* `tvkd export {step}`"):
            load(step)
        with pytest.raises(ValueError, match=rf"the newest by `tvkd export {step}`"):
            load(out / "checkpoints")
        with pytest.raises(ValueError, match=rf"is the folder of a run: its model is {out / 'final'}"):
            load(out)
    with pytest.raises(ValueError, match=r"is no whole checkpoint: give .*; there is .*step-000001"):
        export(out)
    os.rename(config.policy, tmp_path / "aside")
    os.rename(model_folder(seed=9), config.policy)
    with pytest.raises(ValueError, match="is another model than the one"):
        export(step)
    assert export(step, policy=tmp_path / "aside").is_dir()
    os.rename(config.policy, tmp_path / "another")
    with pytest.raises(ValueError, match=rf"no model at {config.policy}: .* --policy says where it is now"):
        export(step, tmp_path / "model")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_by_relative_paths_is_exported_from_anywhere(rank, make_config, run, tmp_path, monkeypatch):
    if rank:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    config = make_config(objective="dpo", max_steps=1, lora=LoraConfig(rank=rank))
    monkeypatch.chdir(Path(config.policy).parent)
    data = replace(config.data, train=os.path.relpath(str(config.data.train)))
    run(replace(config, policy=Path(config.policy).name, data=data))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    step = Path(config.output_dir) / "checkpoints" / "step-000001"
    recorded = json.loads((step / "state.json").read_text())["config"]
    assert recorded["policy"] == config.policy
    assert Path(recorded["data"]["train"]).is_absolute()
    folder = export(step, tmp_path / "model")
    final = Path(config.output_dir) / "final"
    assert fingerprint_weights(load_model(folder)) == fingerprint_weights(load_model(final))
    assert str(tmp_path) not in (folder / "README.md").read_text()
    if rank:
        assert adapter_folder(str(Path(config.output_dir) / "adapter")).base == config.policy


def test_names_that_are_no_place_here_are_recorded_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    config = TrainConfig(policy="smollm2-135m", teacher="org/name", output_dir="run", data=DataConfig(train="org/set"))
    assert to_record(config) == asdict(config)
    assert from_record(TrainConfig, to_record(config)) == config


def test_passes_over_the_data_are_whole(make_config, run):
    from tvkd_fast.training.metrics import read_metrics

    config = make_config(objective="dpo", max_steps=None, epochs=2, pairs_per_step=7, data_train_limit=10)
    run(replace(config, log_every=3))
    steps = [line["step"] for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "loss" in line]
    assert steps == [3]
