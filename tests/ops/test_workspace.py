"""Logits that an exact gradient keeps from forward to backward: the same numbers, a product less, what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvkd_fast import HeadGradient, fused_linear_tvkd_loss
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops import linear_logps
from tvkd_fast.ops.tiles import exact, huge_pages
from tvkd_fast.ops.tiles.block_walk import LINE
from tvkd_fast.ops.tiles.forward_gradients import STATES


def keeping(megabytes: int) -> Any:
    def op(*args: Tensor, **options: Any) -> Tensor:
        return linear_logps(*args, workspace_mb=megabytes, **options)

    return op


@draws(40, fresh=True)
@given(
    shape=st.tuples(st.integers(0, 60), st.integers(1, 24), st.integers(2, 300)),
    share=st.floats(0, 1.2),
    floats=st.integers(64, 8192),
    rows=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 8.0]),
    scale=st.sampled_from([1.0, 0.25]),
    ignored=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_no_worse_whatever_is_kept(
    kit: SimpleNamespace,
    shape: tuple[int, int, int],
    share: float,
    floats: int,
    rows: int,
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    scale: float,
    ignored: float,
    seed: int,
) -> None:
    case = kit.case(*shape, dtype, seed=seed, bias=bias, softcap=softcap, logit_scale=scale, ignored=ignored)
    with kit.tile_sizes(floats, rows), pytest.MonkeyPatch.context() as patch:
        workspace = exact.logits_workspace

        def some(hidden: Tensor, head: Head, kept: Tensor | None, megabytes: int) -> Tensor:
            """As if the workspace were smaller than a MiB, as these shapes are."""
            whole = workspace(hidden, head, kept, megabytes)
            block = exact.rows_of_a_tile(whole.shape[0], hidden.shape[1])
            fitting = int(share * whole.shape[0])
            return whole if fitting >= whole.shape[0] else whole[: fitting // block * block]

        patch.setattr(exact, "logits_workspace", some)
        kit.logps_no_worse(case, keeping(1))


@pytest.mark.parametrize("kept", [0, 8, 24])
def test_what_is_kept_is_not_computed_again(kit: SimpleNamespace, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kit.case(24, 10, 70, ignored=0.0)
    workspace = exact.logits_workspace
    monkeypatch.setattr(exact, "logits_workspace", lambda *args: workspace(*args)[:kept])
    with kit.tile_sizes(512, 8), kit.Watch() as watch:
        kit.run(keeping(1), case)
    assert watch.multiply_adds == (4 * 24 - kept) * 10 * 70


def test_the_workspace_is_whole_blocks_of_rows_or_all(kit: SimpleNamespace) -> None:
    head = Head(torch.zeros(2**18, 8))
    for count, megabytes, rows in ((10, 0, 0), (10, 4, 4), (10, 9, 8), (10, 10, 10), (3, 2, 0), (3, 3, 3), (0, 5, 0)):
        with kit.tile_sizes(2**20, 4):
            workspace = exact.logits_workspace(torch.zeros(count, 8), head, None, megabytes)
            assert workspace.shape == (rows, 2**18), (count, megabytes)
    with kit.tile_sizes(2**20, 4):
        assert exact.logits_workspace(torch.zeros(99, 8), head, torch.arange(4), 99).shape[0] == 4
        assert exact.logits_workspace(torch.zeros(9, 8).double(), head, None, 9).shape[0] == 4


def test_two_backwards_through_the_same_logits(kit: SimpleNamespace) -> None:
    case = kit.case(9, 6, 50)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    total = linear_logps(hidden, weight, case.labels, workspace_mb=1).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(total, (hidden, weight))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_kept_where_nothing_is_learnt_or_the_head_is_frozen(kit: SimpleNamespace) -> None:
    case = kit.case(9, 6, 50)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        workspace = exact.logits_workspace
        patch.setattr(exact, "logits_workspace", lambda *args: asked.append(args[-1]) or workspace(*args))
        linear_logps(case.hidden, case.weight, case.labels, workspace_mb=1)
        linear_logps(case.hidden.clone().requires_grad_(), case.weight, case.labels, workspace_mb=1)
        assert not any(asked)
        linear_logps(case.hidden, case.weight.clone().requires_grad_(), case.labels, workspace_mb=1)
        assert asked[-1] == 1


def test_the_fused_losses_block_is_of_that_size(kit: SimpleNamespace) -> None:
    case = kit.case(24, 6, 20000, ignored=0.0)
    bounds, room = torch.tensor([0, 14, 24]), 2**20 // (4 * (20000 + STATES * 6))
    assert room < LINE < 24
    found = []
    # What does not fit is computed twice; what does is filled up to whole lines.
    for megabytes, rows in ((1, 3 * 24 + 24 - room), (4, 3 * 2 * LINE)):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        gradient = HeadGradient(workspace_mb=megabytes)
        with kit.Watch() as watch:
            out = fused_linear_tvkd_loss(
                hidden, weight, case.labels, bounds, ref_logps=torch.zeros(2), alpha=0.0, gradient=gradient
            )
        assert watch.multiply_adds == rows * 6 * 20000
        found.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight))))
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="workspace_mb is memory in MiB, 0 for none, got -1"):
        HeadGradient(workspace_mb=-1)
    with pytest.raises(ValueError, match="keeps logits for exact gradients, which grad_mode='sparse' is not"):
        HeadGradient(workspace_mb=1, grad_mode="sparse")


def test_large_tensors_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda start, size, advice: asked.append((start, size)))
    x = huge_pages.large_empty(torch.zeros(1), (3 * 2**19 + 5, 2))
    ((start, size),) = asked
    assert start % huge_pages.HUGE == 0
    assert size % huge_pages.HUGE == 0
    assert x.data_ptr() <= start < start + size <= x.data_ptr() + x.nbytes
    assert size >= x.nbytes - 2 * huge_pages.HUGE
    assert huge_pages.large_empty(torch.zeros(1), (5,)).shape == (5,)
    assert huge_pages.large_empty(torch.zeros(1, device="meta"), (2**20, 4), torch.float64).dtype == torch.float64
    assert len(asked) == 1
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.large_empty(torch.zeros(1), (2**20, 2)).shape == (2**20, 2)
