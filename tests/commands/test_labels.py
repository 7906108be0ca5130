"""Runs over rows of one response with a label: read, scored to disk, trained and evaluated."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resumed import losses

from tvkd_fast.commands.eval import EvalConfig, evaluate_policy
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.objectives.sft import SFT


@pytest.fixture
def labelled(make_config: Any, write_jsonl: Callable[..., Path]) -> Callable[..., Any]:
    """A run of KTO over labelled rows, of which `share` are desirable, and over held-out ones."""

    def make(share: int = 2, **changes: Any) -> Any:
        config = make_config(objective="kto", teacher=None, max_steps=3, eval_every=3, **changes)
        for which in ("train", "eval"):
            pairs = [json.loads(line) for line in Path(getattr(config.data, which)).read_text().splitlines()]
            rows = [
                {"prompt": pair["prompt"], "completion": pair["chosen"], "label": i % share == 0}
                for i, pair in enumerate(pairs)
            ]
            setattr(config.data, which, str(write_jsonl(rows, f"labelled-{which}.jsonl")))
        return config

    return make


def test_a_run_on_scores_is_the_online_run(labelled: Any, run: Any, tmp_path: Path) -> None:
    config = labelled()
    figures = run(config)
    assert figures.loss is not None
    folder = str(tmp_path / "scores")
    score(ScoreConfig(policy=config.policy, output_dir=folder, data=config.data), show_progress=False)
    cached = replace(config, scores=folder, output_dir=str(tmp_path / "cached"))
    assert run(cached).loss == pytest.approx(figures.loss, rel=1e-5)
    assert losses(cached) == pytest.approx(losses(config), rel=1e-5)
    alone = evaluate_policy(
        EvalConfig(policy=config.policy, reference=config.policy, data=config.data, objective="kto", loss=config.loss)
    )
    # A policy that is its reference has no rewards: every loss is one half.
    assert alone.loss == pytest.approx(0.5)
    assert alone.margin == pytest.approx(0.0, abs=1e-5)


def test_pairs_may_be_held_out(labelled: Any, make_config: Any, run: Any) -> None:
    config = labelled()
    config.data.eval = make_config().data.eval
    figures = run(config)
    assert figures.loss is None
    alone = evaluate_policy(
        EvalConfig(
            policy=str(Path(config.output_dir) / "final"), reference=config.policy, data=config.data, objective="dpo"
        )
    )
    assert figures.reward_accuracy == alone.reward_accuracy
    assert figures.reward_margin == pytest.approx(alone.reward_margin, rel=1e-4)


def test_undesirable_responses_are_not_learned_from_as_chosen_ones(labelled: Any, run: Any) -> None:
    config = labelled()
    config = replace(config, objective="sft", loss=SFT(), eval_every=0, data=replace(config.data, eval=None))
    with pytest.raises(ValueError, match=r"row 1: a response to learn from is undesirable .*take --objective kto"):
        run(config)
    rows = len(Path(config.data.train).read_text().splitlines())
    dropped = replace(config, max_steps=None, pairs_per_step=1, data=replace(config.data, bad_pairs="drop"))
    run(dropped)
    assert len(losses(dropped)) == rows // 2


def test_what_is_no_labelled_set_is_refused(labelled: Any, make_config: Any, run: Any) -> None:
    with pytest.raises(ValueError, match=r"responses are desirable, and nothing sets them apart.*--objective sft"):
        run(labelled(share=1))
    with pytest.raises(ValueError, match=r"wanted: prompt, completion, label.*--data.unpair true"):
        run(make_config(objective="kto", teacher=None))
    with pytest.raises(ValueError, match=r"dpo reads no labels: leave --data.unpair out, or take --objective kto"):
        make_config(objective="dpo", data_unpair=True)
    config = labelled()
    with pytest.raises(ValueError, match="judged by rewards over a reference: give --reference"):
        evaluate_policy(EvalConfig(policy=config.policy, data=config.data, objective="kto"))
