"""The blocks of [N, V] that are written to memory: their sizes, a device without room, and the library's products."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_head import logps, right
from tvkd_fast.kernels import blocks as sizes
from tvkd_fast.kernels import head_backward, products
from tvkd_fast.kernels.configs import Demand, choose

MIB = 2**20
TILES = (choose("dlogits", "sm_90", Demand()), choose("product", "sm_90", Demand()))


@given(
    n=st.integers(1, 70_000),
    d=st.sampled_from((64, 576, 2048, 5120)),
    v=st.integers(1, 262_144),
    budget=st.sampled_from((32, 64, 384, 1024)),
    sums=st.sampled_from(("none", "rows", "columns")),
    always=st.booleans(),
)
def test_blocks_and_their_sums_fit_the_budget(n: int, d: int, v: int, budget: int, sums: str, always: bool) -> None:
    row_sums, column_sums = 4 * d * (sums == "rows"), 4 * d * (sums == "columns")
    found = sizes.plan(
        (n, d, v), 2, TILES, budget=budget * MIB, row_sums=row_sums, column_sums=column_sums, always=always
    )
    whole = max(max(x.block_m, x.block_n, x.block_k) for x in TILES)
    assert found.rows % whole == found.columns % whole == 0
    assert found.rows < n + whole
    assert found.columns < v + whole
    held = found.rows * (2 * found.columns + row_sums)
    if always or found.rows < n:
        held += found.columns * column_sums
    # One column of tiles is taken whatever it holds.
    assert held <= budget * MIB or found.columns == whole


def test_a_large_workspace_takes_a_large_head_in_few_blocks() -> None:
    """dH is read and written once a block of columns: 63 times in 32 MiB."""
    n, d, v = 8192, 4096, 128256
    found = sizes.plan((n, d, v), 2, TILES, budget=2**30 - 4 * n * d, column_sums=4 * d, always=True)
    assert found.rows == n
    assert -(-v // found.columns) <= 5


def test_the_workspace_is_a_share_of_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(gib: float) -> int:
        sizes._device_workspace.cache_clear()
        found = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        return sizes._device_workspace(0) // MIB

    assert [on(gib) for gib in (1, 16, 24, 80, 140)] == [32, 256, 384, 1024, 1024]
    sizes._device_workspace.cache_clear()


def test_a_device_without_room_gets_the_least_workspace_and_then_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes, "workspace_bytes", lambda on: 1024 * MIB)
    asked: list[int] = []

    def run(budget: int, room: int) -> str:
        asked.append(budget // MIB)
        if budget > room * MIB:
            raise torch.OutOfMemoryError("full")
        return "done"

    nothing = torch.empty(0)
    assert sizes.in_workspace(nothing, lambda budget: run(budget, 2048)) == "done"
    assert sizes.in_workspace(nothing, lambda budget: run(budget, 100)) == "done"
    assert asked == [1024, 1024, 32]
    with pytest.raises(torch.OutOfMemoryError) as error:
        sizes.in_workspace(nothing, lambda budget: run(budget, 1))
    assert "shorten the micro-batch" in error.value.__notes__[0]


def test_a_backward_that_runs_out_of_memory_begins_again(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "workspace_bytes", lambda on: 64 * MIB)
    plan, failures = head_backward.plan, iter([True, False, False])

    def full_at_first(*args: Any, **options: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("full")
        return plan(*args, **options)

    monkeypatch.setattr(head_backward, "plan", full_at_first)
    case = kit.case(40, 16, 70, bias=True)
    got = kit.run(logps, case)
    assert next(failures) is False
    monkeypatch.setattr(head_backward, "plan", plan)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(getattr(got, name), getattr(kit.run(logps, case), name))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let the library take the products, as on a GPU; the shapes of those that it took."""
    if torch.cuda.is_available():
        pytest.skip("a GPU's own library takes them in every other test")
    taken: list[tuple[int, ...]] = []
    plain = products.accumulate

    def accumulate(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> None:
        assert total.dtype == torch.float32
        taken.append((*left.shape, right.shape[1]))
        plain(total, left, right, **options)

    monkeypatch.setattr(products, "accumulate", accumulate)
    for place in (products, head_backward):
        monkeypatch.setattr(place, "library_sums", lambda device, dtype: True)
    return taken


@pytest.mark.parametrize("share", [2, 2**30], ids=["together", "apart"])
def test_products_by_the_library_are_right(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    library: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    share: int,
) -> None:
    blocks.shrink(workspace_bytes=64 * 128 * 2 + 128 * 16 * 4)
    monkeypatch.setattr(head_backward, "HIDDEN_SUM_SHARE", share)
    case = kit.case(70, 16, 150, torch.float16, bias=True, softcap=8.0)
    first = right(kit, case)
    assert {shape[0] for shape in library} >= {64, 6}  # blocks of rows, for dH
    assert {shape[1] for shape in library} >= {64, 6}  # and for dW
    again = kit.run(logps, case)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_without_such_a_product_tritons_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without `out_dtype` raises TypeError, a device without such a product RuntimeError."""
    ones, gpu = torch.ones, torch.device("cuda", 0)
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **options: ones(*shape, **options))
    for error in (TypeError, RuntimeError):

        def refuse(*_: Any, raised: type[Exception] = error, **__: Any) -> None:
            raise raised("no such product")

        monkeypatch.setattr(torch, "addmm", refuse)
        products.library_sums.cache_clear()
        assert not products.library_sums(gpu, torch.float16)
    products.library_sums.cache_clear()
    assert not products.library_sums(torch.device("cpu"), torch.float16)
    assert not products.library_sums(torch.device("cuda", 0), torch.float32)


def test_without_such_a_product_a_sum_takes_upcast_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch, "addmm", lambda total, *operands, **options: taken.append((*operands, *options)))
    monkeypatch.setattr(products, "library_sums", lambda device, dtype: False)
    operand: Any = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float16, float=lambda: "upcast")
    products.accumulate(torch.zeros(1), operand, operand)
    assert taken == [("upcast", "upcast", "beta", "alpha", "out")]
