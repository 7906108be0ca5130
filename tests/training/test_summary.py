"""The table at a run's end and the card beside its model."""

from pathlib import Path

import torch
import yaml

from tvkd_fast.commands.models import load_policy
from tvkd_fast.commands.train import train
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.training.optim import OptimConfig, make_optimizer
from tvkd_fast.training.usage import StepFlops, memory_by_part


def test_the_card_says_what_the_model_was_made_of_and_no_path(make_config, run, files):
    config = make_config(max_steps=2, lora=LoraConfig())
    run(config)
    card = (Path(config.output_dir) / "final" / "README.md").read_text()
    _, meta, body = card.split("---\n", 2)
    assert yaml.safe_load(meta)["tags"][0] == "tvkd"
    assert "| objective | tvkd |" in body
    assert "beta 0.1" in body
    assert "| data | train.jsonl |" in body
    assert "| accuracy |" in body
    assert str(files) not in card


def test_the_table_ends_a_run(make_config, capsys):
    train(make_config(max_steps=3))
    output = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in output if line.split()}
    assert rows["step"] == ["1", "3"]
    assert len(rows["loss"]) == 2
    assert "eval/accuracy" in rows
    assert any(line.startswith("AdamW's two moments, GB") for line in output)


def test_memory_and_arithmetic_are_counted_by_part(model_folder):
    policy = load_policy(model_folder(), ModelConfig())
    optimizer = make_optimizer(policy, OptimConfig())
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = memory_by_part(policy, optimizer)
    parameters = sum(p.numel() for p in policy.parameters())
    assert parts["policy weights"] == parts["gradients"] == 4 * parameters
    # Each has a step counter beside its two moments.
    assert parts["AdamW's two moments"] == 8 * parameters + 4 * len(list(policy.parameters()))
    flops = StepFlops(policy)
    blocks = sum(p.numel() for p in policy.model.model.layers.parameters() if p.dim() > 1)
    assert flops.of(10, 0) == 60 * blocks
    assert flops.of(0, 10) == 60 * policy.head.weight.numel()


def test_a_given_peak_gives_the_share_of_it(make_config, run):
    from tvkd_fast.training.metrics import read_metrics

    config = make_config(max_steps=2, peak_tflops=0.001)
    run(config)
    lines = [line for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "loss" in line]
    assert all(line["mfu"] > 0 for line in lines)
