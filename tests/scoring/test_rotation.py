"""Rotations of states: orthogonal at any width, and the same for a state and its head."""

import pytest
import torch

from tvkd_fast.ops import Head
from tvkd_fast.scoring.rotation import Rotation

WIDTHS = [1, 2, 3, 8, 12, 35, 96, 576, 577]


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_at_any_width(width):
    matrix = Rotation.seeded(width, 0).of(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_head_under_it_gives_the_same_logits(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 48, generator=draw, dtype=torch.float64) for n in (20, 5000))
    rotation, head = Rotation.seeded(48, 3), Head(weight.to(dtype), torch.ones(5000), 30.0, 0.5)
    folded = rotation.folded(head)
    assert (folded.bias is head.bias, folded.softcap, folded.logit_scale) == (True, 30.0, 0.5)
    assert folded.weight.dtype == dtype
    got = rotation.of(hidden.to(dtype)).double() @ folded.weight.double().T
    error = (got - hidden @ weight.T).norm() / (hidden @ weight.T).norm()
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_it_is_its_seeds():
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Rotation.seeded(24, 1).of(x), Rotation.seeded(24, 1).of(x))
    assert not torch.allclose(Rotation.seeded(24, 1).of(x), Rotation.seeded(24, 2).of(x))


@pytest.mark.parametrize("width", [576, 96])
def test_no_coordinate_stands_out_under_it(width):
    spikes = 50.0 * torch.eye(width)[:16] + torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    rotated = Rotation.seeded(width, 0).of(spikes)
    spread = rotated.abs().amax(1) / rotated.square().mean(1).sqrt()
    assert float(spread.max()) < 3.0 < float((spikes.abs().amax(1) / spikes.square().mean(1).sqrt()).min())


def test_what_is_not_orthogonal_is_refused():
    signs, eye = torch.ones(6), torch.eye(2)
    with pytest.raises(ValueError, match=r"not orthogonal: its product with its transpose is off by 1.0e-03"):
        Rotation(signs, [eye, torch.diag(torch.tensor([1.0, 1.0, 1.0005]))])
    with pytest.raises(ValueError, match="not orthogonal: its signs"):
        Rotation(2 * signs, [eye, torch.eye(3)])
    with pytest.raises(ValueError, match="not orthogonal"):
        Rotation(signs, [eye, torch.full((3, 3), torch.nan)])
    with pytest.raises(ValueError, match=r"factors are square, and one is \[3, 4\]"):
        Rotation(signs, [eye, torch.eye(3, 4)])
    with pytest.raises(ValueError, match="a rotation of 6 coordinates has factors of 2 x 2"):
        Rotation(signs, [eye, eye])
