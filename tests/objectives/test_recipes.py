"""A recipe of each objective learns the batch that it is trained on, in ten steps of the packaged model."""

from dataclasses import replace
from pathlib import Path

import pytest

from tvkd_fast.cli.parser import load_recipe, recipes
from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.train import train
from tvkd_fast.objectives import objectives
from tvkd_fast.training.metrics import METRICS, read_metrics

OURS = [name for name in recipes() if name.endswith("-smollm2-135m") and not name.startswith("hh-")]


LLAMA = [name for name in recipes() if "llama3.2-1b" in name]


@pytest.mark.parametrize("name", LLAMA)
def test_recipes_of_a_gated_model_are_planned_without_it(name: str) -> None:
    recipe = load_recipe(name)
    text = plan(replace(recipe, device_memory_gib=80.0))
    assert f"objective   {recipe.objective}: " in text
    assert "available" in text


def test_every_objective_has_a_recipe_of_that_model() -> None:
    assert {load_recipe(name).objective for name in LLAMA} >= set(objectives())


@pytest.mark.e2e
@pytest.mark.parametrize("name", [*OURS, "ipo", "simpo"])
def test_ten_steps_on_one_batch_lower_its_loss(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    config = replace(
        recipe,
        output_dir=str(tmp_path / name),
        data=replace(recipe.data, train_limit=2, eval=None, max_length=128),
        optim=replace(recipe.optim, lr=1e-5, warmup_steps=0),
        rollout=replace(recipe.rollout, n=2, max_new_tokens=12) if recipe.sampled_share else recipe.rollout,
        max_steps=10,
        pairs_per_step=2,
        eval_every=0,
        save_every=-1,
    )
    train(config, show_progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path / name / METRICS) if "loss" in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
