"""A policy and a teacher, small enough for every trainer to go through them in seconds."""

from collections.abc import Callable
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
