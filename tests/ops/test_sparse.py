"""`grad_mode="sparse"`: the gradient that it means, where it is the exact one, what it refuses and what it says."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels.hash_uniform import HashUniform
from tvkd_fast.ops import HeadStats, linear_logps, reference
from tvkd_fast.ops.tiles.selected import Collected, Entries

WIDE = {"max_tail": 1.0, "row_cap": 10**6}
"""Whatever the tail, and however many entries: nothing is computed exactly."""
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 6.0},
    "scale": {"logit_scale": 0.5},
    "everything": {"bias": True, "softcap": 6.0, "logit_scale": 1.5, "ignore_index": -1},
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def sparse(**options: Any) -> Any:
    def op(hidden: Tensor, weight: Tensor, labels: Tensor, **transforms: Any) -> Tensor:
        return linear_logps(hidden, weight, labels, grad_mode="sparse", **(WIDE | options), **transforms)

    return op


def twin(**options: Any) -> Any:
    def op(hidden: Tensor, weight: Tensor, labels: Tensor, **transforms: Any) -> Tensor:
        return reference.sparse_logps(hidden, weight, labels, **options, **transforms)

    return op


def same(got: Any, want: Any, tolerance: float) -> None:
    for name in ("logps", "hidden", "weight", "bias"):
        ours, theirs = getattr(got, name), getattr(want, name)
        if theirs is None:
            assert ours is None
            continue
        unit = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * max(unit, 1e-3))


@heads
@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-7, 2.0**-12])
def test_the_gradient_is_the_twins(kit: SimpleNamespace, head: dict[str, Any], eps: float) -> None:
    case = kit.case(37, 11, 160, torch.float64, **head)
    with kit.tile_sizes(512, 8):
        got = kit.run(sparse(eps=eps), case)
    same(got, kit.run(twin(eps=eps), case), 1e-11)


@draws(40, fresh=True)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(2, 150)),
    log_eps=st.integers(4, 14),
    floats=st.integers(16, 4096),
    rows=st.integers(1, 32),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
    head=st.sampled_from(list(HEADS.values())),
    cap=st.sampled_from([1, 8, 10**6]),
)
def test_any_shape_in_any_tiles(
    kit: SimpleNamespace,
    shape: tuple[int, int, int],
    log_eps: int,
    floats: int,
    rows: int,
    ignored: float,
    seed: int,
    head: dict[str, Any],
    cap: int,
) -> None:
    case = kit.case(*shape, torch.float64, ignored=ignored, seed=seed, **head)
    rule = {"eps": 2.0**-log_eps, "row_cap": cap}
    with kit.tile_sizes(floats, rows):
        got = kit.run(sparse(**rule), case)
    if cap == 10**6:
        same(got, kit.run(twin(**rule), case), 1e-10)
    else:
        # A row near the cap may have more selected entries before it is pruned: it is then the exact gradient's.
        exact, kept = kit.run(twin(**rule), case), kit.run(twin(eps=rule["eps"]), case)
        full = kit.run(reference.linear_logps, case)
        for row in range(shape[0]):
            options = [x.hidden[row] for x in (exact, kept, full)]
            assert min(float((got.hidden[row] - x).abs().max()) for x in options) < 1e-9


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_keeping_everything_is_exact(kit: SimpleNamespace, dtype: torch.dtype, head: dict[str, Any]) -> None:
    case = kit.case(37, 16, 96, dtype, **head)
    stats = HeadStats()
    with kit.tile_sizes(512, 8):
        kit.logps_no_worse(case, sparse(eps=0.0, row_cap=96, stats=stats))
    assert stats.read()["head_entries"] == 95
    assert stats.read()["head_dense_rows"] == 0


@heads
def test_the_sum_over_the_vocabulary_is_the_exact_gradients(kit: SimpleNamespace, head: dict[str, Any]) -> None:
    """Frobenius norms do not see it: a tail that is left out shifts every logit alike."""
    case = kit.case(50, 12, 400, **head)
    got, want = (kit.run(op, case).weight.double().sum(0) for op in (sparse(eps=2.0**-6), linear_logps))
    scale = kit.run(linear_logps, case).weight.double().abs().sum(0).max()
    assert (got - want).abs().max() < 1e-6 * scale
    dropped = kit.run(twin(eps=2.0**-6), case)
    assert (dropped.weight - kit.run(reference.linear_logps, case, torch.float64).weight).abs().max() > 1e-3


@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_only_what_is_asked_for_is_computed(kit: SimpleNamespace, wants: tuple[bool, bool, bool]) -> None:
    case = kit.case(24, 10, 70, bias=True, ignored=0.0)
    whole = kit.run(sparse(eps=2.0**-6), case)
    tensors = [
        getattr(case, name).clone().requires_grad_(want)
        for name, want in zip(("hidden", "weight", "bias"), wants, strict=True)
    ]
    with kit.Watch() as watch:
        logps = linear_logps(*tensors[:2], case.labels, bias=tensors[2], grad_mode="sparse", eps=2.0**-6, **WIDE)
        assert logps.requires_grad == any(wants)
        if any(wants):
            logps.backward(case.upstream.float())
    assert watch.multiply_adds == 24 * 10 * 70
    for name, tensor, want in zip(("hidden", "weight", "bias"), tensors, wants, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, getattr(whole, name))
        else:
            assert tensor.grad is None


def test_rows_over_the_cap_get_the_exact_gradient(kit: SimpleNamespace) -> None:
    case = kit.case(30, 12, 300, ignored=0.2)
    flat = torch.arange(30) % 3 == 0
    case.hidden[flat] *= 0.01
    stats = HeadStats()
    got, exact = kit.run(sparse(eps=2.0**-9, row_cap=150, stats=stats), case), kit.run(linear_logps, case)
    torch.testing.assert_close(got.hidden[flat], exact.hidden[flat])
    rest = ~flat & (case.labels != -100)
    assert ((got.hidden - exact.hidden)[rest].abs().amax(1) > 0).all()
    share = float((flat & (case.labels != -100)).sum() / (case.labels != -100).sum())
    assert stats.read()["head_dense_rows"] == pytest.approx(share)


def test_a_softmax_too_flat_is_computed_exactly(kit: SimpleNamespace) -> None:
    case = kit.case(30, 12, 300)
    stats = HeadStats()
    loose, strict = sparse(eps=2.0**-4, max_tail=1.0), sparse(eps=2.0**-4, max_tail=0.1, stats=stats)
    exact = kit.run(linear_logps, case)
    torch.testing.assert_close(kit.run(strict, case).weight, exact.weight)
    assert stats.read()["head_dense_rows"] == 1
    assert (kit.run(loose, case).weight - exact.weight).abs().max() > 1e-3


def test_an_unbiased_tail_is_the_twins_and_right_on_average(kit: SimpleNamespace) -> None:
    case = kit.case(20, 8, 120, torch.float64, ignored=0.1)
    eps, seeds = 2.0**-5, 400
    exact, mean = kit.run(reference.linear_logps, case).weight, torch.zeros(120, 8, dtype=torch.float64)
    errors = []
    for seed in range(seeds):
        with kit.tile_sizes(512, 8):
            got = kit.run(sparse(eps=eps, tail="unbiased", seed=seed), case)
        if seed < 3:
            u = HashUniform(seed, torch.arange(20), 120).of(slice(None), slice(None)).double()
            same(got, kit.run(twin(eps=eps, u=u), case), 1e-7)
        mean += got.weight / seeds
        errors.append(got.weight - exact)
    noise = torch.stack(errors).std(0) / seeds**0.5
    assert ((mean - exact).abs() < 5 * noise + 1e-6).all()
    even = kit.run(sparse(eps=eps), case).weight
    assert (mean - exact).norm() < 0.2 * (even - exact).norm()


def test_the_dice_are_fair() -> None:
    u = torch.stack([HashUniform(seed, torch.arange(64), 256).of(slice(None), slice(None)) for seed in range(64)])
    assert float(u.min()) > 0
    assert float(u.max()) <= 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    for chance in (0.01, 0.1, 0.9):
        assert float((u < chance).float().mean()) == pytest.approx(chance, rel=0.1)
    # Two entries of a row are independent over seeds: so are the products of their deviations from 1/2.
    centred = u - 0.5
    assert float((centred[:, :, 0] * centred[:, :, 1]).mean()) == pytest.approx(0.0, abs=0.01)
    assert not torch.equal(u[0], u[1])


def test_the_same_bits_each_time(kit: SimpleNamespace) -> None:
    case = kit.case(60, 16, 500, bias=True, softcap=8.0)
    first, second = (kit.run(sparse(eps=2.0**-8, tail="unbiased", seed=5), case) for _ in range(2))
    for name in ("logps", "hidden", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_padded_column_gets_nothing(kit: SimpleNamespace) -> None:
    case = kit.case(30, 8, 64, bias=True, ignored=0.0)
    case.bias[-20:] = -torch.inf
    case.labels.clamp_(max=43)
    got = kit.run(sparse(eps=2.0**-5), case)
    assert (got.weight[-20:] == 0).all()
    assert (got.bias[-20:] == 0).all()
    assert got.weight.isfinite().all()
    short = kit.Case(case.hidden, case.weight[:44], case.labels, case.upstream, case.bias[:44])
    torch.testing.assert_close(got.hidden, kit.run(sparse(eps=2.0**-5), short).hidden)


@pytest.mark.parametrize(("n", "v"), [(0, 50), (1, 50), (5, 1), (3, 2)])
def test_small_things(kit: SimpleNamespace, n: int, v: int) -> None:
    case = kit.case(n, 6, v, torch.float64, ignored=0.0)
    same(kit.run(sparse(eps=2.0**-6), case), kit.run(twin(eps=2.0**-6), case), 1e-11)


def test_all_labels_ignored(kit: SimpleNamespace) -> None:
    case = kit.case(9, 6, 50, ignored=1.1)
    case.hidden[4] = torch.nan
    stats = HeadStats()
    got = kit.run(sparse(eps=2.0**-6, stats=stats), case)
    assert (got.logps == 0).all()
    assert (got.weight == 0).all()
    assert (got.hidden == 0).all()
    assert stats.read()["head_entries"] == 0


def test_states_of_ignored_rows_are_not_read(kit: SimpleNamespace) -> None:
    case = kit.case(40, 6, 50, ignored=0.5)
    want = kit.run(sparse(eps=2.0**-6), case)
    case.hidden[case.labels == -100] = torch.nan
    got = kit.run(sparse(eps=2.0**-6), case)
    torch.testing.assert_close(got.weight, want.weight)
    torch.testing.assert_close(got.hidden, want.hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 2.0**-3}, r"eps must lie in \[0, 2\*\*-4\], got 0.125"),
        ({"eps": -1e-9}, r"eps must lie in \[0, 2\*\*-4\]"),
        ({"eps": float("nan")}, r"eps must lie in \[0, 2\*\*-4\]"),
        ({"row_cap": 0}, "row_cap must be at least 1 entry, got 0"),
        ({"tail": "heavy"}, "tail must be one of even, unbiased, got 'heavy'"),
        ({"max_tail": 1.5}, r"max_tail is a probability in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kit: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    case = kit.case(4, 3, 20)
    with pytest.raises(ValueError, match=message):
        linear_logps(case.hidden.requires_grad_(), case.weight, case.labels, grad_mode="sparse", **options)


def test_an_unknown_mode_is_refused(kit: SimpleNamespace) -> None:
    case = kit.case(4, 3, 20)
    with pytest.raises(ValueError, match="grad_mode must be one of exact, sparse, auto, got 'thin'"):
        linear_logps(case.hidden, case.weight, case.labels, grad_mode="thin")


def test_a_broken_row_of_weight_is_named(kit: SimpleNamespace) -> None:
    case = kit.case(4, 3, 20)
    case.weight[7, 1] = torch.nan
    with pytest.raises(ValueError, match="weight has NaN or inf in row 7"):
        linear_logps(case.hidden.requires_grad_(), case.weight, case.labels, grad_mode="sparse")


def test_auto_is_sparse_or_exact_by_what_was_measured(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kit.case(30, 12, 300)
    want = {"exact": kit.run(linear_logps, case), "sparse": kit.run(sparse(eps=2.0**-7), case)}
    for limit, mode in ((0.5, "exact"), (1e9, "sparse")):
        monkeypatch.setattr("tvkd_fast.ops.sparse_logps.break_even", lambda *_, limit=limit: limit)

        def auto(*args: Any, **transforms: Any) -> Tensor:
            return linear_logps(*args, grad_mode="auto", eps=2.0**-7, **WIDE, **transforms)

        torch.testing.assert_close(kit.run(auto, case).weight, want[mode].weight)


def test_the_break_even_is_measured_once() -> None:
    from tvkd_fast.ops.break_even import break_even

    first = break_even(torch.device("cpu"), torch.float32, 4096, 64)
    assert 0 < first < float("inf")
    assert break_even(torch.device("cpu"), torch.float32, 4096, 64) == first


def test_stats_add_up_over_calls(kit: SimpleNamespace) -> None:
    stats, case = HeadStats(), kit.case(30, 12, 300)
    assert stats.read() == {}
    for _ in range(2):
        kit.run(sparse(eps=2.0**-7, stats=stats), case)
    once = HeadStats()
    kit.run(sparse(eps=2.0**-7, stats=once), case)
    assert stats.read() == once.read()
    kept = reference.logits(case.hidden, case.weight)[case.labels != -100].softmax(1)
    kept.scatter_(1, case.labels[case.labels != -100][:, None], 0.0)
    assert once.read()["head_entries"] == pytest.approx(float((kept >= 2.0**-7).sum(1).double().mean()))
    assert once.read()["head_tail"] == pytest.approx(float((kept * (kept < 2.0**-7)).sum(1).mean()), abs=1e-6)
    assert 1 <= once.read()["head_marked"] < 2
    stats.reset()
    assert stats.read() == {}


def test_entries_are_collected_however_many_more_follow() -> None:
    """The first rows foretell fewer than there are, and the second more."""
    made = [
        [Entries(torch.full((n,), n).int(), torch.arange(n).int(), torch.rand(n), torch.rand(n)) for n in sizes]
        for sizes in ((1, 0), (90, 3), (4, 7))
    ]
    found = Collected(torch.empty(0), [torch.int32] * 2 + [torch.float32] * 2, row_blocks=len(made))
    for tiles in made:
        found.add([x.parts for x in tiles])
    every = [tile for tiles in made for tile in tiles]
    assert found.count == 105
    assert found.bounds.tolist() == [0, 1, 1, 91, 94, 98, 105]
    for part, theirs in zip(found.parts, zip(*(x.parts for x in every), strict=True), strict=True):
        assert torch.equal(part, torch.cat(theirs))
    found.forget()
    assert found.bounds.tolist() == [0] * 7
    assert all(x.numel() == 0 for x in found.parts)
