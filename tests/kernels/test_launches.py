"""How often a step of the head launches anything, and how much of a chip each launch fills, counted on the meta device.

The tiles and the workspace are an H200's; nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from replaced import replace_everywhere
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tvkd_fast.kernels import blocks, launch
from tvkd_fast.kernels.records import Head
from tvkd_fast.ops import triton_backend, triton_walk
from tvkd_fast.ops.joint import triton_blocks, triton_joint
from tvkd_fast.ops.joint.outputs import Outputs
from tvkd_fast.ops.known import Upstream, known_logps
from tvkd_fast.ops.tiles.joint.sides import Side
from tvkd_fast.ops.tiles.joint.walk import Task

PROCESSORS = 132
FREE = {"empty", "empty_like", "new_empty", "detach", "alias", "lift_fresh", "empty_strided"}
"""Operators that launch nothing, as views do not."""
OF_NUMBERS_A_ROW = {"merge_splits", "joint_merge", "dlogp_dhidden", "rescale"}
"""Kernels whose programs take several rows each, and hardly any time."""


class Launches(TorchDispatchMode):
    """Launches of kernels with their programs, products of the library, and what else of torch writes on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: list[tuple[str, int]] = []
        self.products = 0
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and out.device.type == "meta" and name not in FREE and not func.is_view:
            self.others[name] += 1
        return out


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Launches:
    assert triton_walk
    assert triton_blocks
    counts = Launches()

    def launch(kernel: Any, programs: int, **_: Any) -> None:
        if programs:
            counts.programs.append((kernel.fn.__name__.removesuffix("_kernel"), programs))

    def accumulate(*_: Any, **__: Any) -> None:
        counts.products += 1

    replace_everywhere(
        monkeypatch,
        launch=launch,
        accumulate=accumulate,
        target_of=lambda _: "sm_90",
        library_sums=lambda *_: True,
        workspace_bytes=lambda _: blocks.MOST_BYTES,
        operand=lambda tensor, *_: tensor,
    )
    monkeypatch.setattr("tvkd_fast.ops.dispatch._no_triton", lambda *_: None)
    return counts


def inputs(n: int, d: int, v: int) -> tuple[Tensor, Head, Tensor]:
    hidden, weight = (torch.empty(size, d, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in (n, v))
    return hidden, Head(weight), torch.empty(n, device="meta", dtype=torch.int64)


def known(n: int, d: int, v: int) -> None:
    hidden, head, labels = inputs(n, d, v)
    lengths = [128] * (n // 128)
    cu_seqlens = torch.empty(len(lengths) + 1, device="meta", dtype=torch.int64)
    upstream = Upstream(lambda logps, _: logps, cu_seqlens, lengths=lengths)
    known_logps(hidden, head, labels, upstream, impl="triton")


def unknown(n: int, d: int, v: int, *, frozen: bool = False, megabytes: int = 0) -> None:
    hidden, head, labels = inputs(n, d, v)
    with torch.no_grad():
        sums, left = triton_backend.logps_forward(
            hidden, head, labels, ignore_index=-100, workspace_mb=megabytes, streamed=frozen
        )
        if not frozen:
            wants = {"want_hidden": True, "want_weight": True, "want_bias": False}
            grad_logps = torch.empty(n, device="meta")
            triton_backend.logps_gradients(
                hidden, head, labels, sums, grad_logps, logits=left, ignore_index=-100, **wants
            )


def frozen(n: int, d: int, v: int) -> None:
    unknown(n, d, v, frozen=True)


def kept(n: int, d: int, v: int) -> None:
    unknown(n, d, v, megabytes=2048)


def values(n: int, d: int, v: int) -> None:
    hidden, head, _ = inputs(n, d, v)
    with torch.no_grad():
        triton_backend.head_sums(hidden, head)


def two_heads(n: int, d: int, v: int, kind: str) -> Task:
    """A student and a teacher of its width."""
    (hidden, head, _), (teacher_hidden, teacher, _) = inputs(n, d, v), inputs(n, d, v)
    return Task(Side(hidden, head), ((1.0, Side(teacher_hidden, teacher)),), Outputs((kind,)))


def divergence(n: int, d: int, v: int, *, kind: str = "forward_kl") -> None:
    task, upstream = two_heads(n, d, v, kind), torch.empty(1, n, device="meta")
    with torch.no_grad():
        sums, moments = triton_joint.joint_sums(task)
        triton_joint.joint_gradients(task, sums, moments, upstream, (True, True, False), (False, False, False))


def jsd(n: int, d: int, v: int) -> None:
    divergence(n, d, v, kind="jsd")


def known_divergence(n: int, d: int, v: int) -> None:
    with torch.no_grad():
        triton_blocks.block_walk(
            two_heads(n, d, v, "jsd"), torch.empty(1, n, device="meta"), (True, True, False)
        )  # fmt: skip


OPS = [known, unknown, kept, frozen, values, divergence, jsd, known_divergence]


@pytest.mark.parametrize(("op", "most"), list(zip(OPS, (8, 30, 10, 30, 4, 30, 31, 24), strict=True)))
def test_launches_over_the_vocabulary(h200: Launches, op: Any, most: int) -> None:
    """At 4096 x 4096 x 128,256, where 40 are allowed; beside them are operations on a number a row."""
    with h200:
        op(4096, 4096, 128_256)
    assert len(h200.programs) + h200.products <= most
    assert h200.others.total() <= (130 if op is known_divergence else 70)


@pytest.mark.parametrize("d", [2048, 4096])
@pytest.mark.parametrize("op", OPS)
def test_small_batches_fill_the_chip(h200: Launches, op: Any, d: int) -> None:
    with h200:
        op(512, d, 128_256)
    of_tiles = [(name, programs) for name, programs in h200.programs if name not in OF_NUMBERS_A_ROW]
    assert of_tiles
    assert min(programs for _, programs in of_tiles) >= 0.9 * PROCESSORS, of_tiles


def test_a_launch_is_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is current: it becomes the tensor's for the launch, and only for it."""
    events: list[object] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda **_: events.append(grid)

    @contextmanager
    def device_of(on: Tensor) -> Iterator[None]:
        events.append(on)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    on = torch.empty(1, device="meta")
    launch.launch(Kernel(), 3, on=on, options={})
    launch.launch(Kernel(), 0, on=on, options={})
    assert [x if isinstance(x, str | tuple) else x is on for x in events] == [True, (3,), "left"]
