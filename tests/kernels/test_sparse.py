"""The one-GEMM head's kernels against the twin of their gradient: interpreted, or compiled where a GPU is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast.kernels import dense_columns, gathers, selected_lists
from tvkd_fast.kernels.autotune import CANDIDATES
from tvkd_fast.kernels.configs import INTERPRETED
from tvkd_fast.kernels.hash_uniform import HashUniform
from tvkd_fast.kernels.head_selection import select_entries
from tvkd_fast.kernels.records import Head, SelectionRule
from tvkd_fast.ops import HeadStats, linear_logps, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
WIDE: dict[str, Any] = {"max_tail": 1.0, "row_cap": 10**6}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 6.0},
    "scale": {"logit_scale": 0.5},
    "everything": {"bias": True, "softcap": 6.0, "logit_scale": 1.5, "ignore_index": -1},
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def sparse(**options: Any) -> Any:
    def op(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **transforms: Any) -> Tensor:
        moved = (hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE))
        bias = None if bias is None else bias.to(DEVICE)
        options_ = {"grad_mode": "sparse", "impl": "triton"} | WIDE | options
        return linear_logps(*moved, bias=bias, **options_, **transforms).to(hidden.device)

    return op


def columns_in_full(case: Any, eps: float) -> Tensor:
    """(V,) bool: the columns whose gradient the kernels make exact."""
    head = Head(case.weight.to(DEVICE), None if case.bias is None else case.bias.to(DEVICE), **transforms_of(case))
    ignore_index = case.transforms.get("ignore_index", -100)
    rule = SelectionRule(eps, 10**6)
    _, selected = select_entries(case.hidden.to(DEVICE), head, case.labels.to(DEVICE), rule, ignore_index=ignore_index)
    found = torch.zeros(len(case.weight), dtype=torch.bool)
    found[selected.dense_columns.cpu()] = True
    return found


def transforms_of(case: Any) -> dict[str, Any]:
    return {name: value for name, value in case.transforms.items() if name in ("softcap", "logit_scale")}


def right(kit: SimpleNamespace, case: Any, eps: float, *, u: Tensor | None = None, **options: Any) -> Any:
    """Within rounding of the twin: float32's, or that of 16-bit gradients that are rounded where a block ends."""
    always = columns_in_full(case, eps)

    def twin(*args: Any, **transforms: Any) -> Tensor:
        return reference.sparse_logps(*args, eps=eps, u=u, always=always, **transforms)

    got, want = kit.run(sparse(eps=eps, **options), case), kit.run(twin, case, upcast_to=torch.float64)
    tolerance = 2e-5 if case.hidden.dtype == torch.float32 else 4 * torch.finfo(case.hidden.dtype).eps
    for name in ("logps", "hidden", "weight", "bias"):
        ours, theirs = getattr(got, name), getattr(want, name)
        if theirs is not None:
            unit = (float(theirs.abs().max()) if theirs.numel() else 0.0) or 1.0
            bound = 2e-5 if name == "logps" else tolerance
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=bound * unit)
    return got


@pytest.mark.each_once("interpreter")
@heads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_twins(kit: SimpleNamespace, dtype: torch.dtype, head: dict[str, Any]) -> None:
    right(kit, kit.case(37, 16, 130, dtype, **head), 2.0**-5)


@pytest.mark.interpreter
@draws(8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 70), st.sampled_from([1, 8, 24, 33]), st.integers(1, 150)),
    log_eps=st.integers(4, 10),
    ignored=st.sampled_from([0.0, 0.4]),
    head=st.sampled_from(list(HEADS.values())),
)
def test_any_shape(
    kit: SimpleNamespace, shape: tuple[int, int, int], log_eps: int, ignored: float, head: dict[str, Any]
) -> None:
    right(kit, kit.case(*shape, ignored=ignored, **head), 2.0**-log_eps)


def test_without_dense_columns_it_is_what_torch_computes(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_columns, "DENSE_COLUMNS", 0)
    case = kit.case(20, 16, 90)
    ours, torchs = HeadStats(), HeadStats()
    got = right(kit, case, 2.0**-6, stats=ours)
    want = kit.run(sparse(eps=2.0**-6, impl="torch", stats=torchs), case)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)
    # What is selected is pruned in the backward: it counts as kept, and its mass as kept.
    assert ours.read()["head_entries"] == pytest.approx(
        torchs.read()["head_entries"] * torchs.read()["head_marked"], rel=0.5
    )
    assert ours.read()["head_tail"] <= torchs.read()["head_tail"] + 1e-6


def test_keeping_everything_is_exact(kit: SimpleNamespace) -> None:
    case, stats = kit.case(20, 16, 70, bias=True, softcap=8.0, ignored=0.0), HeadStats()
    got, exact = kit.run(sparse(eps=0.0, stats=stats), case), kit.run(reference.linear_logps, case, torch.float64)
    for name in ("hidden", "weight", "bias"):
        ours, theirs = getattr(got, name).double(), getattr(exact, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    labels_in_sparse_columns = float((~columns_in_full(case, 0.0))[case.labels].double().mean())
    assert stats.read()["head_entries"] == pytest.approx(70 - 70 // 6 - labels_in_sparse_columns)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("head", [{}, HEADS["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [33, 64])
def test_rows_that_registers_do_not_hold_are_taken_in_tiles(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, d: int, dtype: torch.dtype, head: dict[str, Any]
) -> None:
    for name in ("GATHERED_WHOLE", "GATHERED_TILE"):
        monkeypatch.setattr(gathers, name, 16)
    assert gathers.GatherConfig.of(d).tiles > 1
    right(kit, kit.case(20, d, 70, dtype, **head), 2.0**-5)


def test_wide_rows_are_gathered_one_ahead_of_another(kit: SimpleNamespace) -> None:
    assert gathers.GatherConfig.of(2100).block_e == 1
    right(kit, kit.case(4, 2100, 40, bias=True), 2.0**-7)


@pytest.mark.interpreter
def test_many_blocks_of_rows(kit: SimpleNamespace, blocks: SimpleNamespace) -> None:
    """Bits that are written down 32 rows at a time, and then no more."""
    blocks.shrink(workspace_bytes=32 * 4 * 6)
    right(kit, kit.case(80, 8, 150, ignored=0.2), 2.0**-6)


def test_an_unbiased_tail(kit: SimpleNamespace) -> None:
    case = kit.case(20, 8, 60, ignored=0.1)
    u = HashUniform(7, torch.arange(20), 60).of(slice(None), slice(None)).double()
    right(kit, case, 2.0**-5, u=u, tail="unbiased", seed=7)


@heads
def test_rows_over_the_cap_get_the_exact_gradient(kit: SimpleNamespace, head: dict[str, Any]) -> None:
    case, stats = kit.case(30, 12, 120, ignored=0.2, **head), HeadStats()
    flat = torch.arange(30) % 3 == 0
    case.hidden[flat] *= 0.01
    if case.bias is not None:
        case.bias.mul_(0.01)
    got = kit.run(sparse(eps=2.0**-9, row_cap=90, stats=stats), case)
    exact = kit.run(reference.linear_logps, case, torch.float64)
    torch.testing.assert_close(got.hidden[flat].double(), exact.hidden[flat], rtol=1e-4, atol=1e-5)
    assert stats.read()["head_dense_rows"] > 0.2


@pytest.mark.interpreter
def test_a_softmax_too_flat_is_computed_exactly(kit: SimpleNamespace) -> None:
    case, stats = kit.case(20, 12, 130), HeadStats()
    got = kit.run(sparse(eps=2.0**-4, max_tail=0.05, stats=stats), case)
    exact = kit.run(reference.linear_logps, case, torch.float64)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-5)
    assert stats.read()["head_dense_rows"] == 1


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_asked_for_is_computed(kit: SimpleNamespace, wants: tuple[bool, bool, bool]) -> None:
    case = kit.case(24, 10, 70, bias=True)
    whole = kit.run(sparse(eps=2.0**-6), case)
    names = ("hidden", "weight", "bias")
    leaves = [getattr(case, x).clone().requires_grad_(want) for x, want in zip(names, wants, strict=True)]
    op = sparse(eps=2.0**-6)
    op(leaves[0], leaves[1], case.labels, bias=leaves[2]).backward(case.upstream.float())
    for name, leaf, want in zip(names, leaves, wants, strict=True):
        if want:
            torch.testing.assert_close(leaf.grad, getattr(whole, name))
        else:
            assert leaf.grad is None


def test_a_padded_column_gets_nothing(kit: SimpleNamespace) -> None:
    case = kit.case(30, 8, 64, bias=True, ignored=0.0)
    case.bias[-20:] = -torch.inf
    case.labels.clamp_(max=43)
    got = right(kit, case, 2.0**-5)
    assert (got.weight[-20:] == 0).all()
    assert (got.bias[-20:] == 0).all()


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize(("n", "v"), [(0, 50), (1, 50), (5, 1), (3, 2), (15, 64)])
@pytest.mark.parametrize("d", [6, 16])
def test_small_things(kit: SimpleNamespace, n: int, d: int, v: int) -> None:
    """D of 16 has rows that bulk copies take: fewer rows than a sample is one of must not ask for them."""
    right(kit, kit.case(n, d, v, ignored=0.0), 2.0**-6)


def test_a_label_that_a_bias_takes_out_keeps_its_gradient(kit: SimpleNamespace) -> None:
    case = kit.case(12, 8, 40, bias=True, ignored=0.0)
    case.bias[case.labels[0]] = -torch.inf
    got, want = (kit.run(op, case).weight for op in (sparse(eps=0.0), linear_logps))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_backward_under_autocast_is_the_same(kit: SimpleNamespace) -> None:
    case = kit.case(20, 16, 60, torch.float16)
    want = kit.run(sparse(eps=2.0**-5), case)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = kit.run(sparse(eps=2.0**-5), case)
    for name in ("logps", "hidden", "weight"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_all_labels_ignored(kit: SimpleNamespace) -> None:
    case, stats = kit.case(40, 6, 50, ignored=1.1), HeadStats()
    got = kit.run(sparse(eps=2.0**-6, stats=stats), case)
    for name in ("logps", "weight", "hidden"):
        assert (getattr(got, name) == 0).all()
    assert stats.read()["head_entries"] == 0


@pytest.mark.interpreter
def test_the_same_bits_each_time(kit: SimpleNamespace) -> None:
    case = kit.case(40, 16, 150, bias=True, softcap=8.0)
    first, second = (kit.run(sparse(eps=2.0**-8, tail="unbiased", seed=5), case) for _ in range(2))
    for name in ("logps", "hidden", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_sum_over_the_vocabulary_is_the_exact_gradients(kit: SimpleNamespace) -> None:
    case = kit.case(40, 12, 150)
    got, want = kit.run(sparse(eps=2.0**-5), case), kit.run(reference.linear_logps, case, torch.float64)
    scale = want.weight.abs().sum(0).max()
    assert (got.weight.double().sum(0) - want.weight.sum(0)).abs().max() < 1e-5 * scale


def test_labels_come_first_among_dense_columns(kit: SimpleNamespace) -> None:
    case = kit.case(12, 8, 130, ignored=0.25)
    found = columns_in_full(case, 2.0**-6)
    assert int(found.sum()) == 130 // dense_columns.DENSE_SHARE
    assert found[case.labels[case.labels != -100]].all()


@pytest.mark.parametrize("words", [1, 64, 65, 300])
def test_lists_are_the_bits_in_order(words: int) -> None:
    torch.manual_seed(words)
    chosen = torch.rand(9, 32 * words) < 0.1
    chosen[3] = False
    packed = (chosen.view(9, words, 32).long() << torch.arange(32)).sum(2).int().to(DEVICE)
    labels = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    labels[5] = -100
    counts = selected_lists.count_selected(packed, labels, -100)
    chosen[5] = False
    assert torch.equal(counts.cpu(), chosen.sum(1))
    columns = selected_lists.list_selected(packed, counts)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = selected_lists.SelectedLists(columns, starts, counts.float(), counts[:0], counts[:0]).rows
    want_rows, want_columns = chosen.nonzero().unbind(1)
    assert torch.equal(rows.cpu().long(), want_rows)
    assert torch.equal(columns.cpu().long(), want_columns)


def test_tiles_are_whole_words() -> None:
    assert {config.block_n % 32 for config in (INTERPRETED, *CANDIDATES)} == {0}


def test_a_compiled_step_is_the_same(kit: SimpleNamespace) -> None:
    case = kit.case(20, 8, 70)
    op = sparse(eps=2.0**-6, seed=0)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    want, got = kit.run(op, case), kit.run(compiled, case)
    for name in ("logps", "hidden", "weight"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
