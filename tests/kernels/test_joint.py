"""The kernels over two heads against float64 twins, values and gradients of either side: interpreted, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from joint_case import rounded
from torch import Tensor

from tvkd_fast.kernels.joint_backward import JointWeights, joint_gradients
from tvkd_fast.kernels.joint_stats import joint_sums
from tvkd_fast.kernels.joint_values import joint_values
from tvkd_fast.kernels.records import Head, HeadGradients, JointSums, JointValues

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bfloat16's bit patterns.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
ROWS, COLUMNS = (128, 128) if GPU else (32, 64)
BETA, ALPHA = 0.3, 0.6
FIRST_WALK = ("logps", "lse", "other_lse", "forward_kl", "reverse_kl", "entropy", "log_squares")
SECOND_WALK = ("other_to_mixture", "own_to_mixture", "total_variation", "power")
OUTPUTS = (*FIRST_WALK, *SECOND_WALK)
OF_OWN_ALONE = ("logps", "lse", "entropy", "log_squares")
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """Two heads over one vocabulary, states of both, labels, and each output's upstream gradients."""

    hidden: Tensor
    head: Head
    other_hidden: Tensor
    other_head: Head
    labels: Tensor | None
    upstream: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[tuple[Tensor, Head], tuple[Tensor, Head]]:
        return (self.hidden, self.head), (self.other_hidden, self.other_head)

    def to(self, device: str) -> Case:
        (hidden, head), (other_hidden, other_head) = [
            (
                x.to(device),
                replace(of, weight=of.weight.to(device), bias=None if of.bias is None else of.bias.to(device)),
            )
            for x, of in self.sides
        ]
        labels = None if self.labels is None else self.labels.to(device)
        upstream = {name: x.to(device) for name, x in self.upstream.items()}
        return Case(hidden, head, other_hidden, other_head, labels, upstream)

    def row(self, i: int) -> Case:
        """One row of it."""
        part = slice(i, i + 1)
        assert self.labels is not None
        upstream = {name: x[part] for name, x in self.upstream.items()}
        hidden, other_hidden = self.hidden[part], self.other_hidden[part]
        return replace(self, hidden=hidden, other_hidden=other_hidden, labels=self.labels[part], upstream=upstream)


def random_case(
    n: int,
    v: int,
    d: int = 16,
    other_d: int = 32,
    dtype: torch.dtype = torch.float32,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    bias: bool = False,
    other_bias: bool = False,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    labels: bool = True,
    ignored: float = 0.2,
    spread: float = 2.0,
    seed: int = 0,
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def side(width: int, has_bias: bool, **transforms: Any) -> tuple[Tensor, Head]:
        hidden = torch.randn(n, width, generator=draw).to(dtype)
        weight = (torch.randn(v, width, generator=draw) * spread / width**0.5).to(dtype)
        offsets = torch.randn(v, generator=draw).to(dtype) if has_bias else None
        return hidden, Head(weight, offsets, **transforms)

    hidden, head = side(d, bias, softcap=softcap, logit_scale=logit_scale)
    other_hidden, other_head = side(other_d, other_bias, softcap=other_softcap)
    ids = torch.randint(v, (n,), generator=draw)
    ids[-1:] = v - 1
    ids[torch.rand(n, generator=draw) < ignored] = -100
    named = [name for name in outputs if labels or name != "logps"]
    upstream = {name: torch.randn(n, generator=draw) for name in named}
    return Case(hidden, head, other_hidden, other_head, ids if labels else None, upstream)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    a = head.logit_scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap)


def times(weight: Tensor, number: Tensor) -> Tensor:
    """weight·number, 0 where the weight is, with a gradient that is too."""
    return weight * number.masked_fill(weight == 0, 0.0)


def twin(z: Tensor, u: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Every output of logits [N, V] of both sides, as it is defined; 0 where a label is ignored."""
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    m = (1.0 - BETA) * p + BETA * q
    log_m = torch.where(m > 0, m, 1.0).log()
    kept = None if labels is None else labels != -100
    found = {
        "lse": z.logsumexp(-1),
        "other_lse": u.logsumexp(-1),
        "forward_kl": times(q, log_q - log_p).sum(-1),
        "reverse_kl": times(p, log_p - log_q).sum(-1),
        "entropy": -times(p, log_p).sum(-1),
        "log_squares": (2.0 * log_p).logsumexp(-1),
        "other_to_mixture": times(q, log_q - log_m).sum(-1),
        "own_to_mixture": times(p, log_p - log_m).sum(-1),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
        "power": torch.exp(ALPHA * log_p + (1.0 - ALPHA) * log_q).sum(-1),
    }
    if labels is not None:
        found["logps"] = log_p.gather(1, labels.where(kept, 0)[:, None])[:, 0]
    return found if kept is None else {name: x.where(kept, 0.0) for name, x in found.items()}


def by_autograd(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[list[Tensor | None]]]:
    """The outputs in a dtype, and per side the gradients by hidden, weight and bias of their weighted sum.

    With 16-bit operands, what float32 rounds of the gradient by logits is rounded as the products take it.
    """
    leaves = [
        [None if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden, head.weight, head.bias)]
        for hidden, head in case.sides
    ]
    logits = [
        logits_of(side[0], replace(head, weight=side[1], bias=side[2]))
        for side, (_, head) in zip(leaves, case.sides, strict=True)
    ]
    if dtype == torch.float32 and case.hidden.dtype != torch.float32:
        for z in logits:
            z.register_hook(lambda grad: rounded(grad, case.hidden.dtype))
    found = twin(*logits, case.labels)
    loss = sum((x.to(dtype) * found[name] for name, x in case.upstream.items()), start=torch.zeros((), dtype=dtype))
    flat = [x for side in leaves for x in side if x is not None]
    grads = iter(torch.autograd.grad(loss.sum(), flat, allow_unused=True, materialize_grads=True))
    return {name: x.detach() for name, x in found.items()}, [
        [None if x is None else next(grads) for x in side] for side in leaves
    ]


def outputs_of(sums: JointSums, values: JointValues | None, labels: Tensor | None) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {
        "lse": sums.own.lse,
        "other_lse": sums.other.lse,
        "forward_kl": sums.forward_kl,
        "reverse_kl": sums.reverse_kl,
        "entropy": sums.own.entropy,
        "log_squares": sums.log_squares,
    }
    if labels is not None:
        found["logps"] = sums.own.logps.where(labels != -100, 0.0)
    if values is not None:
        found |= {name: getattr(values, name) for name in SECOND_WALK}
    return {name: x for name, x in found.items() if x is not None}


def by_kernels(case: Case) -> tuple[dict[str, Tensor], list[HeadGradients]]:
    """The outputs that have an upstream gradient, and both sides' gradients."""
    moved = case.to(DEVICE)
    inputs = (moved.hidden, moved.head, moved.other_hidden, moved.other_head)
    asked = moved.upstream
    sums = joint_sums(*inputs, labels=moved.labels, entropy="entropy" in asked, squares="log_squares" in asked)
    values = None
    if any(name in asked for name in SECOND_WALK):
        values = joint_values(
            *inputs,
            sums,
            labels=moved.labels,
            beta=BETA if "other_to_mixture" in asked or "own_to_mixture" in asked else None,
            variation="total_variation" in asked,
            alpha=ALPHA if "power" in asked else None,
        )
    weights = JointWeights(**asked)
    wants = {"want_hidden": True, "want_weight": True, "want_bias": True}
    own = joint_gradients(*inputs, moved.labels, sums, weights, values, **wants)
    back = None if values is None else values.swapped()
    other = joint_gradients(
        *inputs[2:], *inputs[:2], moved.labels, sums.swapped(), weights.swapped(), back, **wants
    )  # fmt: skip
    return {name: x.cpu() for name, x in outputs_of(sums, values, moved.labels).items()}, [
        HeadGradients(*(None if x is None else x.cpu() for x in vars(side).values())) for side in (own, other)
    ]


def right(kit: SimpleNamespace, case: Case, unit: float | None = None) -> dict[str, Tensor]:
    """Values no worse than torch's on upcast inputs; gradients than torch's of dlogits rounded once to 16 bits."""
    found, grads = by_kernels(case)
    exact, exact_grads = by_autograd(case, torch.float64)
    plain, plain_grads = by_autograd(case, torch.float32)
    for name in case.upstream:
        assert found[name].dtype == torch.float32
        kit.no_worse(found[name], exact[name], plain[name], unit=1.0)
    dtype = case.hidden.dtype
    for got, twins, plains in zip(grads, exact_grads, plain_grads, strict=True):
        for ours, true, torchs in zip(vars(got).values(), twins, plains, strict=True):
            assert (ours is None) == (true is None)
            if true is not None:
                assert ours.dtype == dtype
                kit.no_worse(ours, true, torchs.to(dtype), unit)
    return found


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_each_output_alone(kit: SimpleNamespace, dtype: torch.dtype, output: str) -> None:
    labels = output == "logps" or DTYPES.index(dtype) == 0
    right(kit, random_case(20, 131, 16, 24, dtype, outputs=(output,), bias=True, labels=labels))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"softcap": 5.0, "logit_scale": 0.5},
        {"other_softcap": 8.0, "other_bias": True},
        {"bias": True, "other_bias": True, "softcap": 9.0, "other_softcap": 4.0, "logit_scale": -1.5},
    ],
    ids=str,
)
def test_all_outputs_at_once(kit: SimpleNamespace, dtype: torch.dtype, head: dict[str, Any]) -> None:
    right(kit, random_case(37, 131, 32, 16, dtype, **head))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("v", [1, COLUMNS - 1, 2 * COLUMNS, 2 * COLUMNS + 1])
@pytest.mark.parametrize("widths", [(8, 40), (33, 16), (1, 7), (48, 48)], ids=str)
def test_at_the_edges_of_tiles(kit: SimpleNamespace, n: int, v: int, widths: tuple[int, int]) -> None:
    right(kit, random_case(n, v, *widths, torch.float16, ignored=0.0, bias=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_splits_and_blocks(
    kit: SimpleNamespace, blocks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    blocks.shrink()
    for module in ("joint_stats", "joint_values"):
        monkeypatch.setattr(f"tvkd_fast.kernels.{module}.PARTIAL_FLOATS", 64)
    right(kit, random_case(ROWS + 3, 3 * COLUMNS + 5, dtype=dtype, bias=True, other_softcap=20.0))


@pytest.mark.interpreter
@draws(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 80),
    widths=st.tuples(*[st.sampled_from([1, 16, 24, 64])] * 2),
    v=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    outputs=st.sets(st.sampled_from(OUTPUTS), min_size=1),
    transforms=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "other_bias": st.booleans(),
            "softcap": st.sampled_from([None, 5.0]),
            "other_softcap": st.sampled_from([None, 30.0]),
            "logit_scale": st.sampled_from([1.0, -0.25]),
        }
    ),
    ignored=st.sampled_from([0.0, 0.9]),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_blocks(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    n: int,
    widths: tuple[int, int],
    v: int,
    dtype: torch.dtype,
    outputs: set[str],
    transforms: dict[str, Any],
    ignored: float,
    small: bool,
    seed: int,
) -> None:
    blocks.shrink(*((64 * 128 * 4, 64) if small else ()))
    named = tuple(name for name in OUTPUTS if name in outputs)
    right(kit, random_case(n, v, *widths, dtype, outputs=named, ignored=ignored, seed=seed, **transforms))


def with_biases(case: Case, bias: Tensor, other_bias: Tensor) -> Case:
    dtype = case.hidden.dtype
    return replace(
        case,
        head=replace(case.head, bias=bias.to(dtype)),
        other_head=replace(case.other_head, bias=other_bias.to(dtype)),
    )


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [(-1000.0, 1000.0), (1000.0, -1000.0), (1000.0, 1000.0)], ids=str)
def test_logits_far_from_zero(kit: SimpleNamespace, dtype: torch.dtype, level: tuple[float, float]) -> None:
    case = random_case(21, 3 * COLUMNS, dtype=dtype)
    right(kit, with_biases(case, *(torch.full((3 * COLUMNS,), x) for x in level)))


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", [(1.0, -1.0), (300.0, 0.0), (0.0, 300.0)], ids=str)
def test_logits_that_rise_from_tile_to_tile(
    kit: SimpleNamespace, dtype: torch.dtype, rise: tuple[float, float]
) -> None:
    """Maxima that move on one side, on the other, and apart."""
    case = random_case(21, 5 * COLUMNS, dtype=dtype)
    tile = torch.arange(5 * COLUMNS) // COLUMNS
    right(kit, with_biases(case, *(x * tile for x in rise)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_softmaxes(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    """Both hold nearly all probability at one entry: the same one in half of the rows."""
    case = random_case(20, 90, 24, 24, dtype, ignored=0.0)
    assert case.labels is not None
    weight = torch.nn.functional.normalize(case.head.weight.float(), dim=1).to(dtype)
    places = torch.where(torch.arange(20) % 2 == 0, case.labels, case.labels.roll(1))
    sharp = replace(case, head=Head(weight), other_head=Head(weight))
    states = [(20.0 * weight[at].float()).to(dtype) for at in (case.labels, places)]
    # What is left of p − q has the error of terms of size 1, in torch as here.
    right(kit, replace(sharp, hidden=states[0], other_hidden=states[1]), unit=1.0)


def test_tokens_that_both_biases_take_out(kit: SimpleNamespace) -> None:
    """0·∞ is 0: a whole split of −inf first, and single ones."""
    case = random_case(21, 3 * COLUMNS, bias=True, other_bias=True)
    gone = torch.zeros(3 * COLUMNS, dtype=torch.bool)
    gone[: 2 * COLUMNS] = gone[-5] = True
    assert case.head.bias is not None
    assert case.other_head.bias is not None
    assert case.labels is not None
    labels = torch.where(gone[case.labels.clamp(min=0)] & (case.labels >= 0), 3 * COLUMNS - 1, case.labels)
    biases = (x.masked_fill(gone, -INF) for x in (case.head.bias, case.other_head.bias))
    right(kit, replace(with_biases(case, *biases), labels=labels))


@pytest.mark.parametrize("output", ["forward_kl", "other_to_mixture", "own_to_mixture", "total_variation", "power"])
def test_tokens_that_the_teachers_bias_takes_out(kit: SimpleNamespace, output: str) -> None:
    """q is 0 where p is not: what stays finite is right, and its gradients are."""
    case = random_case(21, 3 * COLUMNS, outputs=(output,), bias=True, other_bias=True)
    assert case.head.bias is not None
    assert case.other_head.bias is not None
    gone = torch.arange(3 * COLUMNS) % 7 < 3
    right(kit, with_biases(case, case.head.bias, case.other_head.bias.masked_fill(gone, -INF)))


@pytest.mark.parametrize("side", [0, 1])
def test_a_token_that_one_side_never_gives_makes_one_kl_infinite(side: int) -> None:
    """Once in the first tile and once in the last, whatever comes to lie above it."""
    for place in (3, 5 * COLUMNS - 3):
        case = random_case(5, 5 * COLUMNS, outputs=("forward_kl", "reverse_kl"), bias=True, other_bias=True)
        biases = [torch.zeros(5 * COLUMNS), torch.zeros(5 * COLUMNS)]
        biases[side][place] = -INF
        found, _ = by_kernels(with_biases(case, *biases))
        exact, _ = by_autograd(with_biases(case, *biases), torch.float64)
        kept = case.labels != -100
        infinite, other = ("forward_kl", "reverse_kl") if side == 0 else ("reverse_kl", "forward_kl")
        assert (found[infinite][kept] == INF).all()
        assert (exact[infinite][kept] == INF).all()
        torch.testing.assert_close(found[other].double(), exact[other], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_disjoint_softmaxes(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    """Each gives 0, in float32, to all that the other gives anything: large and finite."""
    v = 3 * COLUMNS
    case = random_case(21, v, dtype=dtype, spread=0.5)
    even = torch.arange(v) % 2 == 0
    found = right(kit, with_biases(case, torch.where(even, 0.0, -400.0), torch.where(even, -400.0, 0.0)))
    kept = case.labels != -100
    assert (found["reverse_kl"][kept] > 300).all()
    assert found["forward_kl"].isfinite().all()
    assert torch.allclose(found["total_variation"][kept], torch.ones(()))


def test_a_row_without_a_finite_logit_of_the_teacher() -> None:
    """Its divergences are NaN, the student's own numbers and all other rows are right."""
    case = random_case(9, 2 * COLUMNS, 16, 16, ignored=0.0)
    # States are positive, and a column of the head is −inf: so is every logit.
    weight = case.other_head.weight.clone()
    weight[:, 0] = -INF
    hidden = case.other_hidden.abs()
    found, _ = by_kernels(replace(case, other_hidden=hidden, other_head=Head(weight)).row(4))
    exact, _ = by_autograd(case, torch.float64)
    for name in ("forward_kl", "reverse_kl", "other_to_mixture", "own_to_mixture", "total_variation", "power"):
        assert found[name].isnan().all(), name
    for name in OF_OWN_ALONE:
        torch.testing.assert_close(found[name].double(), exact[name][4:5], rtol=1e-5, atol=1e-5)


def test_a_broken_state_shows_in_its_own_row() -> None:
    case = random_case(9, 2 * COLUMNS, ignored=0.0)
    hidden = case.other_hidden.clone()
    hidden[4] = torch.nan
    found, grads = by_kernels(replace(case, other_hidden=hidden))
    for name in ("forward_kl", "reverse_kl", *SECOND_WALK):
        assert found[name].isnan().nonzero()[:, 0].tolist() == [4], name
    assert grads[0].hidden is not None
    assert grads[0].hidden.isnan().all(1).nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_and_the_same_softmax(dtype: torch.dtype) -> None:
    """No divergence is negative, and p − q is 0 to the last bit."""
    case = random_case(20, 150, 32, 32, dtype, spread=3.0)
    same = replace(case, other_hidden=case.hidden, other_head=case.head)
    found, grads = by_kernels(replace(same, upstream={"forward_kl": torch.ones(20)}))
    assert grads[0].hidden is not None
    assert (grads[0].hidden == 0).all()
    found, _ = by_kernels(same)
    for name in ("forward_kl", "reverse_kl", "other_to_mixture", "own_to_mixture", "total_variation"):
        assert (found[name] >= 0).all(), name
        assert found[name].max() <= 2e-6, name


def test_the_error_of_a_small_divergence() -> None:
    """At a KL up to 1, 2e-6 nats; by the mixture, too."""
    case = random_case(20, 500, 32, 32, outputs=("forward_kl", "own_to_mixture"), spread=2.0, ignored=0.0)
    near = replace(case, other_head=case.head, other_hidden=case.hidden + 0.2 * case.other_hidden)
    found, _ = by_kernels(near)
    exact, _ = by_autograd(near, torch.float64)
    for name in ("forward_kl", "reverse_kl", "other_to_mixture", "own_to_mixture"):
        assert 1e-3 < exact[name].max() <= 1.0, name
        assert (found[name].double() - exact[name]).abs().max() <= 2e-6, name


def test_nothing_but_ignored_rows() -> None:
    found, grads = by_kernels(random_case(40, 70, bias=True, ignored=1.0))
    for tensor in (*found.values(), grads[0].hidden, grads[0].weight, grads[0].bias, grads[1].weight):
        assert tensor is not None
        assert (tensor == 0).all()


def test_no_rows_at_all() -> None:
    found, grads = by_kernels(random_case(0, 70, bias=True))
    assert all(x.shape == (0,) for x in found.values())
    assert grads[0].hidden is not None
    assert grads[0].hidden.shape == (0, 16)
    assert grads[0].weight is not None
    assert (grads[0].weight == 0).all()


def test_a_label_that_is_no_token_is_nan_and_ids_may_begin_elsewhere() -> None:
    case = random_case(9, 70, ignored=0.0, outputs=("logps", "forward_kl"))
    assert case.labels is not None
    labels = case.labels.clone()
    labels[2] = 2**32 + 5
    found, grads = by_kernels(replace(case, labels=labels))
    assert found["logps"].isnan().nonzero()[:, 0].tolist() == [2]
    assert grads[0].hidden is not None
    assert grads[0].hidden.isnan().all(1).nonzero()[:, 0].tolist() == [2]
    moved = case.to(DEVICE)
    inputs = (moved.hidden, moved.head, moved.other_hidden, moved.other_head)
    there = joint_sums(*inputs, labels=moved.labels)
    shard = joint_sums(*inputs, labels=moved.labels + 1000, vocab_start=1000)
    assert there.own.target is not None
    assert shard.own.target is not None
    assert torch.equal(there.own.target, shard.own.target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_the_same_bits(blocks: SimpleNamespace, dtype: torch.dtype) -> None:
    blocks.shrink()
    case = random_case(ROWS + 3, 200, dtype=dtype, bias=True, other_softcap=9.0, outputs=("forward_kl", "power"))
    first, second = by_kernels(case), by_kernels(case)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert all(
            x is None or torch.equal(x, y) for x, y in zip(vars(one).values(), vars(other).values(), strict=True)
        )


def test_a_weight_of_zero_takes_an_infinite_divergence_away() -> None:
    """Where reverse KL is infinite and has no upstream gradient, the others' gradients are as without it."""
    case = random_case(9, 70, outputs=("logps", "reverse_kl"), bias=True, other_bias=True, ignored=0.0)
    assert case.other_head.bias is not None
    bias = case.other_head.bias.clone()
    bias[3] = -INF
    case = replace(case, other_head=replace(case.other_head, bias=bias))
    alone = {"logps": case.upstream["logps"]}
    _, with_it = by_kernels(replace(case, upstream=alone | {"reverse_kl": torch.zeros(9)}))
    _, without = by_kernels(replace(case, upstream=alone))
    assert with_it[0].hidden is not None
    assert without[0].hidden is not None
    torch.testing.assert_close(with_it[0].hidden, without[0].hidden, rtol=1e-6, atol=1e-7)


def test_jensen_shannon(kit: SimpleNamespace) -> None:
    """β'·KL(q‖m) + (1 − β')·KL(p‖m), its gradient that of (1 − β')·log p/m."""
    case = random_case(37, 131, outputs=("other_to_mixture",), labels=False)
    upstream = case.upstream["other_to_mixture"]
    case = replace(case, upstream=vars(JointWeights.of_jsd(upstream, BETA)))
    case = replace(case, upstream={name: x for name, x in case.upstream.items() if x is not None})
    right(kit, case)
    z = logits_of(case.hidden.double(), replace(case.head, weight=case.head.weight.double()))
    u = logits_of(case.other_hidden.double(), replace(case.other_head, weight=case.other_head.weight.double()))
    p, q = z.softmax(-1), u.softmax(-1)
    m = (1 - BETA) * p + BETA * q
    exact = (BETA * q * (q / m).log() + (1 - BETA) * p * (p / m).log()).sum(-1)
    moved = case.to(DEVICE)
    inputs = (moved.hidden, moved.head, moved.other_hidden, moved.other_head)
    values = joint_values(*inputs, joint_sums(*inputs), beta=BETA)
    torch.testing.assert_close(values.jsd.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    assert values.power is None
    assert values.total_variation is None
    g = (1 - BETA) * (p / m).log()
    dz = upstream.double()[:, None] * p * (g - (p * g).sum(-1, keepdim=True))
    _, grads = by_kernels(case)
    torch.testing.assert_close(grads[0].hidden.double(), dz @ case.head.weight.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 0.5, 1 - 1e-6])
def test_mixtures_near_either_end(beta: float) -> None:
    case = random_case(21, 131, labels=False).to(DEVICE)
    inputs = (case.hidden, case.head, case.other_hidden, case.other_head)
    values = joint_values(*inputs, joint_sums(*inputs), beta=beta)
    p, q = (logits_of(h.double(), replace(head, weight=head.weight.double())).softmax(-1) for h, head in case.sides)
    m = (1 - beta) * p + beta * q
    torch.testing.assert_close(values.own_to_mixture.double(), (p * (p / m).log()).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.other_to_mixture.double(), (q * (q / m).log()).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.overlap.double(), (p * q / m).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_head_holds_a_temperature() -> None:
    case = random_case(5, 40, softcap=7.0, logit_scale=1.5)
    z = logits_of(case.hidden, case.head)
    torch.testing.assert_close(logits_of(case.hidden, case.head.at_temperature(2.5)), z / 2.5)
    assert Head(case.head.weight).at_temperature(2.0).softcap is None


WANTS: list[Callable[[HeadGradients], Tensor | None]] = [lambda x: x.hidden, lambda x: x.weight, lambda x: x.bias]


@pytest.mark.parametrize("want", range(3), ids=["hidden", "weight", "bias"])
def test_only_what_is_asked_for(want: int) -> None:
    case = random_case(40, 150, bias=True, softcap=9.0).to(DEVICE)
    inputs = (case.hidden, case.head, case.other_hidden, case.other_head)
    sums = joint_sums(*inputs, labels=case.labels)
    weights = JointWeights(logps=case.upstream["logps"], reverse_kl=case.upstream["reverse_kl"])
    names = ("want_hidden", "want_weight", "want_bias")

    def gradients(*flags: bool) -> HeadGradients:
        return joint_gradients(*inputs, case.labels, sums, weights, **dict(zip(names, flags, strict=True)))

    everything, alone = gradients(True, True, True), gradients(*(i == want for i in range(3)))
    for i, part in enumerate(WANTS):
        got, whole = part(alone), part(everything)
        assert (got is None) == (i != want)
        assert got is None or torch.equal(got, whole)
