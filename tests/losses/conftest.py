from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """2P packed responses of a teacher's states, chosen first; the two of a pair share s_0's value."""

    values: Tensor
    cu_states: Tensor
    ended: Tensor

    def of(self, i: int) -> list[float]:
        return self.values[self.cu_states[i] : self.cu_states[i + 1]].tolist()

    def __len__(self) -> int:
        return self.cu_states.numel() - 1


@st.composite
def responses(draw: st.DrawFn, shortest: int = 2) -> Responses:
    num_pairs = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(shortest, 12), min_size=2 * num_pairs, max_size=2 * num_pairs))
    cu_states = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    values = 5 * torch.randn(int(cu_states[-1]), generator=generator, dtype=torch.float64) + draw(
        st.sampled_from([0, 40])
    )
    values[cu_states[num_pairs:-1]] = values[cu_states[:num_pairs]]
    ended = torch.tensor(draw(st.lists(st.booleans(), min_size=2 * num_pairs, max_size=2 * num_pairs)))
    return Responses(values, cu_states, ended)


@st.composite
def sequence_logps(draw: st.DrawFn, num_pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """(2P,) policy and reference log-probabilities of whole responses, float64; the policy's ask for a gradient."""
    pairs = num_pairs or draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ref = -100 * torch.rand(2 * pairs, generator=generator, dtype=torch.float64)
    policy = ref + 20 * torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), ref


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    return SimpleNamespace(responses=responses, sequence_logps=sequence_logps)
