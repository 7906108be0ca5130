"""Consequences of docs/method.md's formulas for TVKD's loss, values and gradients."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.losses import TVKDOutput, dpo_loss, segment_sums, shaping_returns, tvkd_loss

betas = st.sampled_from([0.01, 0.1, 1.0])
alphas = st.sampled_from([-1.5, 0.3, 1.0])
smoothings = st.sampled_from([0.0, 0.1, 0.4])


def gradient(out: TVKDOutput, logps: Tensor) -> Tensor:
    return torch.autograd.grad(out.loss, logps, retain_graph=True)[0]


@draws(40)
@given(data=st.data(), beta=betas, alpha=alphas, smoothing=smoothings)
def test_the_loss_pair_by_pair(
    make: SimpleNamespace, data: st.DataObject, beta: float, alpha: float, smoothing: float
) -> None:
    policy, ref = data.draw(make.sequence_logps())
    psi = torch.randn_like(ref)
    out = tvkd_loss(policy, ref, psi, beta=beta, alpha=alpha, label_smoothing=smoothing)
    half = len(ref) // 2
    for i in range(half):
        rho_w, rho_l = policy[i] - ref[i], policy[half + i] - ref[half + i]
        m = beta * (rho_w - rho_l) - alpha * (psi[i] - psi[half + i])
        by_hand = (1 - smoothing) * (1 + (-m).exp()).log() + smoothing * (1 + m.exp()).log()
        torch.testing.assert_close(out.losses[i], by_hand)
        torch.testing.assert_close(out.chosen_rewards[i], beta * rho_w.detach())
        torch.testing.assert_close(out.rejected_rewards[i], beta * rho_l.detach())
        torch.testing.assert_close(out.margins[i], beta * (rho_w - rho_l).detach())
        torch.testing.assert_close(out.shaping_margins[i], alpha * (psi[i] - psi[half + i]))
    torch.testing.assert_close(out.loss, out.losses.mean())
    assert out.accuracy.item() == pytest.approx((out.margins > 0).double().mean().item())


@draws(40)
@given(data=st.data(), beta=betas, alpha=alphas, smoothing=smoothings)
def test_fact_5_the_gradient_is_one_number_a_pair(
    make: SimpleNamespace, data: st.DataObject, beta: float, alpha: float, smoothing: float
) -> None:
    """dL/dlog π(y_t) = ∓β[(1−λ)σ(−m) − λσ(m)]/P at every token of the chosen/rejected response."""
    policy, ref = data.draw(make.sequence_logps())
    psi = torch.randn_like(ref)
    pairs = len(ref) // 2
    lengths = torch.arange(1, len(ref) + 1)
    per_token = (policy.detach() / lengths).repeat_interleave(lengths).requires_grad_()
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    out = tvkd_loss(segment_sums(per_token, cu_seqlens), ref, psi, beta=beta, alpha=alpha, label_smoothing=smoothing)
    m = out.margins - out.shaping_margins
    of_a_pair = beta * ((1 - smoothing) * torch.sigmoid(-m) - smoothing * torch.sigmoid(m)) / pairs
    by_formula = torch.cat([-of_a_pair, of_a_pair]).repeat_interleave(lengths)
    torch.testing.assert_close(gradient(out, per_token), by_formula)


@draws(40)
@given(data=st.data(), beta=betas, alpha=alphas, smoothing=smoothings)
def test_fact_1_zero_terminal_without_discount_is_dpo(
    make: SimpleNamespace, data: st.DataObject, beta: float, alpha: float, smoothing: float
) -> None:
    responses = data.draw(make.responses())
    policy, ref = data.draw(make.sequence_logps(len(responses) // 2))
    psi = shaping_returns(responses.values, responses.cu_states, gamma=1.0, terminal="zero", ended=responses.ended)
    tvkd = tvkd_loss(policy, ref, psi, beta=beta, alpha=alpha, label_smoothing=smoothing)
    dpo = dpo_loss(policy, ref, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(tvkd.losses, dpo.losses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(tvkd, policy), gradient(dpo, policy), rtol=1e-10, atol=1e-12)


@draws(40)
@given(data=st.data(), beta=betas, alpha=alphas, smoothing=smoothings)
def test_fact_3_shaping_is_an_offset_of_the_reference(
    make: SimpleNamespace, data: st.DataObject, beta: float, alpha: float, smoothing: float
) -> None:
    """TVKD is DPO against a reference moved by αΨ/β: Ψ enters as a number, whatever the policy does."""
    policy, ref = data.draw(make.sequence_logps())
    psi = torch.randn_like(ref)
    tvkd = tvkd_loss(policy, ref, psi, beta=beta, alpha=alpha, label_smoothing=smoothing)
    dpo = dpo_loss(policy, ref + alpha * psi / beta, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(tvkd.losses, dpo.losses)
    torch.testing.assert_close(gradient(tvkd, policy), gradient(dpo, policy))


@draws(40)
@given(data=st.data())
def test_a_number_added_to_both_of_a_pair_changes_nothing(make: SimpleNamespace, data: st.DataObject) -> None:
    policy, ref = data.draw(make.sequence_logps())
    psi, prompts = torch.randn_like(ref), torch.randn(len(ref) // 2, dtype=ref.dtype)
    out, shifted = tvkd_loss(policy, ref, psi), tvkd_loss(policy, ref, psi + prompts.repeat(2))
    torch.testing.assert_close(out.losses, shifted.losses)


@draws(40)
@given(data=st.data(), alpha=alphas)
def test_a_negative_alpha_flips_the_shaping(make: SimpleNamespace, data: st.DataObject, alpha: float) -> None:
    policy, ref = data.draw(make.sequence_logps())
    psi = torch.randn_like(ref)
    flipped, negated = tvkd_loss(policy, ref, psi, alpha=-alpha), tvkd_loss(policy, ref, -psi, alpha=alpha)
    assert torch.equal(flipped.losses, negated.losses)
    assert torch.equal(flipped.shaping_margins, -tvkd_loss(policy, ref, psi, alpha=alpha).shaping_margins)


@draws(40)
@given(data=st.data(), beta=betas, smoothing=smoothings, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_alpha_0_is_dpo_bit_by_bit(
    make: SimpleNamespace, data: st.DataObject, beta: float, smoothing: float, dtype: torch.dtype
) -> None:
    policy, ref = (x.detach().to(dtype) for x in data.draw(make.sequence_logps()))
    policy.requires_grad_()
    dpo = dpo_loss(policy, ref, beta=beta, label_smoothing=smoothing)
    for psi in (torch.randn_like(ref), torch.full_like(ref, torch.nan), None):
        tvkd = tvkd_loss(policy, ref, psi, alpha=0.0, beta=beta, label_smoothing=smoothing)
        for name in (field.name for field in fields(TVKDOutput)):
            assert torch.equal(getattr(tvkd, name), getattr(dpo, name)), name
        assert torch.equal(gradient(tvkd, policy), gradient(dpo, policy))


def test_micro_batches_of_losses_add_up_to_their_batch(make: SimpleNamespace) -> None:
    policy, ref, psi = torch.randn(3, 8, dtype=torch.float64)
    whole = tvkd_loss(policy, ref, psi)
    first, rest = torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5, 6, 7])
    parts = [tvkd_loss(policy[rows], ref[rows], psi[rows]).losses.sum() for rows in (first, rest)]
    torch.testing.assert_close(sum(parts) / 4, whole.loss)


def test_only_the_losses_carry_gradients() -> None:
    policy = torch.randn(6, requires_grad=True)
    out = tvkd_loss(policy, torch.randn(6), torch.randn(6), label_smoothing=0.1)
    carrying = {field.name for field in fields(out) if getattr(out, field.name).requires_grad}
    assert carrying == {"loss", "losses"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_have_the_policys_dtype(dtype: torch.dtype) -> None:
    out = tvkd_loss(torch.randn(4, dtype=dtype), torch.randn(4, dtype=dtype), torch.randn(4, dtype=torch.float64))
    assert {getattr(out, field.name).dtype for field in fields(out)} == {dtype}


def test_a_reference_of_another_dtype_does_not_change_the_policys() -> None:
    out = tvkd_loss(torch.randn(4), torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    assert {getattr(out, field.name).dtype for field in fields(out)} == {torch.float32}


@pytest.mark.parametrize("gap", [-1e6, 1e6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_margins_far_out_stay_finite(gap: float, smoothing: float) -> None:
    policy = torch.tensor([gap, 0.0], requires_grad=True)
    out = tvkd_loss(policy, torch.zeros(2), torch.zeros(2), beta=1.0, label_smoothing=smoothing)
    assert out.loss.isfinite()
    assert gradient(out, policy).isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_a_beta_that_is_no_strength(beta: float) -> None:
    for loss in (
        lambda: dpo_loss(torch.zeros(2), torch.zeros(2), beta=beta),
        lambda: tvkd_loss(torch.zeros(2), torch.zeros(2), None, beta=beta),
    ):
        with pytest.raises(ValueError, match=r"beta must be a positive number \(0.1 is usual\), got"):
            loss()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be finite \(0 is DPO\), got"):
        tvkd_loss(torch.zeros(2), torch.zeros(2), None, alpha=alpha)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, float("nan")])
def test_a_label_smoothing_that_leaves_no_label(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got .*: at 0.5 a label says nothing"):
        dpo_loss(torch.zeros(2), torch.zeros(2), label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2), ()])
def test_rows_that_are_no_pairs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"policy_logps must be \(2P,\), chosen rows first, then as many rejected"):
        dpo_loss(torch.zeros(shape), torch.zeros(shape))


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"ref_logps must be \(4,\) like policy_logps, got \(2,\)"):
        tvkd_loss(torch.zeros(4), torch.zeros(2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"psi must be \(4,\) like policy_logps, got \(4, 1\)"):
        tvkd_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1))
