"""A policy and a teacher, small enough for every trainer to go through them in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def folders(model_folder: Callable[..., str], templateless: Any) -> tuple[str, str]:
    """Policy and teacher."""
    return model_folder(seed=0, tokenizer=templateless), model_folder(seed=1, tokenizer=templateless)


@pytest.fixture(autouse=True)
def _one_start() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_trainer(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., Any]:
    """A TVKDTrainer over six pairs of text, for one step; keywords of its config, or models."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tvkd_fast.integrations.trl import TVKDConfig, TVKDTrainer

    rows = [{"prompt": f"{i}: say it.", "chosen": " it" * (1 + i % 3), "rejected": f" no {i}"} for i in range(6)]

    def make(model: Any, teacher: Any, **changes: Any) -> Any:
        given = {name: changes.pop(name, None) for name in ("peft_config", "ref_model", "teacher_reference")}
        options = {
            "max_length": 40,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "max_steps": 1,
        }
        args = TVKDConfig(str(tmp_path), **options | changes, save_strategy="no", gradient_checkpointing=False)
        tokenizer, data = AutoTokenizer.from_pretrained(folders[0]), Dataset.from_list(rows)
        return TVKDTrainer(
            model, args=args, teacher_model=teacher, train_dataset=data, processing_class=tokenizer, **given
        )

    return make
