import pytest
import torch

from tvkd_fast.losses import sft_loss


def test_the_mean_negative_log_likelihood_a_token() -> None:
    logps = torch.tensor([-6.0, -2.0, -4.0], requires_grad=True)
    loss = sft_loss(logps, 8)
    assert loss.item() == 1.5
    assert torch.equal(torch.autograd.grad(loss, logps)[0], torch.full((3,), -1 / 8))


def test_micro_batches_add_up_to_their_batch() -> None:
    logps = -10 * torch.rand(6, dtype=torch.float64)
    whole = sft_loss(logps, 31)
    torch.testing.assert_close(sft_loss(logps[:2], 31) + sft_loss(logps[2:], torch.tensor(31)), whole)


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_no_tokens_to_learn_from(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"num_tokens must be at least 1, got {num_tokens}: there is no response"):
        sft_loss(torch.zeros(2), num_tokens)
