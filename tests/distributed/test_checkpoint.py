"""Checkpoints that several processes write, and that any number of them reads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tvkd_fast.training.metrics import read_metrics

Launch = Callable[..., str]


def test_saved_damaged_and_refused(tmp_path: Path, launch: Launch) -> None:
    saved, warned, refused = launch(2, "checkpoint_cases.py", str(tmp_path)).strip().splitlines()
    assert saved == "saved and loaded"
    assert "step-000002 is not a whole checkpoint (shard-00002-model-00001-of-00001.safetensors does not" in warned
    # The process that could not write is not the one that tells of it.
    assert "could not save step 3" in refused
    assert "step-000001 is kept and will be resumed from" in refused


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, launch: Launch, write_recipe: Callable[..., Path]
) -> None:
    """Two processes, then four, then one: stopped by SIGTERM, and at the end where one alone would be."""
    recipes = {name: str(write_recipe(tmp_path, name, family="untied")) for name in ("alone", "moved")}
    launch(1, "resume_case.py", recipes["alone"], "0")
    for processes, steps, after in ((2, 6, 6), (4, 7, 13)):
        output = launch(processes, "resume_case.py", recipes["moved"], str(steps))
        assert f"stopped by SIGTERM after step {after}: run the same command to resume 143" in output
    launch(1, "resume_case.py", recipes["moved"], "0")
    alone, moved = (
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("alone", "moved")
    )
    assert [step for step, _ in moved] == list(range(1, 21))
    assert [loss for _, loss in moved] == pytest.approx([loss for _, loss in alone], rel=1e-5)
