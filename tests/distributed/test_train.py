"""Whole runs over two and four processes against the run of one: the same pairs, losses, evaluations and weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from tvkd_fast.training.metrics import read_metrics

pytestmark = pytest.mark.distributed

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
FAMILIES = {
    "tied": LlamaConfig(vocab_size=262, **SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(vocab_size=262, **SIZES, tie_word_embeddings=False),
    "gemma2": Gemma2Config(vocab_size=262, **SIZES, head_dim=8, sliding_window=8, final_logit_softcapping=5.0),
}
ONE, FOUR = 2048, 90
"""Tokens of a row: all of a step's pairs in one micro-batch, or about one in each."""
CASES: dict[str, dict[str, Any]] = {
    "tied-one": {"family": "tied", "tokens_per_micro_batch": ONE},
    "tied-four": {"family": "tied", "tokens_per_micro_batch": FOUR},
    "untied-four": {"family": "untied", "tokens_per_micro_batch": FOUR, "student_layers": 2},
    "gemma2-four": {"family": "gemma2", "tokens_per_micro_batch": FOUR},
    "padded": {"family": "tied", "model": {"packing": "padded"}, "pairs_per_micro_batch": 1},
    "recomputed": {"family": "untied", "model": {"activation_checkpointing": "full"}},
    "selective": {"family": "untied", "model": {"activation_checkpointing": "selective"}},
    "sft": {"family": "tied", "objective": "sft", "tokens_per_micro_batch": FOUR},
    "sparse": {"family": "tied", "head": {"grad_mode": "sparse", "eps": 1e-9, "row_cap": 10**6, "max_tail": 1.0}},
    "rewards": {"family": "tied", "loss": {"value_from": "implicit_reward"}},
}


def rows() -> Iterator[dict[str, str]]:
    words = ["red", "green", "blue", "sun", "moon", "sea", "tree"]
    for i in range(30):
        word, other = words[i % 7], words[(i * 3 + 1) % 7]
        yield {"prompt": f"{i}: say {word}.", "chosen": word, "rejected": f"{other} " * (1 + i % 4) + "no"}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    launch: Callable[..., str],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Path:
    """A folder with a run of every case in one, two and four processes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = make_tokenizer()
    for seed, role in enumerate(("policy", "teacher", "teacher_reference")):
        for name, config in FAMILIES.items():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"{name}-{role}")
            tokenizer.save_pretrained(folder / f"{name}-{role}")
    for name, case in CASES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(folder, **case)))
    for processes in (1, 2, 4):
        said = launch(processes, "train_cases.py", str(folder)).splitlines()
        assert [line.removeprefix("done: ") for line in said if line.startswith("done: ")] == sorted(CASES)
    return folder


def recipe(folder: Path, *, family: str, **changes: Any) -> dict[str, Any]:
    data = str(folder / "pairs.jsonl")
    fields: dict[str, Any] = {
        "policy": str(folder / f"{family}-policy"),
        "teacher": str(folder / f"{family}-teacher"),
        "output_dir": "set by the script",
        "data": {"train": data, "eval": data, "eval_limit": 7},
        "optim": {"lr": 3e-3, "warmup_steps": 4},
        "max_steps": 20,
        "pairs_per_step": 5,
        "eval_every": 10,
    }
    if changes.get("loss", {}).get("value_from") == "implicit_reward":
        fields["teacher_reference"] = str(folder / f"{family}-teacher_reference")
    return fields | changes


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_run_over_processes_is_the_run_of_one(case: str, processes: int, runs: Path) -> None:
    """Five pairs a step: of four processes one has two pairs, and of two one has an empty micro-batch more."""
    alone, shared = (read_metrics(runs / case / str(n) / "metrics.jsonl") for n in (1, processes))
    assert [line["step"] for line in shared] == [line["step"] for line in alone]
    for one, many in zip(alone, shared, strict=True):
        for name, value in one.items():
            if name in ("tokens_per_s", "pairs_per_s", "data_wait", "peak_memory_gb", "fill"):
                continue
            if name in ("loss", "eval/loss"):
                assert many[name] == pytest.approx(value, rel=1e-5), (one["step"], name)
            elif value is not None:
                assert many[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["step"], name)
    weights, theirs = (load_file(runs / case / str(n) / "final" / "model.safetensors") for n in (1, processes))
    assert weights.keys() == theirs.keys()
    assert all(torch.allclose(theirs[name], x, rtol=0, atol=1e-4) for name, x in weights.items())
    assert alone[-1]["step"] == 20
    assert alone[18]["loss"] < 0.9 * alone[0]["loss"]
