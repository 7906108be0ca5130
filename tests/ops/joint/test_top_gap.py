"""`linear_top_gap` against whole logits in float64: values and gradients, transforms, ties and what is refused."""

import pytest
import torch
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.joint import top_gap
from tvkd_fast.ops.joint.top_gap import linear_top_gap


def whole(case: JointCase) -> Tensor:
    z, u = case.logits()
    s, t = z.argmax(1, keepdim=True), u.argmax(1, keepdim=True)
    return ((z.gather(1, t) - z.gather(1, s)) - (u.gather(1, t) - u.gather(1, s)))[:, 0]


@pytest.mark.parametrize("entries", [2**24, 40])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"softcap": 3.0, "teacher_softcap": 2.0}, {"logit_scale": 0.3, "teacher_logit_scale": -0.5}],
    ids=str,
)
def test_values_and_gradients_are_the_twins(entries: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_gap, "_ENTRIES", entries)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = JointCase.draw((9, 5, 7, 37), dtype=dtype, **options)
        twin = case.double()
        found, wanted = linear_top_gap(*case.arguments()), whole(twin)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        assert (found <= 0).all()
        assert (found < 0).any()
        leaves = ["hidden", "weight", *(["bias"] if case.leaves["bias"] is not None else [])]
        got, want = (
            torch.autograd.grad((x * case.upstream[0].to(x.dtype)).sum(), [of.leaves[name] for name in leaves])
            for x, of in ((found, case), (wanted, twin))
        )
        assert_close(got, want, tolerance)


def test_rows_that_are_left_out_are_0_and_one_token_for_both_is_too() -> None:
    case = JointCase.draw((6, 5, 5, 37), dtype=torch.float64, bias=False)
    hidden, head, *_ = case.arguments()
    assert (linear_top_gap(hidden, head, hidden, head) == 0).all()
    rows = torch.arange(6) % 2 == 0
    found = linear_top_gap(*case.arguments(), rows)
    assert torch.equal(found[~rows], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found[rows], linear_top_gap(*case.arguments())[rows])


def test_vocabularies_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary has 5 tokens and the teacher's 6"):
        linear_top_gap(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(6, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    """1,500 rows add to one row of the weight: a sum in 16 bits stops growing long before."""
    case = JointCase.draw((1500, 8, 8, 3), dtype=dtype)
    twin = case.double()
    leaves = ["hidden", "weight", "bias"]
    got, want = (
        torch.autograd.grad(x.double().sum(), [of.leaves[name] for name in leaves])
        for x, of in ((linear_top_gap(*case.arguments()), case), (whole(twin), twin))
    )
    assert_close(got, want, 0.6 * torch.finfo(dtype).eps)


def test_a_near_tie_is_not_positive_and_has_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw) for n in (2000, 8))
    weight = torch.cat([weight, weight + 1e-7 * torch.randn(8, 64, generator=draw)])
    teacher = weight + 1e-7 * torch.randn(16, 64, generator=draw)
    hidden.requires_grad_()
    found = linear_top_gap(hidden, weight, hidden, teacher)
    assert (found <= 0).all()
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    s, t = (top_gap._top(hidden.detach(), Head(x)) for x in (weight, teacher))
    torch.testing.assert_close(grad, weight[t] - weight[s])
    assert (grad[found == 0] != 0).any()
