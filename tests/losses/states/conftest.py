from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

LENGTHS = (5, 1, 9, 2)


def states(width: int, seed: int, dtype: torch.dtype = torch.float64, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """States with a direction that all share, ten times as long as the rest, as language models' have."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.zeros(width, dtype=torch.float64)
    shared[0] = 10 * width**0.5
    return (torch.randn(sum(lengths), width, generator=draw, dtype=torch.float64) + shared).to(dtype)


def check_twin(
    ours: Callable[..., Tensor], twin: Callable[..., Tensor], leaves: Sequence[Tensor], *rest: Tensor
) -> None:
    """Values and gradients of `ours(*leaves, *rest, LENGTHS)` against those of `twin`, response by response.

    In float64 they are equal; in float32 the error is at most twice that of the twin's own in float32, plus 1e-5.
    """

    def of(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        others = [x.to(dtype) for x in rest]
        if function is ours:
            values = ours(*inputs, *others, LENGTHS)
        else:
            of_responses = zip(inputs[0].split(LENGTHS), others[-1].split(LENGTHS), strict=True)
            values = torch.stack([twin(h, *inputs[1:], t) for h, t in of_responses])
        upstream = torch.arange(1, len(values) + 1, dtype=dtype)
        return [values.detach(), *torch.autograd.grad(values, inputs, upstream)]

    for got, exact, plain in zip(
        of(ours, torch.float32), of(twin, torch.float64), of(twin, torch.float32), strict=True
    ):
        assert got.dtype == torch.float32
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed
    for got, exact in zip(of(ours, torch.float64), of(twin, torch.float64), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="session")
def clouds() -> SimpleNamespace:
    return SimpleNamespace(states=states, check_twin=check_twin, lengths=LENGTHS)
