"""Whole runs over two and four processes against the run of one: the same pairs, losses, evaluations and weights."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tvkd_fast.training.metrics import read_metrics

# The runs are made once, by the worker that holds them all to each other.
pytestmark = pytest.mark.xdist_group("runs")
Launch = Callable[..., str]

ONE, FOUR = 2048, 90
"""Tokens of a row: all of a step's pairs in one micro-batch, or about one in each."""
SPARSE = {"grad_mode": "sparse", "eps": 1e-9, "row_cap": 10**6, "max_tail": 1.0}
KTO = {"objective": "kto", "loss": {"beta": 0.5}, "data": {"unpair": True}}
SELECTED = {"select": "learnability", "select_ratio": 0.5, "select_temperature": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "tied-one": {"family": "tied", "tokens_per_micro_batch": ONE},
    "tied-four": {"family": "tied", "tokens_per_micro_batch": FOUR},
    "untied-four": {"family": "untied", "tokens_per_micro_batch": FOUR, "student_layers": 2},
    "gemma2-four": {"family": "gemma2", "tokens_per_micro_batch": FOUR},
    "cached": {"family": "tied", "scores": "made by the script"},
    "pruned": {"family": "tied", "student_layers": 2},
    "reduced": {"family": "untied", "tokens_per_micro_batch": FOUR, "parallel": {"reduce": "micro_batch"}},
    "replicas": {"family": "tied", "tokens_per_micro_batch": FOUR},
    "shared-replicas": {"family": "tied", "parallel": {"vocabulary": "shared"}},
    "bf16": {"family": "untied", "model": {"autocast": "bfloat16"}},
    "compiled": {"family": "untied", "model": {"compile": True}, "tokens_per_micro_batch": FOUR},
    "padded": {"family": "tied", "model": {"packing": "padded"}, "pairs_per_micro_batch": 1},
    "recomputed": {"family": "untied", "model": {"activation_checkpointing": "full"}},
    "selective": {"family": "untied", "model": {"activation_checkpointing": "selective"}},
    "sft": {"family": "tied", "objective": "sft", "tokens_per_micro_batch": FOUR},
    "sparse": {"family": "tied", "head": SPARSE},
    "shared-tied": {"family": "tied", "parallel": {"vocabulary": "shared"}},
    "shared-untied": {"family": "untied", "parallel": {"vocabulary": "shared"}, "tokens_per_micro_batch": FOUR},
    "shared-gemma2": {"family": "gemma2", "parallel": {"vocabulary": "shared"}},
    "shared-sparse": {"family": "tied", "parallel": {"vocabulary": "shared"}, "head": SPARSE},
    "lora-tied": {"family": "tied", "lora": {"rank": 4}, "optim": {"lr": 3e-2}, "tokens_per_micro_batch": FOUR},
    "lora-gemma2": {"family": "gemma2", "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]}, "optim": {"lr": 3e-2}},
    "offloaded": {"family": "tied", "parallel": {"cpu_offload": True}, "tokens_per_micro_batch": FOUR},
    "rewards": {"family": "tied", "loss": {"value_from": "implicit_reward"}},
    "wpo": {"family": "tied", "objective": "wpo", "loss": {"beta": 0.1}, "tokens_per_micro_batch": FOUR},
    "shared-wpo": {"family": "untied", "objective": "wpo", "loss": {"beta": 0.1}, "parallel": {"vocabulary": "shared"}},
    "dadpo": {"family": "tied", "objective": "dadpo", "tokens_per_micro_batch": FOUR},
    "cached-dadpo": {"family": "tied", "objective": "dadpo", "scores": "made by the script"},
    "cached-states": {"family": "tied", "objective": "forward_kl", "scores": "made by the script"},
    "d_dpo": {"family": "tied", "objective": "d_dpo", "tokens_per_micro_batch": FOUR},
    "kto": {"family": "tied", **KTO, "tokens_per_micro_batch": FOUR},
    "cached-kto": {"family": "tied", **KTO, "scores": "made by the script"},
    "selected": {"family": "tied", "data": SELECTED, "tokens_per_micro_batch": FOUR},
    "tdpo2": {"family": "tied", "objective": "tdpo2", "tokens_per_micro_batch": FOUR},
    "jsd": {"family": "untied", "objective": "jsd", "tokens_per_micro_batch": FOUR},
    "opd": {
        "family": "tied",
        "objective": "opd",
        "loss": {"lambda_": 1.25},
        "rollout": {"n": 2, "max_new_tokens": 6, "every": 3},
        "tokens_per_micro_batch": FOUR,
    },
    "lora-opd": {
        "family": "untied",
        "objective": "opd",
        "rollout": {"max_new_tokens": 6},
        "lora": {"rank": 4},
        "optim": {"lr": 3e-2},
    },
    "mixture": {
        "family": "tied",
        "objective": [{"dpo": {"beta": 0.3}}, {"forward_kl": {}, "weight": 0.5}],
        "tokens_per_micro_batch": FOUR,
    },
    "self_distillation": {"family": "tied", "objective": "self_distillation", "tokens_per_micro_batch": FOUR},
    "relational": {"family": "tied", "objective": "relational", "tokens_per_micro_batch": FOUR},
    "mixkd": {"family": "tied", "objective": "mixkd", "tokens_per_micro_batch": FOUR},
}
OF_EACH_KIND = ["tied-four", "cached", "shared-untied", "lora-tied"]
"""The runs of one and two processes in the first tier."""
AS_IN_TWO = ["cached", "pruned", "reduced", "bf16", "padded", "recomputed", "selective", "sft", "sparse", "offloaded"]
AS_IN_TWO += ["rewards", "compiled", "wpo", "dadpo", "cached-dadpo", "cached-states", "d_dpo"]
AS_IN_TWO += ["tdpo2", "jsd", "mixture", "kto", "cached-kto", "selected", "opd", "lora-opd"]
AS_IN_TWO += ["self_distillation", "relational", "mixkd"]
"""Runs that are the same in two and in four processes; in four they take a minute and a half more."""
REPLICAS = {"replicas": "tied-four", "shared-replicas": "shared-tied"}
"""Runs of two replicas in four processes; one and two processes make the named run."""
OTHERS = [case for case in CASES if case not in {*OF_EACH_KIND, *REPLICAS}]
IN_FOUR = [case for case in CASES if case not in AS_IN_TWO]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, case in CASES.items():
        write_recipe(folder, name, **case)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, launch: Launch) -> Path:
    """A folder with a run of each kind in one and two processes."""
    for processes in (1, 2):
        make(folder, launch, processes, OF_EACH_KIND)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs: Path, launch: Launch) -> Path:
    """The same with a run of every case, and of most of them in four processes."""
    for processes, cases in ((1, OTHERS), (2, OTHERS), (4, IN_FOUR)):
        make(runs, launch, processes, cases)
    return runs


@pytest.fixture(scope="module")
def all_runs(more_runs: Path, launch: Launch) -> Path:
    make(more_runs, launch, 4, AS_IN_TWO)
    return more_runs


def make(folder: Path, launch: Launch, processes: int, cases: Iterable[str]) -> None:
    recipes = [str(folder / f"{case}.yaml") for case in cases]
    output = launch(processes, "train_cases.py", *recipes).splitlines()
    assert [line.removeprefix("done: ") for line in output if line.startswith("done: ")] == list(cases)


@pytest.mark.parametrize("case", OF_EACH_KIND)
def test_a_run_over_two_processes_is_the_run_of_one(case: str, runs: Path) -> None:
    """Five pairs per step: one of them has an empty micro-batch more."""
    hold_to_one(case, 2, runs)


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "case"), [(2, case) for case in OTHERS] + [(4, case) for case in IN_FOUR])
def test_and_so_are_all_others(case: str, processes: int, more_runs: Path) -> None:
    """Test steps of which one of four processes has two pairs."""
    hold_to_one(case, processes, more_runs)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", AS_IN_TWO)
def test_and_so_are_all_others_in_four(case: str, all_runs: Path) -> None:
    hold_to_one(case, 4, all_runs)


def hold_to_one(case: str, processes: int, runs: Path) -> None:
    # Sharded weights are gathered in bfloat16, those of the embedding too.
    tolerance = 2e-2 if case == "bf16" else 1e-5
    folders = runs / REPLICAS.get(case, case) / "1", runs / case / str(processes)
    alone, shared = (read_metrics(folder / "metrics.jsonl") for folder in folders)
    assert [line["step"] for line in shared] == [line["step"] for line in alone]
    for one, many in zip(alone, shared, strict=True):
        for name, value in one.items():
            if name in ("tokens_per_s", "pairs_per_s", "data_wait", "peak_memory_gb", "fill"):
                continue
            if name.startswith("rollout/") and name.endswith(("_share", "/tokens_per_s")):
                continue
            if case == "shared-sparse" and name.startswith("head_"):
                # They tell of the rows that a process has.
                continue
            if name == "accuracy" and abs(one["margin"]) < 1e-6:
                # Policy and reference are one at the first step: rounding alone decides which response is preferred.
                continue
            if name in ("loss", "eval/loss"):
                assert many[name] == pytest.approx(value, rel=tolerance), (one["step"], name)
            elif case != "bf16" and value is not None:
                assert many[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["step"], name)
    weights, theirs = (load_file(folder / "final" / "model.safetensors") for folder in folders)
    assert weights.keys() == theirs.keys()
    if case != "bf16":
        assert all(torch.allclose(theirs[name], x, rtol=0, atol=1e-4) for name, x in weights.items())
    assert alone[-1]["step"] == 20
    assert alone[18]["loss"] < 0.9 * alone[0]["loss"]
