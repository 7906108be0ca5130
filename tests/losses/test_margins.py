"""Examples of the docstrings, and the losses' slopes."""

import doctest

import torch

from tvkd_fast.losses import margins, robust_losses, sigmoid_losses


def test_the_examples_are_so() -> None:
    assert doctest.testmod(margins).failed == 0


def test_slopes_far_out_are_those_of_the_share_of_wrong_preferences() -> None:
    far = torch.tensor([-60.0, 60.0], dtype=torch.float64, requires_grad=True)
    (conservative,) = torch.autograd.grad(sigmoid_losses(far, label_smoothing=0.1).sum(), far)
    torch.testing.assert_close(conservative, torch.tensor([-0.9, 0.1], dtype=torch.float64))
    (robust,) = torch.autograd.grad(robust_losses(far, label_smoothing=0.1).sum(), far)
    torch.testing.assert_close(robust, torch.tensor([-0.9 / 0.8, -0.1 / 0.8], dtype=torch.float64))
