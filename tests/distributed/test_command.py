"""`tvkd train --nproc 2` beside `tvkd train`, as a user starts them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tvkd_fast.cli.main import main
from tvkd_fast.training.metrics import read_metrics


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def tvkd(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """A command and how it ended. The command itself is called here; the processes that it starts are real ones."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        status = 0
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        return Done(status, *capfd.readouterr())

    return run


Tvkd = Callable[..., Done]


def test_the_same_command_over_two_processes(tmp_path: Path, write_recipe: Callable[..., Path], tvkd: Tvkd) -> None:
    recipe = str(write_recipe(tmp_path, "run", family="tied"))
    losses = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        options = ["--max_steps", "4", "--nproc", processes, "--output_dir", str(folder)]
        done = tvkd("train", "--config", recipe, *options)
        assert done.returncode == 0, done.stderr
        # Said once, however many there are.
        assert done.stdout.count("final model: ") == 1
        assert "peak_memory_gb" in done.stdout
        losses.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.e2e
def test_a_finished_run_says_so_in_two_processes(tmp_path: Path, write_recipe: Callable[..., Path], tvkd: Tvkd) -> None:
    recipe = str(write_recipe(tmp_path, "run", family="tied"))
    first, again = (tvkd("train", "--config", recipe, "--max_steps", "4", "--nproc", "2") for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0)
    assert "all 4 steps are finished already; nothing was done" in again.stdout


@pytest.mark.e2e
def test_two_processes_evaluate_as_one_does(tmp_path: Path, write_recipe: Callable[..., Path], tvkd: Tvkd) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path, "run", family="tied").read_text())
    options = ["--policy", recipe["policy"], "--reference", recipe["teacher"], "--data.eval", recipe["data"]["train"]]
    found = []
    for processes in ("1", "2"):
        done = tvkd("eval", *options, "--nproc", processes)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        found.append(json.loads(line))
        assert found[-1].pop("policy") == recipe["policy"]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.e2e
def test_two_processes_compare_models_as_one_does(
    tmp_path: Path, write_recipe: Callable[..., Path], tvkd: Tvkd
) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path, "run", family="tied").read_text())
    rows = [json.loads(line) for line in Path(recipe["data"]["train"]).read_text().splitlines()]
    bench = tmp_path / "bench.jsonl"
    # Subsets in turns: a pair that changed places would count for another one.
    named = [{"id": i, "subset": f"own-{i % 3}", **row} for i, row in enumerate(rows[:11])]
    bench.write_text("".join(json.dumps(row) + "\n" for row in named))
    options = ["--model", recipe["policy"], "--model", recipe["teacher"], "--data", str(bench)]
    options += ["--format", "rewardbench", "--tokens_per_micro_batch", "90"]
    found = []
    for processes in ("1", "2"):
        done = tvkd("eval", *options, "--nproc", processes)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines())
    assert found[1][:-1] == found[0][:-1]
    one, two = (json.loads(lines[-1]) for lines in found)
    assert {name: row["pairs"] for name, row in one["models"][0]["subsets"].items()} == {
        "own-0": 4,
        "own-1": 4,
        "own-2": 3,
    }
    assert two == one


@pytest.mark.e2e
def test_an_error_of_the_user_is_a_line_from_each_and_status_2(
    tmp_path: Path, write_recipe: Callable[..., Path], tvkd: Tvkd
) -> None:
    recipe = str(write_recipe(tmp_path, "run", family="tied"))
    done = tvkd("train", "--config", recipe, "--nproc", "2", "--parallel.replicas", "3")
    assert done.returncode == 2
    assert "3 replicas do not divide 2 processes: give a divisor of 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
def test_two_processes_sample_what_one_does(tmp_path: Path, model_folder: Callable[..., str], tvkd: Tvkd) -> None:
    policy, rows = model_folder(seed=0), []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        options = ["--data", "bundled:eval:5", "--n", "2", "--max_new_tokens", "6", "--prompts_per_shard", "3"]
        done = tvkd("sample", "--policy", policy, *options, "--nproc", processes, "--output_dir", str(folder))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("10 responses of ") == 1
        lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
        rows.append([json.loads(line) for line in lines])
    assert [row["completion_ids"] for row in rows[0]] == [row["completion_ids"] for row in rows[1]]
    assert [(row["source"], row["sample"]) for row in rows[0]] == [(row["source"], row["sample"]) for row in rows[1]]
