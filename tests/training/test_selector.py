"""Selection of a step's pairs: scores against float64 from whole logits, and what a run reports of them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.data import MicroBatching, build_dataset, packed_length
from tvkd_fast.data.selection import Selection
from tvkd_fast.distributed import World
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.wpo import WPO
from tvkd_fast.scoring import OnlineScorer
from tvkd_fast.training.checkpoint import CheckpointError
from tvkd_fast.training.metrics import METRICS, read_metrics
from tvkd_fast.training.selector import Selector


def of_response(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
    logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


@pytest.mark.parametrize("by", ["learnability", "easy_reference"])
def test_scores_are_losses_of_policy_and_teacher(
    by: Any, files: Path, chatml: Any, tiny_model: Any, in_float64: Any
) -> None:
    dataset = build_dataset(files / "train.jsonl", chatml, limit=6, max_length=40)
    policy, reference, teacher = (in_float64(tiny_model(seed)).eval() for seed in range(3))
    margins = [
        torch.stack([of_response(model, p.prompt_ids, ids) for p in dataset for ids in (p.chosen_ids, p.rejected_ids)])
        .view(-1, 2)
        .diff(dim=1)[:, 0]
        .neg()
        .detach()
        for model in (policy, reference, teacher)
    ]
    losses = [-(0.3 * (margin - margins[1])).sigmoid().log() for margin in margins]
    wanted = -losses[2] if by == "easy_reference" else losses[0] - losses[2]
    scorer = OnlineScorer(
        PolicyWithHead(reference, packing="shared"), TeacherWithHead(teacher, packing="shared"), of_teacher=("logps",)
    )
    places = [5, 0, 3, 1, 4, 2]
    for tokens in (2048, max(map(packed_length, dataset))):
        world = World(torch.device("cpu"))
        lent = PolicyWithHead(policy, packing="shared")
        rule = Selection(by, 0.5, 0.0)
        found = Selector(rule, lent, scorer, dataset, DPO(beta=0.3), MicroBatching(tokens=tokens), world).of(
            3, places, 2, seed=0
        )
        torch.testing.assert_close(found.scores, wanted[places].double(), rtol=1e-6, atol=1e-6)
        best = set(wanted.topk(2).indices.tolist())
        assert found.pairs == [place for place in places if place in best]
        assert found.kept.tolist() == [place in best for place in places]


@pytest.mark.parametrize("by", ["learnability", "easy_reference"])
def test_a_run_says_what_it_kept_and_resumes_as_it_went(by: str, make_config: Any, run: Any) -> None:
    changes = {"objective": "dpo", "data_select": by, "data_select_ratio": 0.5, "pairs_per_step": 2}
    config = make_config(**changes, max_steps=4, save_every=2, keep_checkpoints=5, log_every=1)
    run(config)
    folder = Path(config.output_dir)
    lines = [line for line in read_metrics(folder / METRICS) if "loss" in line]
    assert [line["select/kept"] for line in lines] == [0.5] * 4
    assert all(line["select/kept_score"] >= line["select/score"] for line in lines)
    for later in (folder / "checkpoints" / "step-000004", folder / "final"):
        shutil.rmtree(later)
    run(config)
    again = [line for line in read_metrics(folder / METRICS) if "loss" in line]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    with pytest.raises(CheckpointError, match=r"another selection \(ratio 0.5, now 0.25\)"):
        run(replace(config, data=replace(config.data, select_ratio=0.25)))


def test_a_cache_without_what_it_reads_is_refused(make_config: Any, run: Any, tmp_path: Path) -> None:
    config = make_config(objective="dpo", data_select="learnability", data_select_ratio=0.5, pairs_per_step=2)
    folder = str(tmp_path / "scores")
    kept = {"policy": config.policy, "teacher": config.teacher, "output_dir": folder, "data": config.data}
    score(ScoreConfig(**kept), show_progress=False)
    cached = replace(config, scores=folder, teacher=None)
    with pytest.raises(ValueError, match=r"do not hold the teacher's log-probabilities: add them .*--keep \[logps\]"):
        run(cached)
    score(ScoreConfig(**kept, keep=["logps"]), show_progress=False)
    figures = [run(one) for one in (cached, replace(config, output_dir=str(tmp_path / "online")))]
    assert figures[0].loss == pytest.approx(figures[1].loss, rel=1e-5)


def test_it_is_planned_and_refused_where_it_cannot_be(make_config: Any) -> None:
    selected = make_config(objective="dpo", data_select="learnability", data_select_ratio=0.5)
    text = plan(selected)
    assert "teacher     none" not in text
    with pytest.raises(ValueError, match=r"of which less than a step would be left; lower --data.select_ratio"):
        plan(make_config(objective="dpo", data_select="learnability", data_select_ratio=0.99))
    with pytest.raises(ValueError, match="sft has none: leave it out"):
        make_config(objective="sft", data_select="easy_reference")
    for name, loss in (("wpo", WPO()), ("mixture", Mixture(parts=[{"wpo": {}}, {"sft": {}}]))):
        with pytest.raises(ValueError, match=rf"{name} weighs pairs by the policy's whole distributions: leave it out"):
            replace(selected, objective=name, loss=loss)
    with pytest.raises(ValueError, match=r"--data.select needs a teacher: set --teacher, or --scores"):
        plan(replace(selected, teacher=None))
