"""Examples over two processes: the update of one, in half as many micro-batches each."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "transformers_trainer": "accelerate",
    "trl_trainer": "trl",
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", NEEDS)
def test_two_processes_train_as_one(
    name: str,
    tmp_path: Path,
    launch: Callable[..., str],
    model_folder: Callable[..., str],
    templateless: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four pairs are an update, whatever their order, which Lightning draws: 4x1 in one process, 1x2 in each of two."""
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: pip install {NEEDS[name]}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ["red", "green", "blue", "sun"]
    rows = [{"prompt": f"say {word}.", "chosen": f" {word}", "rejected": f" {word[::-1]} no"} for word in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy, teacher = (model_folder(seed=seed, tokenizer=templateless) for seed in (0, 1))
    norms, weights = [], []
    for processes, batch_size, accumulate in ((1, 4, 1), (2, 1, 2)):
        out = tmp_path / str(processes)
        given = {"--policy": policy, "--teacher": teacher, "--data": tmp_path / "pairs.jsonl", "--out": out}
        given |= {"--lr": 1e-3, "--batch_size": batch_size, "--accumulate": accumulate}
        options = [str(x) for option in given.items() for x in option]
        output = launch(processes, "recorded_example.py", str(EXAMPLES / f"{name}.py"), *options)
        norms.append([float(x) for x in re.findall(r"^norm (\S+)", output, re.MULTILINE)])
        weights.append(load_file(out / "model.safetensors"))
    assert len(norms[0]) == 1
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert all(torch.allclose(weights[1][key], weight, rtol=0, atol=1e-4) for key, weight in weights[0].items())
