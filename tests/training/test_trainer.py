import json
import math
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.ops import HeadGradient
from tvkd_fast.training import trainer as trainer_module
from tvkd_fast.training.checkpoint import SHARD_OF_ONE, CheckpointError
from tvkd_fast.training.metrics import MetricsLog, read_metrics
from tvkd_fast.training.optim import OptimConfig, learning_rate
from tvkd_fast.training.train_config import TrainConfig


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def training_lines(config):
    """Return the lines of the run's metrics without the fields that depend on the clock."""
    measured = {"tokens_per_s", "pairs_per_s", "data_wait", "peak_memory_gb"}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines(config)]


@pytest.mark.parametrize("objective", ["sft", "dpo", "tvkd"])
def test_a_tiny_policy_learns_the_rule(objective, make_config, run):
    config = make_config(objective=objective, max_steps=40, pairs_per_step=8, eval_every=10)
    evaluation = run(config)
    log = [line for line in lines(config) if "loss" in line]
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["loss"] < log[0]["loss"]
    wanted = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "pairs_per_s", "data_wait", "peak_memory_gb", "fill"}
    if objective != "sft":
        wanted |= {"accuracy", "margin", "chosen_reward", "rejected_reward"}
        assert evaluation.accuracy > 0.8
        assert log[-1]["margin"] > 0
    if objective == "tvkd":
        wanted |= {"shaping_margin", "shaping_std_ratio", "shaping_length_correlation", "shaping_flipped"}
    assert all(set(line) == wanted for line in log)
    evals = [line for line in lines(config) if "eval/accuracy" in line]
    assert [line["step"] for line in evals] == [10, 20, 30, 40]
    assert evals[-1]["eval/accuracy"] == pytest.approx(evaluation.accuracy)
    assert evals[-1]["eval/pairs"] == 10


SPARSE = {"grad_mode": "sparse", "eps": 2.0**-8, "row_cap": 10**6, "max_tail": 1.0}


@pytest.mark.parametrize("head", [SPARSE, SPARSE | {"tail": "unbiased"}], ids=["even", "unbiased"])
def test_a_sparse_head_learns_and_says_what_it_kept(head, make_config, run):
    config = make_config(objective="dpo", max_steps=40, pairs_per_step=8, log_every=5, head=HeadGradient(**head))
    evaluation = run(config)
    log = [line for line in lines(config) if "loss" in line]
    assert evaluation.accuracy > 0.8
    assert all(line["head_dense_rows"] == 0 and line["head_entries"] > 1 for line in log)
    assert all(0 <= line["head_tail"] < 0.6 and line["head_marked"] >= 1 for line in log)


def test_a_sparse_head_that_keeps_everything_trains_as_an_exact_one(make_config, run, files):
    head = HeadGradient(**SPARSE | {"eps": 0.0})
    exact, sparse = (
        make_config(output_dir=str(files / name), **changes)
        for name, changes in (("exact", {}), ("sparse", {"head": head}))
    )
    run(exact)
    run(sparse)
    losses = [[line["loss"] for line in lines(config) if "loss" in line] for config in (exact, sparse)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_model_too_flat_is_trained_exactly_and_says_so(make_config, run):
    run(make_config(head=HeadGradient(grad_mode="sparse", eps=2.0**-4, max_tail=0.01)))
    # A random model of 262 tokens has no entry of 1/16.
    (line, *_) = [line for line in lines(make_config()) if "loss" in line]
    assert line["head_dense_rows"] == 1


@pytest.mark.parametrize("tail", ["even", "unbiased"])
def test_a_sparse_run_resumes_bit_for_bit(tail, make_config, run, files):
    settings = {"head": HeadGradient(**SPARSE | {"tail": tail}), "max_steps": 6, "save_every": 3}
    whole = make_config(output_dir=str(files / "whole"), **settings)
    run(whole)
    cut = make_config(output_dir=str(files / "cut"), **settings)
    run(cut)
    for path in (Path(cut.output_dir) / "checkpoints").glob("*6"):
        shutil.rmtree(path)
    run(cut)
    assert same(weights(whole), weights(cut))
    assert training_lines(whole) == training_lines(cut)


def test_another_gradient_is_another_run(make_config, run):
    run(make_config(max_steps=6, save_every=3))
    with pytest.raises(CheckpointError, match="made with another head"):
        run(make_config(max_steps=6, save_every=3, head=HeadGradient(grad_mode="sparse")))


def test_the_final_folder_loads_and_answers(make_config, run, chatml):
    config = make_config(max_steps=2)
    run(config)
    model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final")
    ids = torch.tensor([chatml("say red.")["input_ids"]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2).shape[1] > ids.shape[1]


def test_dpo_starts_at_log_two_and_margins_at_zero(make_config, run):
    config = make_config(objective="dpo", max_steps=1)
    run(config)
    first = lines(config)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-6)


def test_tvkd_without_alpha_is_dpo_bit_for_bit(make_config, run, files):
    dpo = make_config(objective="dpo", output_dir=str(files / "dpo"))
    tvkd = make_config(objective="tvkd", loss_alpha=0.0, output_dir=str(files / "tvkd"))
    run(dpo)
    run(tvkd)
    assert same(weights(dpo), weights(tvkd))


def test_micro_batches_do_not_change_where_a_run_goes(make_config, run, files):
    wholes = []
    for packing, pairs in (("padded", 1), ("padded", 4), ("unshared", 1), ("shared", 1)):
        folder = str(files / f"{packing}-{pairs}")
        config = make_config(
            pairs_per_micro_batch=pairs, output_dir=folder, optim_lr=1e-3, model=ModelConfig(packing=packing)
        )
        run(config)
        wholes.append((weights(config), [line["loss"] for line in lines(config) if "loss" in line]))
    for found, losses in wholes[1:]:
        assert all(torch.allclose(found[k], x, atol=1e-4) for k, x in wholes[0][0].items())
        assert losses == pytest.approx(wholes[0][1], abs=1e-4)


def test_the_metrics_say_how_full_the_rows_are(make_config, run):
    config = make_config(tokens_per_micro_batch=600, model=ModelConfig(packing="shared"))
    run(config)
    assert all(0.1 < line["fill"] <= 1 for line in lines(config) if "loss" in line)


def test_a_pair_longer_than_a_row_is_refused_by_name(make_config, run):
    with pytest.raises(ValueError, match=r"train.jsonl row \d+: the pair is longer than a packed row"):
        run(make_config(tokens_per_micro_batch=30))


class PulledPlugError(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 3, 4, 5])
def test_a_killed_run_resumes_bit_for_bit(killed_at, make_config, run, files, monkeypatch):
    whole = make_config(output_dir=str(files / "whole"), save_every=2, eval_every=3)
    broken = make_config(output_dir=str(files / "broken"), save_every=2, eval_every=3)
    run(whole)
    taken = 0
    real = trainer_module.train_step

    def stop_in_the_middle(*args, **kwargs):
        nonlocal taken
        taken += 1
        if taken > killed_at:
            raise PulledPlugError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "train_step", stop_in_the_middle)
        with pytest.raises(PulledPlugError):
            run(broken)
    torch.manual_seed(12345)
    run(broken)
    assert same(weights(whole), weights(broken))
    assert training_lines(whole) == training_lines(broken)


def test_a_finished_run_does_nothing_more(make_config, run, capsys):
    config = make_config()
    run(config)
    before, log = weights(config), lines(config)
    assert run(config) is None
    assert "finished already" in capsys.readouterr().out
    assert same(before, weights(config))
    assert lines(config) == log


def test_a_run_can_start_again_in_its_folder(make_config, run):
    run(make_config(seed=1))
    config = make_config(seed=2, resume=False, max_steps=4)
    run(config)
    assert [line["step"] for line in lines(config) if "loss" in line] == list(range(1, 5))
    folder = Path(config.output_dir)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000004"]
    assert [p.name for p in (folder / "checkpoints.before-1").iterdir()] == ["step-000006"]
    assert len(read_metrics(folder / "metrics.jsonl.before-1")) > len(lines(config))


def test_nothing_is_set_aside_where_there_was_nothing(make_config, run):
    config = make_config(objective="sft", resume=False, max_steps=1, save_every=-1)
    (Path(config.output_dir) / "checkpoints").mkdir(parents=True)
    run(config)
    run(replace(config, save_every=0))
    assert not list(Path(config.output_dir).glob("checkpoints.before-*"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 3}, "seed"),
        ({"loss_beta": 0.3}, r"loss \(beta 0.1, now 0.3\): give"),
        ({"optim_lr": 1e-3}, "optim"),
        ({"data_max_length": 8}, "dataset"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(changes, name, make_config, run):
    run(make_config())
    if name == "dataset":
        changes = {"data_max_length": 20}
    with pytest.raises(CheckpointError, match=rf"was made with another {name} .*--output_dir"):
        run(make_config(max_steps=6, **changes))


@pytest.mark.parametrize("role", ["policy", "teacher", "reference"])
def test_resuming_with_another_model_is_refused_by_its_role(role, make_config, run, model_folder):
    run(make_config())
    with pytest.raises(CheckpointError, match=f"was made with another {role}"):
        run(make_config(**{role: model_folder(seed=5)}))


def test_resuming_in_another_precision_is_refused(make_config, run):
    run(make_config())
    config = make_config()
    config.model.autocast = "bfloat16"
    with pytest.raises(CheckpointError, match="was made with another precision"):
        run(config)


def test_more_pairs_a_step_than_there_are_is_refused(make_config, run):
    with pytest.raises(ValueError, match=r"a step takes 25 pairs and the data has 24: .*lower --pairs_per_step"):
        run(make_config(pairs_per_step=25))


def test_a_full_disk_keeps_the_old_final_model(make_config, run, monkeypatch):
    run(make_config(max_steps=2))
    config = make_config(max_steps=2, seed=1, resume=False)
    before = weights(config)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkd_fast.training.final.save_model", full)
    with pytest.raises(ValueError, match=r"could not save the model to .*Free some space .*final is as it was"):
        run(config)
    assert same(weights(config), before)
    assert not list(Path(config.output_dir).glob(".final*"))


def test_tensorboard_gets_the_metrics_where_it_is_installed(make_config, run):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: make venv")
    config = make_config(max_steps=2)
    run(config)
    assert list((Path(config.output_dir) / "tensorboard").glob("events.out.tfevents.*"))


def test_trackers_get_the_metrics_where_they_are_asked_for(make_config, run, monkeypatch):
    logged, begun, ended = [], [], []
    tracked = SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: ended.append(True)
    )

    def init(**options):
        begun.append(options)
        return tracked

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    run(make_config(max_steps=2, trackers=["trackio"]))
    assert begun[0]["config"]["max_steps"] == 2
    assert [step for step, metrics in logged if "loss" in metrics] == [1, 2]
    assert all("step" not in metrics for _, metrics in logged)
    assert ended == [True]


def test_a_tracker_that_is_not_installed_is_refused(make_config, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install wandb, or leave it out of --trackers"):
        run(make_config(max_steps=2, trackers=["wandb"]))


def test_a_damaged_checkpoint_costs_only_its_steps(make_config, run, files):
    config = make_config(save_every=2, keep_checkpoints=3)
    run(config)
    expected = weights(config)
    newest = Path(config.output_dir) / "checkpoints" / "step-000006" / SHARD_OF_ONE
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="step-000006 is not a whole checkpoint"):
        run(config)
    assert same(weights(config), expected)


def test_shaping_that_outweighs_the_margins_is_warned_of_once(make_config, run):
    with pytest.warns(UserWarning, match="shaping outweighs the policy's margins") as warned:
        run(make_config(loss_alpha=1e4, loss_gamma=0.5, max_steps=24))
    assert sum("shaping outweighs" in str(w.message) for w in warned) == 1


def test_shaping_that_does_not_outweigh_them_is_not_warned_of(make_config, run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(make_config(loss_alpha=1e-3, max_steps=24))
        run(make_config(loss_alpha=1e4, max_steps=8, output_dir=make_config().output_dir + "-short"))


def test_bfloat16_autocast_trains(make_config, run):
    config = make_config(model=make_config().model, max_steps=30, objective="dpo")
    config.model.autocast = "bfloat16"
    assert run(config).accuracy > 0.8
    assert {t.dtype for t in weights(config).values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing_but_memory(mode, make_config, run, files):
    plain = make_config(output_dir=str(files / "plain"), max_steps=3)
    saved = make_config(output_dir=str(files / "saved"), max_steps=3)
    saved.model.activation_checkpointing = mode
    run(plain)
    run(saved)
    a, b = weights(plain), weights(saved)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_a_metrics_log_survives_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    log = MetricsLog(tmp_path, resume_from=1)
    log.write({"step": 2, "loss": float("inf"), "lr": 1.23456789e-9})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None, "lr": 1.2345679e-9},
    ]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 11, config) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == pytest.approx(1.0)
    assert rates[7] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)


def test_epochs_count_steps_where_none_are_given(make_config, run):
    config = make_config(max_steps=None, epochs=0.5)
    run(config)
    assert lines(config)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be a positive number"),
        ("eval_every", 5, r"need held-out pairs: set --data\.eval"),
        ("max_steps", 0, "max_steps must be at least 1"),
        ("pairs_per_step", 0, "pairs_per_step must be at least 1"),
        ("log_every", 0, "log_every must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(policy="p", output_dir="o", **{field: value})


def test_a_rate_that_learns_nothing_is_refused():
    with pytest.raises(ValueError, match=r"lr must be a positive number, got 0: set --optim\.lr"):
        OptimConfig(lr=0)


def test_a_line_that_the_disk_does_not_take_says_what_to_do(make_config, run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkd_fast.training.metrics._line", full)
    with pytest.raises(ValueError, match=r"could not write .*metrics.jsonl: .*No space left.*Free some space"):
        run(make_config())
