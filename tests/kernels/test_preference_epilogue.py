"""The epilogue against `tvkd_fast.losses` put together in float64: interpreted, or compiled where a GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels.preference_epilogue import EpilogueResult, preference_epilogue
from tvkd_fast.losses import segment_sums, shaping_returns, tvkd_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
AROUND_A_BLOCK = [1023, 1024, 1025, 2048] if GPU else [63, 64, 65, 128, 150]
lengths_of_responses = st.integers(0, 5) | st.sampled_from(AROUND_A_BLOCK)
TINY = torch.finfo(torch.float32).tiny
"""Below it a float32 has no relative accuracy."""


@dataclass(frozen=True)
class Pairs:
    """One call of the epilogue: its tensors and its settings."""

    logps: Tensor
    cu_seqlens: Tensor
    ref_token_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    cu_states: Tensor | None = None
    ended: Tensor | None = None
    psi: Tensor | None = None
    beta: float = 0.1
    alpha: float = 1.0
    gamma: float = 1.0
    terminal: str = "last_content"
    label_smoothing: float = 0.0


def boundaries(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    sequences = 2 * draw(st.integers(1, 4))

    def of_each(what: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(what, min_size=sequences, max_size=sequences))

    index_dtypes = st.sampled_from([torch.int32, torch.int64])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lengths = of_each(lengths_of_responses)
    logps = -4 * torch.rand(sum(lengths), generator=generator)
    cu_seqlens = boundaries(lengths, draw(index_dtypes))
    ref_token_logps = logps + torch.randn(sum(lengths), generator=generator) / 3
    case = Pairs(
        logps,
        cu_seqlens,
        beta=draw(st.sampled_from([0.1, 1.0])),
        alpha=draw(st.sampled_from([0, 1, -0.5])),
        gamma=draw(st.sampled_from([0, 0.9, 1])),
        terminal=draw(st.sampled_from(["last_content", "eos", "zero"])),
        label_smoothing=draw(st.sampled_from([0, 0.1, 0.4])),
    )
    if draw(st.booleans()):
        case = replace(case, ref_token_logps=ref_token_logps)
    else:
        case = replace(case, ref_logps=segment_sums(ref_token_logps, cu_seqlens))
    shaping = draw(st.sampled_from(["values", "values and ended", "psi", "none"]))
    if shaping.startswith("values"):
        states = of_each(st.integers(2, 6) | st.sampled_from(AROUND_A_BLOCK))
        values = draw(st.sampled_from([0, 40])) + 2 * torch.randn(sum(states), generator=generator)
        case = replace(case, values=values, cu_states=boundaries(states, draw(index_dtypes)))
    if shaping == "values and ended":
        case = replace(case, ended=torch.tensor(of_each(st.booleans())))
    if shaping == "psi":
        case = replace(case, psi=3 * torch.randn(sequences, generator=generator))
    return case


def epilogue(case: Pairs) -> EpilogueResult:
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in vars(case).items()}
    found = preference_epilogue(**moved)
    back = {x.name: getattr(found, x.name) for x in fields(found)}
    return EpilogueResult(**{name: None if x is None else x.cpu() for name, x in back.items()})


def composed(case: Pairs, dtype: torch.dtype) -> EpilogueResult:
    """The same from the losses' own functions and autograd, in `dtype`."""
    logps = case.logps.to(dtype).requires_grad_()
    policy = segment_sums(logps, case.cu_seqlens)
    if case.ref_token_logps is None:
        ref = case.ref_logps.to(dtype)
    else:
        ref = segment_sums(case.ref_token_logps.to(dtype), case.cu_seqlens)
    psi = None if case.psi is None else case.psi.to(dtype)
    if case.values is not None:
        psi = shaping_returns(
            case.values.to(dtype), case.cu_states, gamma=case.gamma, terminal=case.terminal, ended=case.ended
        )
    out = tvkd_loss(policy, ref, psi, beta=case.beta, alpha=case.alpha, label_smoothing=case.label_smoothing)
    (coefficients,) = torch.autograd.grad(out.losses.sum(), logps)
    return EpilogueResult(
        psi,
        policy.detach(),
        ref,
        out.losses.detach(),
        out.chosen_rewards,
        out.rejected_rewards,
        out.margins,
        out.shaping_margins,
        coefficients,
    )


def no_worse(case: Pairs) -> EpilogueResult:
    """Each number's error against float64 is at most twice float32 torch's, plus 1e-5 of the number."""
    ours, twin, plain = epilogue(case), composed(case, torch.float64), composed(case, torch.float32)
    for name, got, exact, eager in by_field(ours, twin, plain):
        assert got.dtype == torch.float32, name
        assert got.shape == exact.shape, name
        assert not got.isnan().any(), name
        error = (got.double() - exact).abs()
        allowed = 2 * (eager.double() - exact).abs() + 1e-5 * exact.abs() + TINY
        assert (error <= allowed).all(), f"{name}: {got}, exactly {exact}, in float32 {eager}"
    return ours


def by_field(*results: EpilogueResult) -> Iterator[tuple[Any, ...]]:
    for name in (field.name for field in fields(EpilogueResult)):
        tensors = [getattr(result, name) for result in results]
        if tensors[0] is not None:
            yield name, *tensors
        else:
            assert tensors == [None] * len(tensors)


def same_bits(a: EpilogueResult, b: EpilogueResult) -> None:
    for name, one, other in by_field(a, b):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name


def margins_of(m: Tensor, **settings: Any) -> Pairs:
    """Return pairs of one token per response, whose chosen one carries the whole shaped margin, at β=1."""
    zeros = torch.zeros_like(m)
    return Pairs(
        torch.cat([m, zeros]), torch.arange(2 * len(m) + 1), ref_logps=torch.cat([zeros, zeros]), beta=1.0, **settings
    )


@draws(120)
@given(case=pairs())
def test_no_worse_than_torch(case: Pairs) -> None:
    no_worse(case)


@pytest.mark.parametrize("terminal", ["last_content", "eos", "zero"])
@pytest.mark.parametrize("gamma", [0, 0.9, 1])
@pytest.mark.parametrize("ended", [None, [True, False, False, True, True, True]], ids=["all ended", "some ended"])
def test_every_terminal(terminal: str, gamma: float, ended: list[bool] | None) -> None:
    states = [2, 2, 64, 65, 3, 130]
    draw = torch.Generator().manual_seed(0)
    case = Pairs(
        logps=-torch.rand(12, generator=draw),
        cu_seqlens=boundaries([1, 2, 3, 0, 4, 2]),
        ref_token_logps=-torch.rand(12, generator=draw),
        values=40 + torch.randn(sum(states), generator=draw),
        cu_states=boundaries(states),
        ended=None if ended is None else torch.tensor(ended),
        gamma=gamma,
        terminal=terminal,
        label_smoothing=0.1,
    )
    no_worse(case)


def test_psi_without_discount_is_a_difference_of_two_states() -> None:
    """Rounded once: the states between cancel before they are added, not after."""
    values = 1e6 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    case = Pairs(
        -torch.ones(2), torch.arange(3), ref_logps=-torch.ones(2), values=values, cu_states=torch.tensor([0, 200, 300])
    )
    by_hand = values[[198, 298]].double() - values[[0, 200]].double()
    assert torch.equal(epilogue(case).psi, by_hand.float())


@pytest.mark.interpreter
def test_100_000_tokens_beside_one() -> None:
    long, draw = 100_000, torch.Generator().manual_seed(0)
    case = Pairs(
        logps=-4.6 * torch.rand(long + 1, generator=draw),
        cu_seqlens=boundaries([long, 1]),
        ref_token_logps=-4.6 * torch.rand(long + 1, generator=draw),
        values=40 + torch.randn(long + 3, generator=draw),
        cu_states=boundaries([long + 1, 2]),
        beta=0.01,
        alpha=1e-4,
        gamma=0.9,
    )
    result = no_worse(case)
    assert torch.equal(result.policy_logps, segment_sums(case.logps, case.cu_seqlens))
    assert result.coefficients[0] < 0 < result.coefficients[-1]


@pytest.mark.parametrize("label_smoothing", [0, 0.1])
def test_relative_accuracy_over_all_margins(label_smoothing: float) -> None:
    """Down to e^−85, which a logarithm of 1 + e^−m would lose from m = 17, in float32, or 37, in float64."""
    m = torch.cat([torch.linspace(-85, 85, 101), torch.linspace(12, 13, 21), torch.tensor([30.0, -30.0])])
    case = margins_of(m, label_smoothing=label_smoothing)
    ours, twin = epilogue(case), composed(case, torch.float64)
    torch.testing.assert_close(ours.losses.double(), twin.losses, rtol=1e-7, atol=0)
    torch.testing.assert_close(ours.coefficients.double(), twin.coefficients, rtol=1e-7, atol=0)


@pytest.mark.parametrize("label_smoothing", [0, 0.4])
def test_huge_margins(label_smoothing: float) -> None:
    result = no_worse(margins_of(torch.tensor([1e4, -1e4, 3e38, -3e38]), label_smoothing=label_smoothing))
    assert result.losses.isfinite().all()
    assert result.coefficients[:4].tolist() == pytest.approx([label_smoothing, label_smoothing - 1] * 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_infinite_margins_are_torchs() -> None:
    case = margins_of(torch.tensor([-torch.inf, torch.inf, 1.0]))
    ours, twin = epilogue(case), composed(case, torch.float64)
    for name in ("losses", "chosen_rewards", "margins", "shaping_margins"):
        got, exact = getattr(ours, name), getattr(twin, name)
        torch.testing.assert_close(got, exact.float(), equal_nan=True)


@draws(40)
@given(case=pairs())
def test_alpha_0_is_dpo_bit_by_bit(case: Pairs) -> None:
    bare = replace(case, values=None, cu_states=None, ended=None, psi=None)
    nans = torch.full((case.cu_seqlens.numel() - 1,), torch.nan)
    dpo, shaped = epilogue(bare), epilogue(replace(bare, psi=nans, alpha=0))
    same_bits(dpo, replace(shaped, psi=None))


@draws(15)
@given(case=pairs())
def test_the_same_bits_every_time_and_in_every_batch(case: Pairs) -> None:
    whole = epilogue(case)
    same_bits(whole, epilogue(case))
    for p in range(len(whole.losses)):
        alone = epilogue(one_pair(case, p))
        for name, got, among_others in by_field(alone, whole):
            if name == "coefficients":
                among_others = torch.cat(of_pair(among_others.split(case.cu_seqlens.diff().tolist()), p))
            elif len(among_others) == len(whole.losses):
                among_others = among_others[p : p + 1]
            else:
                among_others = among_others.view(2, -1)[:, p]
            assert torch.equal(got, among_others), name


def of_pair(sequences: Any, p: int) -> list[Any]:
    return [sequences[p], sequences[len(sequences) // 2 + p]]


def one_pair(case: Pairs, p: int) -> Pairs:
    """Pair p by itself."""
    changes: dict[str, Any] = {}
    for cu_name, packed_names in (("cu_seqlens", ("logps", "ref_token_logps")), ("cu_states", ("values",))):
        cu = getattr(case, cu_name)
        if cu is None:
            continue
        lengths = cu.diff().tolist()
        changes[cu_name] = boundaries(of_pair(lengths, p), cu.dtype)
        for name in packed_names:
            if (packed := getattr(case, name)) is not None:
                changes[name] = torch.cat(of_pair(packed.split(lengths), p))
    for name in ("ref_logps", "ended", "psi"):
        if (by_sequence := getattr(case, name)) is not None:
            changes[name] = torch.stack(of_pair(by_sequence, p))
    return replace(case, **changes)


def test_as_many_tokens_as_sequences() -> None:
    """Test N = 2P: the kind of the reference is given, not guessed."""
    logps, ref = torch.randn(2, 4)
    case = Pairs(logps, torch.tensor([0, 2, 2, 3, 4]))
    a_token, summed = epilogue(replace(case, ref_token_logps=ref)), epilogue(replace(case, ref_logps=ref))
    assert torch.equal(a_token.ref_logps, segment_sums(ref, case.cu_seqlens))
    assert torch.equal(summed.ref_logps, ref)
    assert not torch.equal(a_token.losses, summed.losses)


def test_what_is_given_strided_or_with_a_gradient_is_read_right() -> None:
    logps, ref, psi = torch.randn(6, 3, requires_grad=True).T
    case = Pairs(logps[:5], torch.tensor([0, 1, 5]), ref_token_logps=ref[:5], psi=psi[::3])
    straight = replace(
        case, **{name: getattr(case, name).detach().contiguous() for name in ("logps", "ref_token_logps", "psi")}
    )
    strided = epilogue(case)
    same_bits(replace(strided, psi=straight.psi), epilogue(straight))
    assert not strided.losses.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_logps": None}, r"either ref_token_logps, \(N,\) a token, or ref_logps"),
        ({"ref_token_logps": torch.zeros(4)}, r"either ref_token_logps"),
        ({"ref_logps": torch.zeros(4)}, r"ref_logps must be \(2,\), got \(4,\)"),
        ({"psi": torch.zeros(1)}, r"psi must be \(2,\), got \(1,\)"),
        ({"values": torch.zeros(4)}, "values and cu_states, their boundaries, go together"),
        ({"values": torch.zeros(4), "cu_states": torch.tensor([0, 4])}, r"cu_states must be \(3,\), got \(2,\)"),
        ({"values": torch.zeros(4), "psi": torch.zeros(2)}, "either values, from which Ψ is computed, or psi"),
        ({"ended": torch.ones(2, dtype=torch.bool)}, "ended goes with values"),
        ({"terminal": "end"}, "terminal must be one of last_content, eos, zero, got 'end'"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 4])}, r"cu_seqlens must be \(2P\+1,\), .* got \(4,\)"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    case = Pairs(torch.zeros(4), torch.tensor([0, 1, 4]), ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        epilogue(replace(case, **changes))
