"""The command line's messages for options that do not exist, and for values that do not fit."""

import re

import pytest

from tvkd_fast.cli.main import main
from tvkd_fast.cli.options import ELSEWHERE, REMEDIES, hint
from tvkd_fast.cli.parser import COMMANDS, parser_of


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


MEANS = {
    "model_name_or_path": "--policy",
    "model": "--policy",
    "ref_model": "--reference",
    "dataset_name": "--data.train",
    "beta": "--loss.beta",
    "bf16": "--model.autocast bfloat16",
    "num_train_epochs": "--epochs",
    "logging_steps": "--log_every",
    "save_steps": "--save_every",
    "eval_steps": "--eval_every",
    "max_grad_norm": "--optim.clip_norm",
    "optim.learning_rate": "--optim.lr",
    "alpha": "--loss.alpha or --lora.alpha",
    "gradient_checkpointing": "--model.activation_checkpointing full",
    "max-steps": "--max_steps",
    "learning-rate": "--optim.lr",
    "lr": "--optim.lr",
    "lora-r": "--lora.rank",
    "optim-lr": "--optim.lr",
    "data_train": "--data.train",
    "seeds": "--seed",
    "wandb": "--trackers [wandb]",
    "attn": "--model.attn_implementation",
    "model.attn": "--model.attn_implementation",
}
SAYS = {
    "gradient_accumulation_steps": "Accumulation follows from --pairs_per_step",
    "max_prompt_length": "Prompts have no limit of their own: --data.max_length",
    "lora_dropout": "Adapters have no dropout",
    "lr_scheduler_type": "falls along a cosine",
}


@pytest.fixture(scope="module")
def known():
    return parser_of("train").known


def test_an_option_of_the_same_meaning_is_named(known):
    for word, option in MEANS.items():
        assert hint(word, known) == f" Did you mean {option}?", word
    for word, sentence in SAYS.items():
        assert sentence in hint(word, known), word


@pytest.mark.parametrize(
    ("command", "option", "wanted"),
    [
        ("eval --policy p", "--dataset", "Did you mean --data.eval?"),
        ("eval --policy p", "--dataset-name", "Did you mean --data.eval?"),
        ("eval --policy p", "--split", "Did you mean --data.eval_split?"),
        ("eval --policy p", "--batch-size", "Did you mean --pairs_per_micro_batch?"),
        ("explain --teacher p --output_dir o", "--dataset", "Did you mean --data.eval?"),
        ("score --policy p --output_dir o", "--dataset", "Did you mean --data.train?"),
        ("train --policy p --output_dir o", "--dry-run", "Did you mean --dry_run?"),
    ],
)
def test_what_is_named_is_what_the_command_reads(command, option, wanted, capsys):
    assert wanted in error_of(capsys, *command.split(), option, "x")


def test_a_folder_is_no_recipe(tmp_path, capsys):
    error = error_of(capsys, "train", "--config", str(tmp_path))
    assert error == f"tvkd: error: --config {tmp_path} is a folder: give a YAML file, or a recipe's name\n"


def test_nothing_is_made_up(known):
    assert hint("lora_x", known) == ""
    assert hint("zzz", known) == ""
    assert hint("workspace_kind_of", known) == ""


def test_what_is_named_is_an_option():
    options = {option for command in COMMANDS for option in parser_of(command).known}
    assert {name.split()[0] for name in ELSEWHERE} <= options
    assert all(set(re.findall(r"--([\w.]*\w)", sentence)) <= options for sentence in REMEDIES)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--optim.betas 0.9,0.95", "--optim.betas wants 2 values in brackets, such as [0.9,0.95], and got '0.9,0.95'"),
        ("--optim.betas 0.9", "such as [0.9,0.999], and got '0.9'"),
        ("--lora.targets q_proj", "--lora.targets wants a list, such as [q_proj], and got 'q_proj'"),
        ("--trackers tensorboard", "--trackers wants a list of wandb, trackio, such as [wandb]"),
        ("--keep_best", "--keep_best wants a value"),
        ("--model gpt2", "--model is no option but a group of them: --model.dtype"),
    ],
)
def test_a_value_that_does_not_fit_comes_with_what_to_type(arguments, wanted, capsys):
    error = error_of(capsys, "train", "--policy", "p", "--output_dir", "o", *arguments.split())
    assert wanted in error
    assert len(error.splitlines()) == 2


def test_yaml_gets_the_same_messages(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    for text, wanted in (
        ("gradient_accumulation_steps: 4", "Accumulation follows from --pairs_per_step"),
        ("lora: {targets: q_proj}", "such as [q_proj]"),
    ):
        config.write_text(f"policy: p\noutput_dir: o\n{text}\n")
        assert wanted in error_of(capsys, "train", "--config", str(config))
