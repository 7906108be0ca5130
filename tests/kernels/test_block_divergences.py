"""A block of two heads' products to divergences and to the gradient by logits, and the loss that is made of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from joint_case import JointCase, no_noisier
from torch import Tensor

from tvkd_fast.fused.distillation import fused_linear_distillation_loss
from tvkd_fast.kernels.block_divergences import Mixture, block_gradient, block_moments, new_numbers, records_of
from tvkd_fast.kernels.joint_dlogits import Factors, Flags
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops import reference
from tvkd_fast.ops.joint import triton_joint

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
EVERYTHING = Flags(logs=True, mixture=True, variation=True, power=True)
MIXTURE = Mixture(beta=0.3, alpha=0.6)
IGNORED = -100
INF = float("inf")
NAMES = ("forward_kl", "reverse_kl", "entropy", "log_sum_p2", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")
Two = tuple[Tensor, Head, Tensor, Head]


def inputs(rows: int, vocab_size: int, spread: float, seed: int = 0, **transforms: Any) -> tuple[Two, Tensor]:
    """Products [R, V] and a head with a bias of either side, and labels (R,)."""
    torch.manual_seed(seed)

    def side(**of: Any) -> tuple[Tensor, Head]:
        head = Head(torch.empty(vocab_size, 1, device=DEVICE), torch.randn(vocab_size, device=DEVICE), **of)
        return torch.randn(rows, vocab_size, device=DEVICE) * spread, head

    return (*side(**transforms), *side(softcap=4.0)), torch.randint(vocab_size, (rows,), device=DEVICE)


def logits_of(products: Tensor, head: Head) -> Tensor:
    a = (products.double() + (0.0 if head.bias is None else head.bias.double())) * head.logit_scale
    return a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap)


def found_of(two: Two, labels: Tensor) -> dict[str, Tensor]:
    """The numbers that the kernel leaves, by the outputs' names, and both log-sum-exps."""
    numbers = new_numbers(two[0], len(two[0]))
    block_moments(*two, numbers, labels=labels, flags=EVERYTHING, mixture=MIXTURE)
    sums, values = records_of(numbers, EVERYTHING, MIXTURE, labelled=True)
    found = {
        "forward_kl": sums.forward_kl,
        "reverse_kl": sums.reverse_kl,
        "entropy": sums.own.entropy,
        "log_sum_p2": sums.log_squares,
        "skew_forward_kl": values.other_to_mixture,
        "skew_reverse_kl": values.own_to_mixture,
        "tvd": values.total_variation,
        "alpha": values.power,
        "lse": sums.own.lse,
        "teacher_lse": sums.other.lse,
        "logps": sums.own.logps,
    }
    return {name: x for name, x in found.items() if x is not None}


TRANSFORMS: tuple[dict[str, Any], ...] = ({}, {"softcap": 5.0}, {"logit_scale": -2.0}, {"softcap": 30.0})


@draws(30)
@given(
    rows=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 2, 127, 128, 129, 300]),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    transforms=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 999),
)
def test_the_numbers_of_any_block(
    rows: int, vocab_size: int, spread: float, transforms: dict[str, Any], seed: int
) -> None:
    two, labels = inputs(rows, vocab_size, spread, seed, **transforms)
    found = found_of(two, labels)
    z, u = logits_of(*two[:2]), logits_of(*two[2:])
    exact = reference.linear_joint(z, u, labels, outputs=tuple(found), beta=MIXTURE.beta, alpha=MIXTURE.alpha)
    for name, x in found.items():
        torch.testing.assert_close(
            x.double(), exact[name], rtol=3e-6, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert all((found[name] >= 0).all() for name in ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"))


def by_hand(two: Two, labels: Tensor, f: Tensor) -> Tensor:
    """[R, V] what `Factors` says, times J, in float64."""
    z, u = logits_of(*two[:2]), logits_of(*two[2:])
    x, y = z.log_softmax(-1), u.log_softmax(-1)
    p, q = x.exp(), y.exp()
    assert MIXTURE.beta is not None
    assert MIXTURE.alpha is not None
    m = (1.0 - MIXTURE.beta) * p + MIXTURE.beta * q
    c = [row[:, None] for row in f.double()]
    inner = c[0] + c[2] * x + c[3] * y + c[4] * p + c[7] * torch.sign(p - q)
    inner += c[5] * ((p / m).log() - (1.0 - MIXTURE.beta) * p / m) - c[6] * (1.0 - MIXTURE.beta) * q / m
    g = p * inner + c[1] * q + c[8] * p**MIXTURE.alpha * q ** (1.0 - MIXTURE.alpha)
    g += torch.zeros_like(g).scatter(1, labels.clamp_min(0)[:, None], c[9])
    if two[1].softcap is not None:
        g *= 1.0 - (z / two[1].softcap).square()
    return g.masked_fill((labels == IGNORED)[:, None], 0.0)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("transforms", TRANSFORMS[:2], ids=str)
def test_the_gradient_is_written_over_the_products(
    vocab_size: int, transforms: dict[str, Any], dtype: torch.dtype
) -> None:
    two, labels = inputs(4, vocab_size, 1.0, **transforms)
    labels[1] = IGNORED
    numbers, factors = new_numbers(two[0], 4), torch.randn(len(Factors._fields), 4, device=DEVICE)
    of_rows: dict[str, Any] = {"labels": labels, "flags": EVERYTHING, "mixture": MIXTURE}
    block_moments(*two, numbers, **of_rows)
    exact = by_hand(two, labels, factors)
    out = two[0].view(dtype)[:, :vocab_size]
    block_gradient(*two, numbers, factors, out, ignore_index=IGNORED, **of_rows)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= tolerance * (exact.abs() + factors.abs().sum(0)[:, None] * 0.1)).all()
    assert not out[1].any()


def test_tokens_that_a_bias_takes_out() -> None:
    """Out of both they are nothing; out of one, the KL from it is infinite and all else is as it should be."""
    two, labels = inputs(3, 300, 1.0)
    for side in (1, 3):
        two[side].bias[:200] = -INF  # type: ignore[index, union-attr]
    two = (*two[:3], Head(two[3].weight, two[3].bias))
    labels.fill_(250)
    cut = tuple(x[:, 200:] if isinstance(x, Tensor) else Head(x.weight[200:], x.bias[200:]) for x in two)  # type: ignore[index]
    found, exact = found_of(two, labels), found_of(cut, labels - 200)  # type: ignore[arg-type]
    for name, x in found.items():
        torch.testing.assert_close(x, exact[name], rtol=1e-6, atol=1e-6)
    two[3].bias[210] = -INF  # type: ignore[index]
    found = found_of(two, labels)
    assert found["reverse_kl"].isinf().all()
    assert all(found[name].isfinite().all() for name in NAMES if name != "reverse_kl")


@pytest.mark.parametrize("side", [0, 2])
@pytest.mark.parametrize("broken", [float("nan"), INF])
def test_a_broken_product_shows_in_its_row_alone(broken: float, side: int) -> None:
    two, labels = inputs(3, 300, 1.0)
    two[side][1, 200] = broken  # type: ignore[index]
    found = found_of(two, labels)
    for name in ("forward_kl", "reverse_kl", "skew_forward_kl", "tvd", "alpha"):
        assert found[name].isnan().tolist() == [False, True, False], name


def test_a_label_that_lies_in_no_column_is_nan() -> None:
    two, labels = inputs(3, 300, 1.0)
    labels[0], labels[2] = -1, 300
    assert found_of(two, labels)["logps"].isnan().tolist() == [True, False, True]


MIXTURES: dict[str, dict[str, float]] = {
    "DCKD": {"logps": -1.0, "forward_kl": 0.1},
    "jsd": {"jsd": 2.0},
    "all": {name: 0.3 * (-1) ** i for i, name in enumerate((*NAMES, "logps", "lse", "teacher_lse"))},
}


def case_of(dtype: torch.dtype, *, teacher_learns: bool = False, **transforms: Any) -> JointCase:
    drawn = JointCase.draw((21, 24, 16, 131), dtype=dtype, spread=0.5, **transforms)
    leaves = {k: None if x is None else x.detach().to(DEVICE) for k, x in drawn.leaves.items()}
    case = learning(JointCase(leaves, drawn.labels.to(DEVICE), drawn.upstream, drawn.transforms), teacher_learns)
    case.labels[[3, 20]] = -100
    return case


def learning(case: JointCase, teacher: bool) -> JointCase:
    for name, x in case.leaves.items():
        if x is not None:
            x.requires_grad_(teacher or not name.startswith("teacher"))
    return case


def right(kit: SimpleNamespace, case: JointCase, mixture: dict[str, float], **given: Any) -> None:
    """The loss no worse than torch's on upcast inputs, its gradients no noisier than of dlogits rounded once."""
    weights = torch.randn(21, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    options = {"beta": 0.3, "temperature": given.pop("temperature", 1.4)}
    out = fused_linear_distillation_loss(
        *case.arguments(), case.labels, mixture=mixture, token_weights=weights, impl="triton", **options, **given
    )
    dtypes = {x.dtype for x in case.leaves.values() if x is not None and x.requires_grad}
    learns = any(x is not None and x.requires_grad for name, x in case.leaves.items() if name.startswith("teacher"))
    results = [(out.loss, case)]
    for dtype, rounded_to in ((torch.float64, torch.float64), (torch.float32, dtypes.pop())):
        one = learning(case.upcast(dtype), learns)
        found = one.twin(tuple(mixture), index=given.get("teacher_index"), rounded_to=rounded_to, **options)
        results.append((sum((mixture[name] * weights.to(dtype) * x).sum() for name, x in found.items()), one))  # type: ignore[misc]
    kit.no_worse(*(loss.detach() for loss, _ in results), unit=10.0)
    grads = [
        torch.autograd.grad(loss, [x for x in one.leaves.values() if x is not None and x.requires_grad])
        for loss, one in results
    ]
    no_noisier(*grads)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "teacher_softcap": 3.0, "logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_loss_whose_gradient_is_made_in_the_forward(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Three blocks of rows; nothing is computed twice."""
    blocks.shrink(8 * 131 * 10)
    monkeypatch.setattr(triton_joint, "joint_gradients", None)
    right(kit, case_of(dtype, **head), MIXTURES[name])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_large_scale_of_logits_does_not_overflow(kit: SimpleNamespace, temperature: float) -> None:
    """Float16's gradients by products are those by logits times 10, or 16."""
    case = case_of(torch.float16, logit_scale=1.0 if temperature < 1.0 else 16.0)
    right(kit, case, {"forward_kl": 1.0}, temperature=temperature)


@pytest.mark.parametrize("other", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.interpreter)], ids=str)
def test_a_teacher_of_another_dtype_and_of_more_tokens(
    kit: SimpleNamespace, blocks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, other: torch.dtype
) -> None:
    """Each model's product is in its own dtype, of rows that are gathered a slice at a time."""
    blocks.shrink(8 * 131 * 10)
    monkeypatch.setattr(triton_joint, "joint_gradients", None)
    monkeypatch.setattr("tvkd_fast.ops.joint.triton_blocks.WORKSPACE_BYTES", 40 * 16 * 4)
    case = case_of(torch.float32)
    for leaf in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        case.leaves[leaf] = case.leaves[leaf].to(other)  # type: ignore[union-attr]
    for leaf in ("weight", "bias"):
        case.leaves[leaf] = case.leaves[leaf][:100].detach().requires_grad_()  # type: ignore[index]
    case.labels = torch.where(case.labels < 0, case.labels, case.labels.remainder(100))
    index = torch.randperm(131, generator=torch.Generator().manual_seed(3))[:100].to(DEVICE)
    right(kit, case, {"jsd": 1.0, "logps": -1.0}, teacher_index=index)


@pytest.mark.interpreter
def test_a_teacher_that_learns(kit: SimpleNamespace) -> None:
    right(kit, case_of(torch.float32, teacher_learns=True, softcap=3.0), {"jsd": 2.0, "logps": -1.0})


@pytest.mark.interpreter
def test_a_second_backward_recomputes() -> None:
    case = case_of(torch.float32)
    leaves = [x for x in case.leaves.values() if x is not None and x.requires_grad]
    out = fused_linear_distillation_loss(*case.arguments(), mixture={"jsd": 1.0, "entropy": -0.1}, impl="triton")
    first, again = (torch.autograd.grad(3.0 * out.loss, leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-7)
