"""Consequences of docs/method.md's formulas for shaping returns, a loop as their twin, and the diagnostics."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.losses import ShapingReport, shaping_report, shaping_returns
from tvkd_fast.losses.shaping import TERMINALS

gammas = st.sampled_from([0.0, 0.3, 0.95, 1.0])
terminals = st.sampled_from(TERMINALS)


def psi_by_hand(v: list[float], gamma: float, terminal: str, ended: bool) -> float:
    """Compute Ψ of one response, state after state, as the formula is written."""
    v = list(v)
    if terminal == "zero":
        v[-1] = 0.0
    if terminal == "last_content" and ended:
        v.pop()
    return math.fsum(gamma * after - before for before, after in pairwise(v))


@draws(40)
@given(data=st.data(), gamma=gammas, terminal=terminals)
def test_every_response_against_a_loop(make: SimpleNamespace, data: st.DataObject, gamma: float, terminal: Any) -> None:
    """Any mixture of responses that end and that were cut off, of any number of states from 2 up (fact 4)."""
    responses = data.draw(make.responses())
    psi = shaping_returns(responses.values, responses.cu_states, gamma=gamma, terminal=terminal, ended=responses.ended)
    by_hand = [psi_by_hand(responses.of(i), gamma, terminal, bool(responses.ended[i])) for i in range(len(responses))]
    torch.testing.assert_close(psi, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=1e-11)


@draws(40)
@given(data=st.data(), terminal=terminals)
def test_fact_1_shaping_telescopes(make: SimpleNamespace, data: st.DataObject, terminal: Any) -> None:
    responses = data.draw(make.responses())
    psi = shaping_returns(responses.values, responses.cu_states, terminal=terminal, ended=responses.ended)
    first = responses.values[responses.cu_states[:-1]]
    last_kept = responses.cu_states[1:] - 1 - (responses.ended & (terminal == "last_content")).long()
    last = torch.zeros_like(first) if terminal == "zero" else responses.values[last_kept]
    torch.testing.assert_close(psi, last - first, rtol=1e-12, atol=1e-11)


@draws(40)
@given(data=st.data(), terminal=terminals)
def test_fact_1_only_the_last_kept_state_matters(make: SimpleNamespace, data: st.DataObject, terminal: Any) -> None:
    """Other values in all states between change no pair's difference, and neither does another prompt's value."""
    responses = data.draw(make.responses(shortest=3))
    half = len(responses) // 2
    changed = 100 * torch.randn_like(responses.values)
    changed[responses.cu_states[half:-1]] = changed[responses.cu_states[:half]]
    kept = responses.cu_states[1:] - 1 - (responses.ended & (terminal == "last_content")).long()
    changed[kept] = responses.values[kept]
    psi, other = (
        shaping_returns(values, responses.cu_states, terminal=terminal, ended=responses.ended)
        for values in (responses.values, changed)
    )
    torch.testing.assert_close(psi[:half] - psi[half:], other[:half] - other[half:], rtol=1e-10, atol=1e-10)


@draws(40)
@given(data=st.data(), gamma=gammas)
def test_fact_2_with_terminal_zero(make: SimpleNamespace, data: st.DataObject, gamma: float) -> None:
    """Ψ = −V(s_0) − (1−γ) Σ_{t=1}^{T−1} V(s_t): where γ < 1 every state counts."""
    responses = data.draw(make.responses())
    psi = shaping_returns(responses.values, responses.cu_states, gamma=gamma, terminal="zero", ended=responses.ended)
    closed = [-v[0] - (1 - gamma) * math.fsum(v[1:-1]) for v in map(responses.of, range(len(responses)))]
    torch.testing.assert_close(psi, torch.tensor(closed, dtype=torch.float64), rtol=1e-12, atol=1e-11)


@draws(40)
@given(data=st.data(), gamma=gammas, terminal=terminals)
def test_everything_has_ended_by_default(
    make: SimpleNamespace, data: st.DataObject, gamma: float, terminal: Any
) -> None:
    responses = data.draw(make.responses())
    arguments = {"gamma": gamma, "terminal": terminal}
    expected = shaping_returns(
        responses.values, responses.cu_states, ended=torch.ones(len(responses), dtype=torch.bool), **arguments
    )
    assert torch.equal(shaping_returns(responses.values, responses.cu_states, **arguments), expected)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_response_that_is_only_an_end(terminal: Any) -> None:
    """Two states: the prompt predicts the end. Its step to the end is nothing, V(s_1) − V(s_0), or −V(s_0)."""
    psi = shaping_returns(torch.tensor([3.0, 7.0]), torch.tensor([0, 2]), terminal=terminal)
    assert psi.item() == {"last_content": 0.0, "eos": 4.0, "zero": -3.0}[terminal]


def test_values_are_left_as_they_were() -> None:
    values = torch.tensor([3.0, 7.0, 1.0])
    shaping_returns(values, torch.tensor([0, 3]), terminal="zero")
    assert values.tolist() == [3.0, 7.0, 1.0]


def test_float32_values_are_summed_in_float64() -> None:
    count = 100_000
    values = 40 + torch.rand(count, generator=torch.Generator().manual_seed(0))
    psi = shaping_returns(values, torch.tensor([0, count]), gamma=0.95, terminal="eos")
    v = values.double()
    assert psi.dtype == torch.float32
    assert psi.item() == pytest.approx(float((0.95 * v[1:] - v[:-1]).sum()), rel=1e-7)


def test_integer_boundaries_of_32_bits() -> None:
    values = torch.randn(9)
    cu_states = torch.tensor([0, 4, 9])
    assert torch.equal(shaping_returns(values, cu_states), shaping_returns(values, cu_states.int()))


def test_no_responses_at_all() -> None:
    assert shaping_returns(torch.zeros(0), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_gamma_that_is_no_discount(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
        shaping_returns(torch.zeros(2), torch.tensor([0, 2]), gamma=gamma)


def test_an_unknown_terminal() -> None:
    unknown: Any = "last"
    with pytest.raises(ValueError, match="terminal must be one of last_content, eos, zero, got 'last'"):
        shaping_returns(torch.zeros(2), torch.tensor([0, 2]), terminal=unknown)


def test_values_that_are_not_packed() -> None:
    with pytest.raises(ValueError, match=r"values must be \(M,\), packed, got \(2, 3\)"):
        shaping_returns(torch.zeros(2, 3), torch.tensor([0, 2]))


def test_boundaries_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="cu_states must rise from 0 to 5, the number of packed entries"):
        shaping_returns(torch.zeros(5), torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("cu_states", "message"), [([0, 2, 3, 5], "response 1 has 1 states"), ([0, 0, 5], "response 0 has 0")]
)
def test_a_response_with_too_few_states(cu_states: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*s_0 and at least one more are needed"):
        shaping_returns(torch.zeros(5), torch.tensor(cu_states))


@pytest.mark.parametrize("ended", [torch.ones(2), torch.ones(3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)])
def test_ends_that_do_not_fit(ended: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"ended must be \(2,\) bool, one per response, got"):
        shaping_returns(torch.zeros(5), torch.tensor([0, 2, 5]), ended=ended)


@draws(40)
@given(pairs=st.integers(2, 30), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_report_against_numpy(pairs: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rho, length = rng.normal(size=pairs), rng.integers(-50, 50, size=pairs)
    psi = scale * rng.normal(size=pairs) + 0.01 * length
    report = shaping_report(*(torch.from_numpy(x) for x in (rho, psi, length)))
    assert report.std_ratio == pytest.approx(psi.std() / rho.std())
    assert report.length_correlation == pytest.approx(np.corrcoef(psi, length)[0, 1])
    assert report.flipped == pytest.approx(np.mean(np.sign(rho) != np.sign(rho - psi)))


@pytest.mark.parametrize(("ratio", "warns"), [(0.5, False), (0.999, False), (1.001, True), (50.0, True)])
def test_the_warning_begins_where_shaping_outweighs_the_margins(ratio: float, warns: bool) -> None:
    rho = torch.tensor([1.0, -1.0, 3.0, -3.0])
    warning = shaping_report(rho, ratio * rho, torch.tensor([1, 2, 3, 4])).warning
    assert (warning is not None) == warns
    if warning is not None:
        assert f"std(αΔΨ)/std(βΔρ) = {ratio:.2f}" in warning
        assert "Lower --loss.alpha" in warning


def test_the_warnings_figures() -> None:
    warning = ShapingReport(std_ratio=4.8, length_correlation=0.995, flipped=0.25).warning
    assert warning is not None
    assert warning.startswith(
        "shaping outweighs the policy's margins: std(αΔΨ)/std(βΔρ) = 4.80 (correlation with length +0.99, 25% of signs"
    )


def test_a_report_of_what_does_not_vary() -> None:
    """Test one pair, constant lengths, an unmoved policy and no shaping: figures, never NaN."""
    still, moved, one = torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.ones(1)
    assert shaping_report(moved, still, moved) == ShapingReport(0.0, 0.0, 0.0)
    assert shaping_report(still, moved, torch.ones(3)).std_ratio == math.inf
    assert shaping_report(still, moved, torch.ones(3)).length_correlation == 0.0
    rounded = torch.tensor([1e-6, -2e-6, 3e-7])
    assert shaping_report(rounded, moved, torch.ones(3)) == shaping_report(still, moved, torch.ones(3))
    assert shaping_report(one, 0.5 * one, one) == ShapingReport(0.0, 0.0, 0.0)
