"""What the planner says that a step sends, held to what two and four processes send over gloo."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_sends_what_is_counted(
    processes: int, tmp_path: Path, launch: Callable[..., str], write_recipe: Callable[..., Path]
) -> None:
    whole, every = {"vocabulary": "gathered"}, {"vocabulary": "gathered", "reduce": "micro_batch"}
    cases = {
        "one": {"tokens_per_micro_batch": 2048, "parallel": whole},
        "untied": {"family": "untied", "tokens_per_micro_batch": 2048, "parallel": whole},
        "several": {"tokens_per_micro_batch": 90, "parallel": whole, "pairs_per_step": 12},
        "every": {"tokens_per_micro_batch": 90, "parallel": every, "pairs_per_step": 12},
    }
    changes = {"objective": "dpo", "teacher": None, "data": {"train": str(tmp_path / "pairs.jsonl")}, "eval_every": 0}
    recipes = [write_recipe(tmp_path, name, **({"family": "tied"} | case | changes)) for name, case in cases.items()]
    lines = launch(processes, "sent_step.py", *map(str, recipes)).splitlines()
    found = dict(zip(cases, (json.loads(line) for line in lines if line.startswith("{")), strict=True))
    for one in found.values():
        assert one["sent"]["reduced"] == pytest.approx(one["counted"]["gradients, reduced"], rel=0.01)
        assert one["sent"]["gathered"] == pytest.approx(one["counted"]["weights, gathered"], rel=0.01)
    assert found["several"]["micro_batches"] > 1
    assert found["every"]["sent"]["reduced"] > 1.9 * found["several"]["sent"]["reduced"]
