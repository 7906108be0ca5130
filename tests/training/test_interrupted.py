"""Runs that are stopped, that meet a step which is not finite, and what is left to look at afterwards."""

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvkd_fast.cli import main as cli
from tvkd_fast.commands import replay
from tvkd_fast.training import trainer as trainer_module
from tvkd_fast.training.metrics import read_metrics
from tvkd_fast.training.signals import Stopped


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


def during_step(monkeypatch, number, act):
    """Does something as the run takes its step `number` (from 1)."""
    real, taken = trainer_module.train_step, 0

    def step(policy, *arguments, **options):
        nonlocal taken
        taken += 1
        if taken == number:
            act(policy)
        return real(policy, *arguments, **options)

    monkeypatch.setattr(trainer_module, "train_step", step)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(number, status, make_config, run, files, monkeypatch):
    whole = make_config(output_dir=str(files / "whole"))
    stopped = make_config(output_dir=str(files / "stopped"))
    run(whole)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        during_step(patch, 3, lambda policy: signal.raise_signal(number))
        with pytest.raises(Stopped, match=f"stopped by {number.name} after step 3: run the same command") as ended:
            run(stopped)
    assert ended.value.status == status
    assert signal.getsignal(number) is before
    assert not (files / "stopped" / "final").exists()
    assert [p.name for p in (files / "stopped" / "checkpoints").iterdir()] == ["step-000003"]
    run(stopped)
    ours, theirs = weights(whole), weights(stopped)
    assert all(torch.equal(theirs[name], x) for name, x in ours.items())


def test_a_signal_at_the_last_step_does_not_keep_the_run_from_ending(make_config, run, monkeypatch):
    during_step(monkeypatch, 6, lambda policy: signal.raise_signal(signal.SIGTERM))
    config = make_config()
    run(config)
    assert weights(config)


def test_the_command_ends_with_the_signals_status(make_config, model_folder, files, monkeypatch, capsys):
    during_step(monkeypatch, 2, lambda policy: signal.raise_signal(signal.SIGTERM))
    names = {"policy": model_folder(0), "objective": "dpo", "output_dir": str(files / "run"), "max_steps": "4"}
    names |= {"data.train": str(files / "train.jsonl"), "pairs_per_step": "4"}
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *(f"--{name}={value}" for name, value in names.items())])
    assert ended.value.code == 143
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err


def poison(policy):
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.inf)


@pytest.fixture
def ended(make_config, run, monkeypatch):
    """A run whose fourth step is not finite, and its error; its last checkpoint is of the second."""
    config = make_config(save_every=2)
    with monkeypatch.context() as patch:
        during_step(patch, 4, poison)
        with pytest.raises(FloatingPointError) as error:
            run(config)
    return config, str(error.value)


@pytest.fixture
def broken(ended):
    return ended[0]


def test_a_step_that_is_not_finite_says_which_rows_and_what_to_try(ended):
    config, error = ended
    assert error.startswith("the loss or the gradient of step 4 is NaN or inf, and the weights were left as they were")
    assert len(re.findall(r"train\.jsonl row \d+", error)) == 4
    for text in (
        f"`tvkd replay {config.output_dir}/nonfinite-step-000003.json`",
        "--optim.lr",
        "--nonfinite skip",
        "the newest checkpoint is step-000002",
    ):
        assert text in error


def test_a_step_that_is_not_finite_leaves_its_pairs(broken):
    record = json.loads((Path(broken.output_dir) / "nonfinite-step-000003.json").read_text())
    assert record["step"] == 3
    assert len(record["pairs"]) == 4
    assert record["config"]["policy"] == broken.policy


def test_it_is_replayed_pair_by_pair(broken, capsys):
    file = str(Path(broken.output_dir) / "nonfinite-step-000003.json")
    cli.main(["replay", file])
    output = capsys.readouterr().out
    record = json.loads(Path(file).read_text())
    rows = output.splitlines()[1:5]
    assert sorted(int(row.split()[0]) for row in rows) == record["pairs"]
    # The weights were poisoned in memory alone.
    assert "every pair is finite alone, under the weights of the newest checkpoint" in output
    assert all(math.isfinite(float(row.split()[2])) for row in rows)


def test_a_replay_of_bad_weights_names_the_pairs(broken, monkeypatch, capsys):
    real = replay.replay_pairs

    def poisoned(policy, *arguments, **options):
        poison(policy)
        return real(policy, *arguments, **options)

    monkeypatch.setattr(replay, "replay_pairs", poisoned)
    cli.main(["replay", str(Path(broken.output_dir) / "nonfinite-step-000003.json")])
    assert "4 of 4 pairs are not finite alone" in capsys.readouterr().out


def test_no_record_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", str(tmp_path / "a.json")])
    assert ended.value.code == 2
    assert "is no record of a step: give a nonfinite-step" in capsys.readouterr().err


def test_steps_that_are_not_finite_may_be_passed_over_and_are_counted(make_config, run, monkeypatch):
    config = make_config(nonfinite="skip", max_steps=5)
    kept = {}

    def poison_once(policy):
        weight = policy.model.model.norm.weight
        kept["before"] = weight.detach().clone()
        poison(policy)

    def heal(policy):
        with torch.no_grad():
            policy.model.model.norm.weight.copy_(kept["before"])

    real, taken = trainer_module.train_step, 0

    def step(policy, *arguments, **options):
        nonlocal taken
        taken += 1
        if taken == 3:
            poison_once(policy)
        out = real(policy, *arguments, **options)
        if taken == 3:
            heal(policy)
        return out

    monkeypatch.setattr(trainer_module, "train_step", step)
    run(config)
    lines = [line for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "loss" in line]
    assert [line.get("skipped") for line in lines] == [None, None, 1, None, None]
    assert lines[2]["loss"] is None
    assert all(math.isfinite(x) for x in (lines[3]["loss"], lines[4]["loss"]))


def test_runs_are_drawn_over_each_other(make_config, run, files, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'tvkd_fast[plot]'")
    for name in ("a", "b"):
        run(make_config(output_dir=str(files / name), eval_every=3))
    cli.main(["plot", str(files / "a"), str(files / "b")])
    path = Path(capsys.readouterr().out.strip())
    assert path == files / "a" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli.main(["plot", str(files / "nothing")])
    assert "has no metrics.jsonl: give the output_dir of a run" in capsys.readouterr().err
