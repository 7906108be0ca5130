"""Gradients made in the forward against the recomputed ones and the float64 twin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.losses import segment_sums
from tvkd_fast.ops import known as op
from tvkd_fast.ops import linear_logps, reference
from tvkd_fast.ops.known import Upstream, common_factor, known_logps
from tvkd_fast.ops.tiles import block_walk as tiles
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.forward_gradients import _blocks as blocks_of
from tvkd_fast.ops.tiles.forward_gradients import _parts as parts_of
from tvkd_fast.ops.tiles.forward_gradients import rows_of_workspace

D, V = 7, 41
LENGTHS = [3, 5, 0, 9, 1, 4, 6, 2]
N = sum(LENGTHS)
CU = torch.tensor([0, *LENGTHS]).cumsum(0)
REFERENCE = torch.linspace(-9.0, -2.0, len(LENGTHS))

HEADS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scaled": {"logit_scale": 0.7, "bias": True},
    "all": {"bias": True, "softcap": 2.0, "logit_scale": 1.3},
}
every_head = pytest.mark.parametrize("name", HEADS)


def inputs_of(name: str, dtype: torch.dtype = torch.float32, ignored: bool = True) -> tuple[Head, Tensor, Tensor]:
    """A head whose weight and bias are differentiated, hidden [N, D] likewise, and labels (N,)."""
    draw = torch.Generator().manual_seed(3)
    options = dict(HEADS[name])
    weight, hidden = (torch.randn(n, D, generator=draw).to(dtype).requires_grad_() for n in (V, N))
    if options.pop("bias", False):
        options["bias"] = torch.randn(V, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=draw)
    if ignored:
        labels[[1, 20]] = -100
    return Head(weight, **options), hidden, labels


def losses(logps: Tensor) -> Tensor:
    """DPO's, (P,)."""
    margins = 0.3 * (logps - REFERENCE.to(logps)).view(2, -1)
    return -torch.nn.functional.logsigmoid(margins[0] - margins[1])


def upstream(loss: Callable[[Tensor], Tensor] = losses, calls: list[list[int]] | None = None) -> Upstream:
    def derivative(logps: Tensor, responses: Tensor) -> Tensor:
        if calls is not None:
            calls.append(responses.tolist())
        with torch.enable_grad():
            whole = torch.zeros(len(LENGTHS), dtype=logps.dtype).index_put((responses,), logps).requires_grad_()
            pairs = responses[responses < len(LENGTHS) // 2]
            (grad,) = torch.autograd.grad(loss(whole)[pairs].sum(), whole)
        return grad[responses]

    return Upstream(derivative, CU)


def grads_of(logps: Tensor, *leaves: Tensor | None, factor: float = 1.0, **options: Any) -> list[Tensor]:
    loss = factor * losses(segment_sums(logps, CU)).sum()
    return list(torch.autograd.grad(loss, [x for x in leaves if x is not None], **options))


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every gradient that was not the forward's."""
    found: list[Any] = []
    gradients = op.gradients_op

    def watched(*args: Any) -> Any:
        found.append(args[-3:])
        return gradients(*args)

    monkeypatch.setattr(op, "gradients_op", watched)
    return found


@every_head
@pytest.mark.parametrize("compiled", [True, False], ids=["numba", "torch"])
def test_it_is_the_float64_twin(
    monkeypatch: pytest.MonkeyPatch, recomputed: list[Any], name: str, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "passes", lambda z: None)
    head, hidden, labels = inputs_of(name)
    got = known_logps(hidden, head, labels, upstream())
    grads = grads_of(got, hidden, head.weight, head.bias)
    wide, wide_hidden, _ = inputs_of(name, torch.float64)
    twin = reference.linear_logps(
        wide_hidden, wide.weight, labels, bias=wide.bias, softcap=wide.softcap, logit_scale=wide.logit_scale
    )
    expected = grads_of(twin, wide_hidden, wide.weight, wide.bias)
    torch.testing.assert_close(got.double(), twin, rtol=1e-5, atol=1e-6)
    close([x.double() for x in grads], expected, 2e-6)
    assert not recomputed


@every_head
def test_in_float64_it_is_exact(name: str) -> None:
    head, hidden, labels = inputs_of(name, torch.float64)
    got = grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias)
    expected = grads_of(linear_logps(hidden, head, labels), hidden, head.weight, head.bias)
    close(got, expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_rounded_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    head, hidden, labels = inputs_of("bias", dtype)
    wide, wide_hidden = Head(head.weight.double(), head.bias.double()), hidden.double()  # type: ignore[union-attr]
    expected = grads_of(linear_logps(wide_hidden, wide, labels), wide_hidden, wide.weight, wide.bias)
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * D * 10)
    got = grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias)
    close([x.double() for x in got], [x.to(dtype).double() for x in expected], torch.finfo(dtype).eps / 2)


def test_autocast_computes_in_its_dtype() -> None:
    head, hidden, labels = inputs_of("bare")
    with torch.autocast("cpu", torch.bfloat16):
        got = known_logps(hidden, head, labels, upstream())
        expected = linear_logps(hidden, head, labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    close(grads_of(got, hidden, head.weight), grads_of(expected, hidden, head.weight), 1e-2)


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 17])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, recomputed: list[Any], rows: int) -> None:
    """Of a pair that the workspace does not hold all parts but the last are visited twice."""
    head, hidden, labels = inputs_of("all", torch.float64)
    whole = grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias)
    monkeypatch.setattr(tiles, "rows_of_workspace", lambda *_: rows)
    calls: list[list[int]] = []
    parts = known_logps(hidden, head, labels, upstream(calls=calls))
    close(grads_of(parts, hidden, head.weight, head.bias), whole, 1e-13)
    assert sorted(chain.from_iterable(calls)) == list(range(len(LENGTHS)))
    assert not recomputed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_either_layout_of_the_hidden_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    head, hidden, labels = inputs_of("all", dtype)
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * D * 10)
    found = []
    for intel in (True, False):
        monkeypatch.setattr(tiles, "is_intel", lambda intel=intel: intel)
        found.append(grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias))
    close(*found, tolerance=torch.finfo(dtype).eps * 4)


def test_a_block_is_filled_up_to_whole_cache_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With states of zeros, of which nothing is left in the gradients, though the bias gives them exponentials."""
    head, hidden, labels = inputs_of("all", torch.float64)
    found = []
    for rows in (15, 16):
        monkeypatch.setattr(tiles, "rows_of_workspace", lambda *_, rows=rows: rows)
        found.append(grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias))
    close(*found, tolerance=1e-13)
    monkeypatch.setattr(tiles, "rows_of_workspace", lambda *_: 40)
    walk = tiles.BlockWalk(hidden.detach(), head, labels, 0, (True, True, True))
    assert walk.most == 32
    assert walk._block(17).shape == (V, 32)


@given(rows=st.integers(0, 50), most=st.integers(1, 12))
def test_of_a_block_in_parts_the_last_fills_the_workspace(rows: int, most: int) -> None:
    parts = parts_of(rows, most)
    assert sum(parts) == rows
    assert max(parts) <= most
    assert parts[-1] == min(rows, most)
    assert len(parts) == max(1, -(-rows // most))


@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=20), most=st.integers(1, 12), paired=st.booleans())
def test_blocks_are_whole_pairs_that_fit(lengths: list[int], most: int, paired: bool) -> None:
    lengths = lengths[: len(lengths) // 2 * 2]
    half = len(lengths) // 2
    blocks = list(blocks_of(lengths, paired, most))
    assert sorted(chain.from_iterable(blocks)) == list(range(len(lengths)))
    for block in blocks:
        assert block == sorted(block)
        if paired:
            assert {i % half for i in block} == {i for i in block if i < half}
        assert sum(lengths[i] for i in block) <= most or len(block) == 1 + paired


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_wants_no_gradient_gets_none(trained: str) -> None:
    head, hidden, labels = inputs_of("bias")
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    everything = grads_of(known_logps(hidden, head, labels, upstream()), *leaves.values())
    for name, x in leaves.items():
        assert x is not None
        x.requires_grad_(name == trained)
    (grad,) = grads_of(known_logps(hidden, head, labels, upstream()), leaves[trained])
    close([grad], [everything[list(leaves).index(trained)]], 1e-6)


def test_a_loss_of_single_responses() -> None:
    head, hidden, labels = inputs_of("bare", torch.float64)
    calls = []

    def derivative(logps: Tensor, responses: Tensor) -> Tensor:
        calls.append(responses.tolist())
        return 2 * logps

    (got,) = torch.autograd.grad(
        segment_sums(known_logps(hidden, head, labels, Upstream(derivative, CU, paired=False)), CU).square().sum(),
        hidden,
    )
    (expected,) = torch.autograd.grad(segment_sums(linear_logps(hidden, head, labels), CU).square().sum(), hidden)
    close([got], [expected], 1e-13)


@pytest.mark.parametrize("factor", [0.25, -3.0, 0.0])
def test_a_common_factor_is_multiplied_by(recomputed: list[Any], factor: float) -> None:
    head, hidden, labels = inputs_of("bare")
    got = grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, factor=factor)
    close(got, grads_of(linear_logps(hidden, head, labels), hidden, head.weight, factor=factor), 2e-6)
    assert not recomputed


def test_another_upstream_than_was_known_is_computed_anew(recomputed: list[Any]) -> None:
    head, hidden, labels = inputs_of("bare")
    wrong = upstream(lambda logps: losses(2 * logps))
    got = grads_of(known_logps(hidden, head, labels, wrong), hidden, head.weight)
    close(got, grads_of(linear_logps(hidden, head, labels), hidden, head.weight), 2e-6)
    assert recomputed == [(True, True, False)]


def test_a_second_backward_is_right(recomputed: list[Any]) -> None:
    head, hidden, labels = inputs_of("bare")
    logps = known_logps(hidden, head, labels, upstream())
    first = [x.clone() for x in grads_of(logps, hidden, head.weight, factor=2.0, retain_graph=True)]
    assert not recomputed
    close(grads_of(logps, hidden, head.weight, factor=2.0), first, 2e-6)
    assert len(recomputed) == 1


def test_a_second_derivative_is_refused() -> None:
    head, hidden, labels = inputs_of("bare")
    logps = known_logps(hidden, head, labels, upstream())
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grads_of(logps, hidden, create_graph=True)


def test_runs_repeat_bit_for_bit() -> None:
    head, hidden, labels = inputs_of("all")
    runs = [grads_of(known_logps(hidden, head, labels, upstream()), hidden, head.weight, head.bias) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_a_workspace_below_one_row_holds_one() -> None:
    head = Head(torch.empty(400_000, 1, device="meta"))
    assert rows_of_workspace("torch", 1, head, 4) == 1


def test_no_tokens() -> None:
    head, hidden, _ = inputs_of("bias")
    nothing = Upstream(lambda logps, _: logps, torch.tensor([0, 0, 0]))
    logps = known_logps(hidden[:0], head, torch.zeros(0, dtype=torch.int64), nothing)
    weight, bias = torch.autograd.grad(logps.sum(), [head.weight, head.bias])  # type: ignore[list-item]
    assert logps.shape == (0,)
    assert not weight.any()
    assert not bias.any()


def test_nan_of_one_pair_does_not_look_like_a_number() -> None:
    """A reference of NaN gives its pair a loss of NaN, and the gradient of the whole is NaN with it."""
    head, hidden, labels = inputs_of("bare")

    def broken(logps: Tensor) -> Tensor:
        return losses(logps) * torch.tensor([1.0, torch.nan, 1.0, 1.0])

    logps = known_logps(hidden, head, labels, upstream(broken))
    (grad,) = torch.autograd.grad(broken(segment_sums(logps, CU)).sum(), head.weight)
    assert grad.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, y: (h.index_fill(0, torch.tensor([4]), torch.inf), y), "hidden"),
        (lambda h, y: (h, y.clone().index_fill_(0, torch.tensor([4]), V)), "labels out of range"),
        (lambda h, y: (h, y[1:]), "labels must be"),
    ],
    ids=["inf", "label", "shape"],
)
def test_refusals(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str) -> None:
    head, hidden, labels = inputs_of("bare")
    hidden, labels = change(hidden.detach(), labels)
    with pytest.raises(ValueError, match=message):
        known_logps(hidden, head, labels, upstream())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, N], None),
        ([0, 3, 5, N], "upstream has 3 responses, which are no pairs"),
        ([0, 3, N - 1], f"must rise from 0 to {N}"),
        ([0, 9, 3, 12, N], f"must rise from 0 to {N}"),
    ],
)
def test_responses_that_do_not_cover_the_tokens_are_refused(bounds: list[int], message: str | None) -> None:
    head, hidden, labels = inputs_of("bare")
    given = Upstream(lambda logps, _: torch.ones_like(logps), torch.tensor(bounds))
    if message is None:
        assert known_logps(hidden, head, labels, given).shape == (N,)
        return
    with pytest.raises(ValueError, match=message):
        known_logps(hidden, head, labels, given)


@given(
    numbers=st.lists(st.floats(0.125, 5, width=32) | st.floats(-5, -0.125, width=32), min_size=2, max_size=9),
    factor=st.floats(0.125, 3, width=32) | st.floats(-3, -0.125, width=32) | st.just(0.0),
    changed=st.booleans(),
)
def test_a_factor_is_found_where_there_is_one(numbers: list[float], factor: float, changed: bool) -> None:
    known = torch.tensor(numbers)
    given = known * factor
    if changed:
        given[-1] += 1.0
    found = common_factor(given, known)
    assert found is None if changed else found == pytest.approx(factor, rel=1e-6)


def test_peaked_and_empty_rows() -> None:
    """Logits of 80 and more beside the label's, of −inf but for the label, and far below 0."""
    weight = torch.zeros(5, 1, dtype=torch.float64)
    low = -torch.inf
    bias = torch.tensor([[100.0, 0, -90, 3, 1], [low, -300, low, low, low], [-800.0, -801, -790, -805, -799]])
    for logits, label in zip(bias, (1, 1, 3), strict=True):
        b = logits.clone().requires_grad_()
        hidden = torch.ones(1, 1)
        once = Upstream(lambda logps, _: torch.ones_like(logps), torch.tensor([0, 1]), paired=False)
        logp = known_logps(hidden, Head(weight.float(), b), torch.tensor([label]), once)
        wide = logits.double().requires_grad_()
        expected = wide.log_softmax(0)[label]
        torch.testing.assert_close(logp[0].double(), expected, rtol=1e-6, atol=1e-6)
        got, twin = torch.autograd.grad(logp.sum(), b)[0], torch.autograd.grad(expected, wide)[0]
        torch.testing.assert_close(got.double(), twin, rtol=1e-5, atol=1e-9)
