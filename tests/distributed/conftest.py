"""Processes of gloo on this machine, as torchrun would start them."""

import copy
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import begin
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

Launch = Callable[..., str]

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
    "gemma2": Gemma2Config(
        vocab_size=262,
        **SIZES,
        head_dim=8,
        sliding_window=8,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
}
IMPORTED = [
    "tvkd_fast.cli.main",
    "tvkd_fast.commands.train",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gemma2.modeling_gemma2",
]
ROLES = ("policy", "teacher", "teacher_reference")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs a script of this folder in so many processes; what the first one prints.

    They are forked from one that has imported what all of them need, which takes seconds per process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)

    def run(processes: int, script: str, *arguments: str) -> str:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("output")
        started = []
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
            places |= {"MASTER_PORT": port}
            # The one they are forked from keeps the environment of its own start.
            environment = dict(os.environ) | {name: str(value) for name, value in places.items()}
            command = [str(Path(__file__).parent / script), *arguments]
            started.append(context.Process(target=begin, args=(environment, command, str(folder / str(rank)))))
            started[-1].start()
        for process in started:
            process.join(900)
            process.kill()
        output = [(folder / str(rank)).read_text() for rank in range(processes)]
        assert all(process.exitcode == 0 for process in started), "\n".join(output)
        return output[0]

    return run


@pytest.fixture
def family_config() -> Callable[[str], PretrainedConfig]:
    """A config of a family of this folder's runs, for a test to change."""
    return lambda family: copy.deepcopy(FAMILIES[family])


@pytest.fixture(scope="session")
def write_recipe(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., Path]:
    """Writes a run of 20 steps of five pairs as YAML, beside the tiny models and the pairs that it names."""

    def write(folder: Path, name: str, *, family: str, **changes: Any) -> Path:
        data = folder / "pairs.jsonl"
        if not data.exists():
            data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        for seed, role in enumerate(ROLES):
            if not (folder / f"{family}-{role}").exists():
                torch.manual_seed(seed)
                AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder / f"{family}-{role}")
                make_tokenizer().save_pretrained(folder / f"{family}-{role}")
        fields: dict[str, Any] = {
            "policy": str(folder / f"{family}-policy"),
            "teacher": str(folder / f"{family}-teacher"),
            "output_dir": str(folder / name),
            "data": {"train": str(data), "eval": str(data), "eval_limit": 7} | changes.pop("data", {}),
            "optim": {"lr": 3e-3, "warmup_steps": 4},
            "max_steps": 20,
            "pairs_per_step": 5,
            "eval_every": 10,
        }
        if changes.get("loss", {}).get("value_from") == "implicit_reward":
            fields["teacher_reference"] = str(folder / f"{family}-teacher_reference")
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return path

    return write


def rows() -> Iterator[dict[str, str | float]]:
    words = ["red", "green", "blue", "sun", "moon", "sea", "tree"]
    for i in range(30):
        word, other = words[i % 7], words[(i * 3 + 1) % 7]
        rewards = {"score_chosen": 1.0 + i % 3, "score_rejected": 0.5}
        yield {"prompt": f"{i}: say {word}.", "chosen": word, "rejected": f"{other} " * (1 + i % 4) + "no", **rewards}
