"""Every file in examples/, as a user runs it: on a tiny policy, over eight pairs."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"accelerate_loop": "accelerate", "lightning_module": "lightning", "trl_trainer": "trl"}
SAME = ("plain_loop", "accelerate_loop", "transformers_trainer", "lightning_module")
"""Those that go through the pairs in order, with one optimizer."""


@pytest.fixture(scope="module")
def run(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> object:
    """An example's losses, and the folder that it wrote; each is run once."""
    folder = tmp_path_factory.mktemp("examples")
    words = ["red", "green", "blue", "sun", "moon", "sea", "tree", "ab"]
    rows = [
        {"prompt": f"say {word}.", "chosen": f" {word}", "rejected": f" {word[::-1]}" * (i % 3 + 1)}
        for i, word in enumerate(words)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done: dict[str, list[float]] = {}

    def once(name: str) -> tuple[list[float], Path]:
        package = NEEDS.get(name, "torch")
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
        if name not in done:
            command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--policy", folders[0], "--teacher", folders[1]]
            command += ["--data", str(folder / "pairs.jsonl"), "--out", str(folder / name), "--lr", "1e-3"]
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "ACCELERATE_USE_CPU": "true",
            }
            said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            assert said.returncode == 0, said.stderr
            done[name] = [float(x) for x in re.findall(r"^loss ([\d.]+)", said.stdout, re.M)]
        return done[name], folder / name

    return once


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("*.py") if file.stem != "pairs"))
def test_an_example_runs_and_leaves_a_model(name: str, run) -> None:  # type: ignore[no-untyped-def]
    _, folder = run(name)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("name", SAME[1:])
def test_they_train_the_same(name: str, run) -> None:  # type: ignore[no-untyped-def]
    losses, _ = run(name)
    first, _ = run(SAME[0])
    assert len(losses) == len(first) == 2
    assert losses == pytest.approx(first, rel=1e-4)
