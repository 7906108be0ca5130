"""Every file in examples/, on a tiny policy, over eight pairs: it trains, all train alike, however a step is cut up."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("*.py") if file.stem != "pairs")
NEEDS = {"accelerate_loop": "accelerate", "lightning_module": "lightning", "trl_trainer": "trl"}
SAME = ("plain_loop", "accelerate_loop", "transformers_trainer", "lightning_module")
"""The examples that go through the pairs in order, with one optimizer."""


@dataclass
class Run:
    """The results of an example: a loss per micro-batch or update, a gradient norm per update, and the saved model."""

    folder: Path
    losses: list[float]
    norms: list[float] = field(default_factory=list)


Once = Callable[[str, int, int], Run]


@pytest.fixture(scope="module")
def run(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Once:
    """An example by its name, the pairs of a micro-batch and the micro-batches of an update; each is run once, as if
    it had been started from a shell."""
    folder = tmp_path_factory.mktemp("examples")
    words = ["red", "green", "blue", "sun", "moon", "sea", "tree", "ab"]
    rows = [
        {"prompt": f"say {word}.", "chosen": f" {word}", "rejected": f" {word[::-1]}" * (i % 3 + 1)}
        for i, word in enumerate(words)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done: dict[tuple[str, int, int], Run] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def once(name: str, batch_size: int, accumulate: int) -> Run:
        package = NEEDS.get(name, "torch")
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
        asked = (name, batch_size, accumulate)
        if asked not in done:
            out = folder / "-".join(map(str, asked))
            given = {"--policy": folders[0], "--teacher": folders[1], "--data": folder / "pairs.jsonl", "--out": out}
            given |= {"--lr": 1e-3, "--batch_size": batch_size, "--accumulate": accumulate}
            found = done[asked] = Run(out, [])

            def clipped(*given: Any, **options: Any) -> torch.Tensor:
                # All of them come by here, and what is clipped afterwards hides a factor of the gradient.
                norm = clip(*given, **options)
                found.norms.append(float(norm))
                return norm

            with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
                patch.setattr(sys, "argv", [name, *(str(x) for option in given.items() for x in option)])
                patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
                patch.syspath_prepend(str(EXAMPLES))
                patch.setenv("ACCELERATE_USE_CPU", "true")
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            found.losses = [float(x) for x in re.findall(r"^loss ([\d.]+)", output.getvalue(), re.M)]
        return done[asked]

    return once


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_leaves_a_model(name: str, run: Once) -> None:
    folder = run(name, 4, 1).folder
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("name", SAME[1:])
def test_they_train_the_same(name: str, run: Once) -> None:
    ours, first = run(name, 4, 1), run(SAME[0], 4, 1)
    assert len(ours.losses) == len(first.losses) == 2
    assert ours.losses == pytest.approx(first.losses, rel=1e-4)
    assert ours.norms == pytest.approx(first.norms, rel=1e-4)


@pytest.mark.parametrize("cut", [(2, 2), pytest.param((1, 4), marks=pytest.mark.e2e)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_the_same_however_it_is_cut(name: str, cut: tuple[int, int], run: Once) -> None:
    whole, parts = run(name, 4, 1), run(name, *cut)
    assert len(whole.norms) == 2
    assert parts.norms == pytest.approx(whole.norms, rel=1e-4)
    weights, theirs = (load_file(found.folder / "model.safetensors") for found in (whole, parts))
    assert all(torch.allclose(theirs[key], weight, rtol=0, atol=1e-4) for key, weight in weights.items())
