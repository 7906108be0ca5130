from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The same tests: compiled and marked `gpu` where there is one, interpreted without."""
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiles this small are lost in the threads' waiting for one another."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written is NaN: a kernel that reads it, or leaves it, shows."""
    with torch.device("cpu"):
        # torch lists its constructors at the first such block, and must not list the poisoned ones for good.
        torch.empty(0)
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Workspaces so small that a small case takes many blocks of rows and columns."""

    def shrink(workspace_bytes: int = 64 * 128 * 4, rows: int = 64, partial_floats: int = 2**20) -> None:
        monkeypatch.setattr("tvkd_fast.kernels.blocks.WORKSPACE_BYTES", workspace_bytes)
        monkeypatch.setattr("tvkd_fast.kernels.blocks.BLOCK_ROWS", rows)
        monkeypatch.setattr("tvkd_fast.kernels.head_stats.PARTIAL_FLOATS", partial_floats)

    return SimpleNamespace(shrink=shrink)
