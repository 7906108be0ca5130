"""Exponentials that Triton keeps from forward to backward: no worse than torch, a product less, ignored rows apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast import HeadGradient, fused_linear_tvkd_loss
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops import linear_logps, reference, triton_walk

DTYPES = (torch.float32, torch.float16)


def keeping(*args: Tensor, **options: Any) -> Tensor:
    return linear_logps(*args, workspace_mb=4, impl="triton", **options)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if a workspace of some MiB held so few rows, and a block's products so few."""

    def shrink(kept: int, most: int) -> None:
        monkeypatch.setattr(triton_walk, "_fitting", lambda hidden, *_: min(kept, len(hidden)))
        monkeypatch.setattr(triton_walk, "rows_of_workspace", lambda *_: most)

    return shrink


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kept", "most"), [(99, 7), (9, 4), (1, 99)])
@pytest.mark.parametrize("transforms", [{}, {"bias": True, "softcap": 8.0, "logit_scale": 0.5}], ids=["plain", "all"])
def test_no_worse_whatever_is_kept(
    kit: SimpleNamespace, room: Any, dtype: torch.dtype, kept: int, most: int, transforms: dict[str, Any]
) -> None:
    room(kept, most)
    case = kit.case(17, 24, 150, dtype, ignored=0.3, **transforms)
    if dtype == torch.float32:
        kit.logps_no_worse(case, keeping)
        return
    # Of 16 bits the exponentials are rounded, the states times their factors, and the result.
    exact = kit.run(reference.linear_logps, case, torch.float64)
    for name, wanted in vars(exact).items():
        got = getattr(kit.run(keeping, case), name)
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert (got.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm(), name


def test_what_is_kept_is_not_computed_again(kit: SimpleNamespace, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 rows 8 are kept: 12 + 4 forward products, and one of each gradient's."""
    made = []

    def counted(out: Tensor, left: Tensor, right: Tensor, **options: Any) -> None:
        made.append(left.shape[0] * left.shape[1] * right.shape[1])
        accumulate(out, left, right, **options)

    accumulate = triton_walk.accumulate
    monkeypatch.setattr(triton_walk, "accumulate", counted)
    room(8, 99)
    kit.run(keeping, kit.case(12, 24, 150, ignored=0.0))
    assert sum(made) == (12 + 4 + 2 * 12) * 24 * 150


def test_broken_ignored_rows_stay_apart(kit: SimpleNamespace) -> None:
    case = kit.case(8, 24, 150, ignored=0.0)
    hidden, weight = case.hidden.clone(), case.weight.clone().requires_grad_()
    labels = case.labels.clone()
    labels[3] = -100
    linear_logps(hidden, weight, labels, workspace_mb=4, impl="triton").sum().backward()
    first, weight.grad = weight.grad, None
    hidden[3] = torch.inf
    kept = triton_walk.kept_forward(hidden, Head(weight.detach()), labels, ignore_index=-100, workspace_mb=4)
    found = triton_walk.kept_gradients(
        hidden,
        Head(weight.detach()),
        labels,
        kept[0],
        torch.ones(8),
        kept[1],
        ignore_index=-100,
        wants=(True, True, False),
    )
    assert torch.equal(found.weight, first)
    assert not found.hidden[3].any()


def test_a_label_with_all_of_the_probability(kit: SimpleNamespace) -> None:
    hidden = torch.ones(2, 4, requires_grad=True)
    weight, bias = torch.zeros(150, 4, requires_grad=True), torch.full((150,), -torch.inf)
    bias[[3, 5]] = 0.0
    bias[5] = -torch.inf
    logps = linear_logps(hidden, weight, torch.tensor([3, 3]), bias=bias, workspace_mb=4, impl="triton")
    assert logps.tolist() == [0.0, 0.0]
    for grad in torch.autograd.grad(logps.sum(), (hidden, weight)):
        assert not grad.any()


def test_no_rows(kit: SimpleNamespace) -> None:
    kit.logps_no_worse(kit.case(0, 24, 150), keeping)


def test_weighted_pairs_of_the_fused_loss(kit: SimpleNamespace) -> None:
    case = kit.case(12, 24, 150, ignored=0.0)
    bounds = torch.tensor([0, 2, 5, 9, 12])
    found = []
    for impl in ("torch", "triton"):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        out = fused_linear_tvkd_loss(
            hidden,
            weight,
            case.labels,
            bounds,
            ref_logps=torch.zeros(4),
            alpha=0.0,
            gradient=HeadGradient(workspace_mb=4),
            impl=impl,
        )
        loss = out.losses @ torch.tensor([0.25, 0.75])
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*found)
