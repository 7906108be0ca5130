import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.losses import running_sums, segment_sums

lengths_of_sequences = st.lists(st.integers(0, 9), max_size=8)


@draws()
@given(lengths=lengths_of_sequences, index_dtype=st.sampled_from([torch.int32, torch.int64]))
def test_sums_and_their_gradient_against_a_loop(lengths: list[int], index_dtype: torch.dtype) -> None:
    per_token = torch.randn(sum(lengths), dtype=torch.float64).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    by_loop = [part.sum() for part in per_token.split(lengths)] if lengths else []
    sums = segment_sums(per_token, cu_seqlens)
    assert sums.shape == (len(lengths),)
    weights = torch.randn(len(lengths), dtype=torch.float64)
    torch.testing.assert_close(sums, torch.stack(by_loop) if by_loop else sums.new_zeros(0))
    (grad,) = torch.autograd.grad((sums * weights).sum(), per_token)
    torch.testing.assert_close(grad, weights.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))


@draws()
@given(lengths=lengths_of_sequences, index_dtype=st.sampled_from([torch.int32, torch.int64]))
def test_running_sums_against_a_loop(lengths: list[int], index_dtype: torch.dtype) -> None:
    per_token = torch.randn(sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    parts = per_token.split(lengths) if lengths else []
    by_loop = [x for part in parts for x in (0.0, *part.double().cumsum(0).tolist())]
    found = running_sums(per_token, cu_seqlens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(by_loop, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_that_came_in_comes_out(dtype: torch.dtype) -> None:
    sums = segment_sums(torch.tensor([1.0, 2.0, 4.0], dtype=dtype), torch.tensor([0, 1, 1, 3]))
    assert sums.dtype == dtype
    assert sums.tolist() == [1.0, 0.0, 6.0]


def test_a_gradient_by_finite_differences() -> None:
    per_token = torch.randn(7, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    assert torch.autograd.gradcheck(lambda x: segment_sums(x, cu_seqlens), (per_token,))


@pytest.mark.parametrize("count", [1_000, 100_000])
def test_a_long_sequence_loses_nothing(count: int) -> None:
    """The sum of float32 log-probabilities, rounded once: half a unit in the last place at most."""
    logps = -4.6 * torch.rand(2 * count, generator=torch.Generator().manual_seed(0))
    sums = segment_sums(logps, torch.tensor([0, count, 2 * count]))
    assert torch.equal(sums, logps.double().view(2, count).sum(1).float())


def test_the_same_bits_every_time() -> None:
    logps = torch.randn(10_000)
    cu_seqlens = torch.arange(0, 10_001, 100)
    assert torch.equal(segment_sums(logps, cu_seqlens), segment_sums(logps, cu_seqlens))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 4], r"cu_seqlens must rise from 0 to 4, the number of packed entries; it runs from 1 to 4"),
        ([0, 3], r"cu_seqlens must rise from 0 to 4, the number of packed entries; it runs from 0 to 3"),
        ([0, 5], r"it runs from 0 to 5"),
        ([0, 3, 2, 4], r"cu_seqlens must rise from 0 to 4; it falls after entry 1"),
        ([[0, 4]], r"cu_seqlens must be \(S\+1,\) int32 or int64 boundaries, got \(1, 2\)"),
        ([], r"cu_seqlens must be \(S\+1,\) int32 or int64 boundaries, got \(0,\)"),
    ],
)
def test_boundaries_that_do_not_fit(cu_seqlens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_sums(torch.zeros(4), torch.tensor(cu_seqlens, dtype=torch.int64))


def test_boundaries_that_are_no_integers() -> None:
    with pytest.raises(ValueError, match=r"int32 or int64 boundaries, got \(2,\) torch.float32"):
        segment_sums(torch.zeros(4), torch.tensor([0.0, 4.0]))
