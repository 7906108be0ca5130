"""Step 5: each kernel's time beside the library's product of the same sizes; workspaces, batches, and the host's time;
pipeline stages and groups of row tiles other than the table's.

Letters: N tokens, D hidden, V vocabulary, C columns of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Literal
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.harness.contenders import reason
from bench.minutes.cases import Case, Row, Scale, short
from bench.minutes.machine import power_now
from tvkd_fast.kernels import blocks, products
from tvkd_fast.kernels.autotune import joint_tiles, tiles
from tvkd_fast.kernels.block_softmax import block_exponentials
from tvkd_fast.kernels.dlogits import dlogits
from tvkd_fast.kernels.head_dhidden import head_dlogp_dhidden
from tvkd_fast.kernels.head_selection import select_entries
from tvkd_fast.kernels.head_stats import head_sums, merge_splits
from tvkd_fast.kernels.joint_dlogits import Factors, joint_dlogits
from tvkd_fast.kernels.joint_stats import joint_sums
from tvkd_fast.kernels.joint_values import joint_values
from tvkd_fast.kernels.logit_sums import logit_sums
from tvkd_fast.kernels.products import accumulate, product
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, JointSums, SelectionRule
from tvkd_fast.kernels.selected_lists import SelectedLists
from tvkd_fast.kernels.sparse_columns import sparse_columns
from tvkd_fast.kernels.sparse_rows import sparse_rows
from tvkd_fast.ops import linear_logps

SHAPE, TINY = (4096, 2048, 128256), (40, 32, 150)
LARGEST = (8192, 4096, 128256)
BLOCK = 8192
"""Columns of a block of dlogits."""
BATCHES, TINY_BATCHES = (256, 512, 1024, 2048, 4096, 8192), (8, 16)
WORKSPACES = (32, 64, 128, 256, 512, 1024)
"""MiB."""
GATHERED, TINY_GATHERED = ((4096, 2048), (4096, 4096), (4096, 8192), (2048, 16384)), ((8, 32),)
"""N and D of the gathers of a sparse gradient."""
ENTRIES = 300
"""Of each row, drawn evenly from the vocabulary: the worst case of a cache, which real rows share columns in."""
STAGES = (2, 3, 4)
GROUPS = (1, 2, 4, 8, 16, 32)
"""Row tiles that are taken column by column together; with 1 every program goes through the whole weight."""
BETA = 0.5
ROUNDS = 10
LAUNCHES = 300
LOAD = 1500
"""Products of 8,192 by 8,192 by 8,192, which take a large GPU two seconds."""
UNTIMED: Row = {"shown": "ran, not timed"}


class Operands:
    """One problem's tensors, and what the passes before a kernel leave for it."""

    def __init__(self, scale: Scale, dtype: torch.dtype) -> None:
        n, d, v = scale.of(SHAPE, TINY)
        draw = torch.Generator(scale.device).manual_seed(0)
        normal = partial(torch.randn, generator=draw, device=scale.device)
        self.hidden, self.weight = normal(n, d).to(dtype), (normal(v, d) / d**0.5).to(dtype)
        self.labels = torch.randint(v, (n,), generator=draw, device=scale.device)
        self.head = Head(self.weight)
        self.ones = torch.ones(n, device=scale.device)
        self.width = min(v, BLOCK)
        self.config = tiles("dlogits", self.hidden, self.weight, n)
        self.product_config = tiles("product", self.hidden, self.weight, n)
        whole = max(max(x.block_m, x.block_n, x.block_k) for x in (self.config, self.product_config))
        rows, columns = (triton.cdiv(x, whole) * whole for x in (n, self.width))
        self.block = self.hidden.new_zeros(rows, columns)

    @cached_property
    def sums(self) -> HeadSums:
        return head_sums(self.hidden, self.head, labels=self.labels)

    @cached_property
    def teacher(self) -> tuple[Tensor, Head]:
        """States and head of another model of the same width."""
        return self.hidden.flip(0), Head(self.weight.flip(0))

    @cached_property
    def joint(self) -> JointSums:
        return joint_sums(self.hidden, self.head, *self.teacher)

    @cached_property
    def logits(self) -> Tensor:
        """[N, C] float32 products of a block."""
        return (self.hidden @ self.weight[: self.width].T).float()


@lru_cache(maxsize=1)
def operands(scale: Scale, dtype: torch.dtype) -> Operands:
    return Operands(scale, dtype)


def cases(scale: Scale) -> list[Case]:
    kernels: dict[str, Callable[[Scale, Operands], Row]] = {
        "head_stats": head_stats,
        "logit_sums, the library's product with it": sums_of_products,
        "dlogits": dlogits_of_a_block,
        "product, dH": partial(triton_product, transposed=False),
        "product, dW": partial(triton_product, transposed=True),
        "exponentials and product of a frozen head": frozen_head,
        "selection of a sparse gradient": selection,
        "block_exponentials": exponentials_of_products,
        "joint_stats": joint_stats,
        "joint_values, a mixture": mixture,
        "joint_dlogits, forward KL": joint_dlogits_of_a_block,
    }
    found = [
        Case(name=f"{name}, {short(x)}", run=partial(of_kernel, scale, x, run))
        for x in dict.fromkeys((scale.dtypes[0], torch.float32))
        for name, run in kernels.items()
    ]
    found += [
        Case(name=f"gathers of a sparse gradient, D = {d:,}", run=partial(gathers, scale, n, d))
        for n, d in scale.of(GATHERED, TINY_GATHERED)
    ]
    found.append(Case(name="host time, a launch of merge_splits", run=partial(host_time, scale)))
    found.append(Case(name="power and clocks under load", run=partial(under_load, scale)))
    found += [
        Case(name=f"forward and backward, N = {n:,}", run=partial(batch, scale, n))
        for n in scale.of(BATCHES, TINY_BATCHES)
    ]
    found += [
        Case(name=f"forward and backward in {mb} MiB", run=partial(workspace, scale, mb))
        for mb in scale.of(WORKSPACES, WORKSPACES[:1])
    ]
    # Last, since each of them compiles: what of these is left out is missed least.
    found += [
        Case(name="head_stats by pipeline stages", run=partial(settings, scale, "stages", STAGES)),
        Case(name="head_stats by row tiles per group", run=partial(settings, scale, "group", GROUPS)),
    ]
    return found


def of_kernel(scale: Scale, dtype: torch.dtype, run: Callable[[Scale, Operands], Row]) -> Row:
    return run(scale, operands(scale, dtype))


def beside(scale: Scale, ours: Callable[[], object], library: Callable[[], object], flops: float) -> Row:
    """Our time, our rate, and our time over the library's for as many operations."""
    taken = scale.milliseconds({"ours": ours, "library": library}, ROUNDS)
    if not taken:
        return UNTIMED
    ms, other = taken["ours"], taken["library"]
    return {"ms": ms, "tflops": flops / ms / 1e9, "over_library": ms / other}


def head_stats(scale: Scale, of: Operands) -> Row:
    run = partial(head_sums, of.hidden, of.head, labels=of.labels)
    return beside(scale, run, partial(torch.mm, of.hidden, of.weight.T), 2.0 * of.hidden.numel() * len(of.weight))


def sums_of_products(scale: Scale, of: Operands) -> Row:
    """What serves the values of wide states of 16 bits in place of `head_stats`."""
    run = partial(logit_sums, of.hidden, of.head)
    return beside(scale, run, partial(torch.mm, of.hidden, of.weight.T), 2.0 * of.hidden.numel() * len(of.weight))


def dlogits_of_a_block(scale: Scale, of: Operands) -> Row:
    head = of.head.columns(0, of.width)
    given = (of.hidden, head, of.labels, of.sums, of.ones, of.ones[:1], of.block, of.config)
    run = partial(dlogits, *given, first_column=0, ignore_index=-100, want_bias=False)
    return beside(scale, run, partial(torch.mm, of.hidden, head.weight.T), 2.0 * of.hidden.numel() * of.width)


def triton_product(scale: Scale, of: Operands, *, transposed: bool) -> Row:
    """Triton's product of a block beside the library's into float32 sums, which the backward of 16 bits takes."""
    n, d = of.hidden.shape
    right, count = (of.hidden, of.width) if transposed else (of.weight[: of.width], n)
    out, total = (torch.zeros(count, d, device=right.device) for _ in range(2))
    left = of.block[:n, : of.width]
    library = partial(accumulate, total, left.T if transposed else left, right)

    def ours() -> None:
        with patch.object(products, "library_sums", lambda *_: False):
            product(of.block, right, out, of.product_config, transposed=transposed, previous=out)

    return beside(scale, ours, library, 2.0 * of.hidden.numel() * of.width)


def frozen_head(scale: Scale, of: Operands) -> Row:
    """Two products: both of a frozen head's, with what lies between them."""

    def library() -> None:
        logits = torch.mm(of.hidden, of.weight.T)
        torch.mm(logits, of.weight)

    run = partial(head_dlogp_dhidden, of.hidden, of.head, of.labels)
    return beside(scale, run, library, 4.0 * of.hidden.numel() * len(of.weight))


def selection(scale: Scale, of: Operands) -> Row:
    """One product, bits and lists; the softmax is flat, and hardly an entry is selected."""
    rule = SelectionRule(2.0**-8, row_cap=len(of.weight))
    run = partial(select_entries, of.hidden, of.head, of.labels, rule)
    return beside(scale, run, partial(torch.mm, of.hidden, of.weight.T), 2.0 * of.hidden.numel() * len(of.weight))


def exponentials_of_products(scale: Scale, of: Operands) -> Row:
    """Bound by memory: float32 products are read, and exponentials of the operands' dtype written."""
    labels, out = of.labels.clamp_max(of.width - 1), of.logits.to(of.hidden.dtype)
    taken = scale.milliseconds({"ours": partial(block_exponentials, of.logits, of.head, labels, out)}, ROUNDS)
    if not taken:
        return UNTIMED
    return {"ms": taken["ours"], "gb_per_s": (4 + out.element_size()) * out.numel() / taken["ours"] / 1e6}


def both_products(of: Operands, columns: int) -> None:
    """The library's products of both sides over so many columns, as a teacher of the student's width has them."""
    for states, head in ((of.hidden, of.head), of.teacher):
        torch.mm(states, head.weight[:columns].T)


def joint_stats(scale: Scale, of: Operands) -> Row:
    """Both log-sum-exps and KLs of one walk: a product of each side."""
    run = partial(joint_sums, of.hidden, of.head, *of.teacher)
    whole = len(of.weight)
    return beside(scale, run, partial(both_products, of, whole), 4.0 * of.hidden.numel() * whole)


def mixture(scale: Scale, of: Operands) -> Row:
    """The second walk of a JSD, which makes both products again."""
    run = partial(joint_values, of.hidden, of.head, *of.teacher, of.joint, beta=BETA)
    whole = len(of.weight)
    return beside(scale, run, partial(both_products, of, whole), 4.0 * of.hidden.numel() * whole)


def joint_dlogits_of_a_block(scale: Scale, of: Operands) -> Row:
    states, head = of.teacher
    config = joint_tiles("joint_dlogits", (of.hidden, states), (of.weight, head.weight), heavy=False, bias=False)
    factors = Factors(of.ones, -of.ones)
    run = partial(
        joint_dlogits,
        *(of.hidden, of.head.columns(0, of.width), states, head.columns(0, of.width), None, of.joint),
        *(factors.stacked(), factors.flags, of.block, config),
        beta=None,
        alpha=None,
        first_column=0,
        ignore_index=-100,
        want_bias=False,
    )
    return beside(scale, run, partial(both_products, of, of.width), 4.0 * of.hidden.numel() * of.width)


def settings(scale: Scale, field: Literal["stages", "group"], values: tuple[int, ...]) -> Iterator[Row]:
    """A row per value of one setting of the tiles, the others as the table has them."""
    of = operands(scale, scale.dtypes[0])
    config = tiles("head_stats", of.hidden, of.weight, len(of.hidden))
    library, flops = partial(torch.mm, of.hidden, of.weight.T), 2.0 * of.hidden.numel() * len(of.weight)
    for value in scale.of(values, values[:2]):
        changed = replace(config, stages=value) if field == "stages" else replace(config, group=value)
        run = partial(head_sums, of.hidden, of.head, labels=of.labels, config=changed)
        shown = f"{field} {value}" + (", the table's" if value == getattr(config, field) else "")
        try:
            yield {"name": f"head_stats, {shown}"} | beside(scale, run, library, flops)
        except (OutOfResources, triton.CompilationError) as refused:
            # More stages than shared memory holds.
            yield {"name": f"head_stats, {shown}", "skipped": reason(refused)}


def gathers(scale: Scale, n: int, d: int) -> Row:
    """dH and dW from lists: 2·E·D numbers are gathered."""
    v, entries = scale.of((SHAPE[2], ENTRIES), (150, 9))
    draw = torch.Generator(scale.device).manual_seed(0)
    normal = partial(torch.randn, generator=draw, device=scale.device)
    hidden, weight = normal(n, d).to(scale.dtypes[0]), (normal(v, d) / d**0.5).to(scale.dtypes[0])
    columns = torch.randint(v, (n, entries), generator=draw, device=scale.device, dtype=torch.int32).sort(1).values
    labels, c = columns[:, 0].long(), normal(n)
    starts, none = torch.arange(n + 1, device=scale.device) * entries, labels.new_empty(0)
    selected = SelectedLists(columns.flatten(), starts, torch.full_like(c, 0.1), none, none)
    head, sums = Head(weight), HeadSums(torch.zeros_like(c), torch.full_like(c, 8.0))
    dh = partial(
        sparse_rows,
        *(hidden, head, labels, sums, selected, SelectionRule(0.0, row_cap=v), c),
        spread_over=torch.tensor(v, dtype=torch.int32, device=scale.device),
        weight_sum=normal(d),
        start=None,
        want_hidden=True,
    )
    found, even, _ = dh()
    dw = partial(
        sparse_columns,
        *(hidden, head, selected, found, even, c),
        is_sparse=torch.ones(v, dtype=torch.int8, device=scale.device),
        hidden_sum=normal(d),
        start=HeadGradients(None, None, None),
        want_weight=True,
        want_bias=False,
    )
    taken = scale.milliseconds({"dH": dh, "dW": dw}, ROUNDS)
    if not taken:
        return UNTIMED
    ms = sum(taken.values())
    shown = ", ".join(f"{name} {x:.2f} ms" for name, x in taken.items())
    return {"shown": shown, "ms": ms, "gb_per_s": 2 * columns.numel() * d * hidden.element_size() / ms / 1e6}


def under_load(scale: Scale) -> Row:
    """What a second of products leaves of the clocks: a capped device explains slow kernels."""
    scale.needs_gpu()
    side = torch.randn(8192, 8192, dtype=torch.bfloat16, device=scale.device)
    out = torch.empty_like(side)
    for _ in range(LOAD):
        torch.mm(side, side, out=out)
    return {"shown": power_now()}


def host_time(scale: Scale) -> Row:
    """What a launch keeps the host for, whatever the device does: many launches of a kernel with hardly any work."""
    numbers = {name: torch.zeros(8, device=scale.device) for name in ("maximum", "log_total")}
    sums = {name: torch.zeros(4, device=scale.device) for name in numbers}
    run = partial(merge_splits, numbers, sums, 2, labels=None, ignore_index=-100, kappa=1.0)
    run()
    if scale.dry:
        return UNTIMED
    torch.cuda.synchronize()
    since = time.perf_counter()
    for _ in range(LAUNCHES):
        run()
    taken = time.perf_counter() - since
    torch.cuda.synchronize()
    return {"host_us": 1e6 * taken / LAUNCHES}


def _whole(scale: Scale, shape: tuple[int, int, int]) -> Row:
    """Forward and backward of `linear_logps`, four products, over one product of the library's."""
    n, d, v = shape
    draw = torch.Generator(scale.device).manual_seed(0)
    normal = partial(torch.randn, generator=draw, device=scale.device)
    hidden = normal(n, d).to(scale.dtypes[0]).requires_grad_()
    weight = (normal(v, d) / d**0.5).to(scale.dtypes[0]).requires_grad_()
    labels, upstream = torch.randint(v, (n,), generator=draw, device=scale.device), normal(n)

    def ours() -> None:
        torch.autograd.grad(linear_logps(hidden, weight, labels, impl="triton"), (hidden, weight), upstream)

    taken = scale.milliseconds({"ours": ours, "product": partial(torch.mm, hidden.detach(), weight.detach().T)}, ROUNDS)
    if not taken:
        return UNTIMED
    ms = taken["ours"]
    return {"ms": ms, "tflops": 8.0 * n * d * v / ms / 1e9, "over_product": ms / taken["product"]}


def batch(scale: Scale, n: int) -> Row:
    _, d, v = scale.of(LARGEST, TINY)
    return _whole(scale, (n, d, v))


def workspace(scale: Scale, mb: int) -> Row:
    """In a workspace of so many MiB: fewer and larger blocks of dlogits, whose sums are read and written less often."""
    with patch.object(blocks, "workspace_bytes", lambda on: mb * 2**20):
        return _whole(scale, scale.of(LARGEST, TINY))
