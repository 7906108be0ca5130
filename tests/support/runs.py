"""Fixtures of training runs: a tiny policy, teacher and set of pairs."""

import json
from dataclasses import replace

import pytest

from tvkd_fast.commands.train import train
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.objectives import DEFAULT, objective_named
from tvkd_fast.training.optim import OptimConfig
from tvkd_fast.training.train_config import TrainConfig

WORDS = ["red", "green", "blue", "sun", "moon", "sea", "tree", "ab", "bread", "stone"]


def rows(count, start=0):
    """Pairs with one rule to learn: the chosen answer repeats the word, the rejected one is another word."""
    for i in range(start, start + count):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 7 + 3) % len(WORDS)]
        yield {"prompt": f"{i}: say {word}.", "chosen": word, "rejected": f"{other} " * (1 + i % 3) + "no"}


@pytest.fixture
def files(tmp_path):
    for name, content in (("train", rows(24)), ("eval", rows(10, start=100))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


@pytest.fixture
def make_config(files, model_folder):
    """A run of a tiny policy under a tiny teacher; fields and `loss_`, `optim_`, `data_` fields may be changed."""

    def make(**changes):
        loss = objective_named(changes.get("objective", DEFAULT))()
        nested = {"loss": loss, "optim": OptimConfig(lr=1e-2, warmup_steps=1)}
        nested["data"] = DataConfig(train=str(files / "train.jsonl"), eval=str(files / "eval.jsonl"))
        for name in [n for n in changes if n.split("_")[0] in nested]:
            group, field = name.split("_", 1)
            nested[group] = replace(nested[group], **{field: changes.pop(name)})  # type: ignore[type-var]
        defaults = {
            "policy": model_folder(seed=0),
            "teacher": model_folder(seed=1),
            "output_dir": str(files / "run"),
            "max_steps": 6,
            "pairs_per_step": 4,
            "pairs_per_micro_batch": 2,
        }
        return TrainConfig(**(defaults | nested | changes))

    return make


@pytest.fixture
def run():
    return lambda config: train(config, show_progress=False)
