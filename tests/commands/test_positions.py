"""Rows longer than a model has positions, for each of the models that read them."""

import json
from dataclasses import replace

import pytest
from transformers import GPT2Config, LlamaConfig

from tvkd_fast.commands.compare import compare_models
from tvkd_fast.commands.eval import EvalConfig, evaluate_policy
from tvkd_fast.commands.explain import ExplainConfig, explain
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.models import load_stop_ids, longest_sequence
from tvkd_fast.objectives.sft import SFT

LONG = 3


@pytest.fixture
def data(tmp_path):
    """Pairs of which one has more than 64 tokens, byte by byte."""
    rows = [{"prompt": f"{i}: say.", "chosen": "yes", "rejected": "no"} for i in range(5)]
    rows[LONG]["prompt"] *= 9
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=str(path), eval=str(path))


def refused(whose, run, config):
    with pytest.raises(ValueError, match=rf"pairs.jsonl row {LONG} has \d+ tokens, and the {whose} was .* 64 pos"):
        run(config)


def quiet(run):
    return lambda config: run(config, show_progress=False)


def test_every_model_of_a_run_is_asked(make_config, model_folder, data, tmp_path):
    short = {"max_position_embeddings": 64}
    policy, teacher = model_folder(seed=0), model_folder(seed=1)
    short_policy, short_teacher = model_folder(seed=0, **short), model_folder(seed=1, **short)
    config = replace(make_config(policy=policy, teacher=teacher, max_steps=1), data=data)
    refused("policy", quiet(train), replace(config, policy=short_policy, objective="sft", loss=SFT(), teacher=None))
    refused("reference", quiet(train), replace(config, reference=short_policy))
    refused("teacher", quiet(train), replace(config, teacher=short_teacher))
    implicit = replace(config, teacher_reference=short_policy, loss=replace(config.loss, value_from="implicit_reward"))
    refused("teacher's reference", quiet(train), implicit)
    scores = ScoreConfig(output_dir=str(tmp_path / "scores"), policy=policy, teacher=short_teacher, data=data)
    refused("teacher", quiet(score), scores)
    refused("reference", quiet(score), replace(scores, policy=short_policy, teacher=None))
    held_out = EvalConfig(policy=policy, data=data)
    refused("policy", quiet(evaluate_policy), replace(held_out, policy=short_policy))
    refused("reference", quiet(evaluate_policy), replace(held_out, reference=short_policy))
    refused("model", quiet(compare_models), replace(held_out, compare=[short_policy]))
    drawn = ExplainConfig(teacher=short_teacher, data=data, output_dir=str(tmp_path / "drawn"))
    refused("teacher", explain, drawn)
    # The remedy that it names.
    cut = replace(held_out, policy=short_policy, data=replace(data, max_length=64))
    assert evaluate_policy(cut, show_progress=False).pairs == 5


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=100), 100),
        (LlamaConfig(max_position_embeddings=100, rope_parameters={"rope_type": "linear", "factor": 4.0}), 400),
        (
            LlamaConfig(
                max_position_embeddings=800,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200},
            ),
            800,
        ),
        (
            LlamaConfig(
                max_position_embeddings=200,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200},
            ),
            800,
        ),
    ],
)
def test_positions_are_those_that_a_scaling_gives(config, positions):
    assert longest_sequence(config) == positions


def test_stop_ids_are_read_from_where_the_model_has_them(model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LlamaConfig(eos_token_id=[7, 9]).to_dict()))
    assert load_stop_ids(folder) == {7, 9}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_stop_ids(folder) == {3}
    assert load_stop_ids(model_folder(seed=0)) == {2}
