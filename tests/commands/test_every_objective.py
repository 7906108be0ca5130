"""Every objective trains, is planned and evaluated, by what it needs and not by its name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tvkd_fast.commands.eval import EvalConfig, evaluate_policy
from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.evaluate import evaluate
from tvkd_fast.objectives import SCORED, TEACHER, Need, objectives
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.training.metrics import METRICS, read_metrics
from tvkd_fast.training.train_config import micro_batching

OF_REFERENCE = {Need.REFERENCE, Need.REFERENCE_STATES}
BY_WHAT_IS_NOT_SAVED = {"projected": "a projection that is", "okd": "a teacher whose adapters are"}
"""Objectives whose held-out loss is known during a run alone."""
every = pytest.mark.parametrize("name", objectives())


def settings_of(name: str, config: Any) -> dict[str, Any]:
    """The models and columns that the objective needs, and no others; labels of pairs are made of them."""
    needs = objectives()[name]().needs
    config.data.unpair = Need.LABELS in needs
    if Need.REWARDS in needs:
        for source in (config.data.train, config.data.eval):
            rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
            rewarded = [row | {"score_chosen": 1.0 + i % 3, "score_rejected": 0.5} for i, row in enumerate(rows)]
            Path(source).write_text("".join(json.dumps(row) + "\n" for row in rewarded))
    return {} if needs & TEACHER else {"teacher": None}


@pytest.fixture
def base(model_folder: Any) -> Callable[[str], dict[str, str]]:
    """The teacher's own reference, where the objective needs its states."""
    of_base = {"teacher_reference": model_folder(seed=2)}
    return lambda name: of_base if Need.BASE_STATES in objectives()[name]().needs else {}


@every
def test_it_trains_and_is_evaluated(name: str, make_config: Any, run: Any, base: Any) -> None:
    needs = objectives()[name]().needs
    config = make_config(objective=name, max_steps=4, eval_every=2, save_every=2, **base(name))
    config = replace(config, **settings_of(name, config))
    figures = run(config)
    lines = read_metrics(Path(config.output_dir) / METRICS)
    compares = Need.REJECTED in needs
    assert all(("margin" in line) == compares for line in lines if "loss" in line)
    assert (figures.reward_accuracy is not None) == compares
    assert (figures.loss is not None) == (Need.SAMPLER_LOGPS not in needs)
    assert all(("kl" in line) == (Need.LABELS in needs) for line in lines if "loss" in line)
    state = json.loads((Path(config.output_dir) / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["identity"]["loss"] == config.loss.settings()
    assert ("reference" in state["identity"]) == bool(needs & SCORED)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "opd", "dckd", "sparse_kl", "projected", "simpo", "tdpo1"])
def test_a_reference_answers_where_one_is_needed(name: str, make_config: Any, base: Any) -> None:
    needs = objectives()[name]().needs
    config = make_config(objective=name, **base(name))
    config = replace(config, **settings_of(name, config))
    made = prepare(config, World(torch.device("cpu")), verbose=False)
    assert made.held_out is not None
    batches = list(micro_batching(config).batches(made.held_out, range(len(made.held_out))))
    asked: list[Any] = []
    made.policy.model.base_model.register_forward_hook(lambda *_: asked.append(None))
    evaluate(made.policy, made.held_out, scorer=made.held_out_scorer, objective=config.loss)
    assert len(asked) == len(batches)
    scores = Scores() if made.held_out_scorer is None else made.held_out_scorer.of(batches[0])
    assert (scores.ref_logps is not None) == bool(needs & OF_REFERENCE)


@every
def test_it_is_planned(name: str, make_config: Any, base: Any) -> None:
    needs = objectives()[name]().needs
    config = make_config(objective=name, **base(name))
    text = plan(replace(config, **settings_of(name, config)))
    assert f"objective   {name}: " in text
    assert (f"reference   none ({name})" in text) == needs.isdisjoint(OF_REFERENCE)
    assert (f"teacher     none ({name})" in text) == (not needs & TEACHER)


@every
def test_a_policy_is_evaluated_by_it(name: str, make_config: Any, base: Any) -> None:
    needs = objectives()[name]().needs
    config = make_config(objective=name, **base(name))
    reference = config.policy if needs & SCORED else None
    teacher = config.teacher if needs & TEACHER else None
    settings_of(name, config)
    asked = EvalConfig(
        policy=config.policy, reference=reference, teacher=teacher, data=config.data, objective=name, **base(name)
    )
    if name in BY_WHAT_IS_NOT_SAVED:
        by = BY_WHAT_IS_NOT_SAVED[name]
        with pytest.raises(
            ValueError, match=rf"{name} measures by {by} trained with the policy .* another --objective"
        ):
            evaluate_policy(asked)
        return
    assert (evaluate_policy(asked).loss is not None) == (Need.SAMPLER_LOGPS not in needs)
