"""Step 6, divergences between two heads: ours beside eager, torch.compile, TRL and Liger, forward and backward.

From the states of a student and of a teacher of the same width to the mean over all tokens, and its gradients by the
student's states and head. Each contender is checked before it is timed: float64 over the very inputs, and as limits a
multiple of what plain torch in the inputs' dtype is off.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from bench.divergence.contenders import Contender, Divergence, compiled, eager, liger, trl
from bench.divergence.reference import in_blocks
from bench.gpu.comparison import whole as itself
from bench.gpu.rounding import SLACK
from bench.harness.checker import Reference, checked
from bench.harness.meters import GpuMeter
from bench.minutes.cases import Case, NotTriedError, Row, Scale
from tvkd_fast.ops import linear_divergence

KINDS = ("forward_kl", "jsd")
BLOCK = 512
"""Rows whose logits of both models the check holds at once."""
ROUNDS = 8
LIMIT = 30.0
Shape = tuple[int, int, int]
Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""The student's states and weight, the teacher's."""


def ours(kind: str) -> Divergence:
    def run(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        values = linear_divergence(hidden, weight, teacher, teacher_weight, kind=kind, impl="triton")  # type: ignore[arg-type]
        return values.mean(), values.detach()

    return run


def contenders(kind: str) -> dict[str, Contender]:
    of = partial(Contender, kind=kind)
    found = {
        "tvkd_fast": of(run=ours(kind)),
        "eager": of(run=eager(kind)),
        "TRL, chunked divergence": of(run=trl(kind), needs="trl"),
    }
    if kind == "jsd":
        found["Liger, fused linear JSD"] = of(run=liger, needs="liger_kernel")
    return found | {"torch.compile": of(run=compiled(kind), compiles=True)}


def cases(scale: Scale, shape: Shape) -> Iterator[Case]:
    for kind in KINDS:
        for name, contender in contenders(kind).items():
            yield Case(
                name=f"{'x'.join(map(str, shape))}, {kind}: {name}",
                run=partial(row, scale, shape, contender),
                limit=LIMIT,
                peer=not name.startswith("tvkd_fast"),
            )


@lru_cache(maxsize=1)
def operands(scale: Scale, shape: Shape) -> Operands:
    """Two models that agree on most of what they know, as a student and its teacher do."""
    n, d, v = shape
    draw = torch.Generator(scale.device).manual_seed(0)
    normal = partial(torch.randn, generator=draw, device=scale.device)
    hidden, weight = normal(n, d), normal(v, d) * 3 / d**0.5
    made = (hidden, weight, hidden + 0.3 * normal(n, d), weight + 0.3 * weight.std() * normal(v, d))
    return tuple(x.to(scale.dtypes[0]) for x in made)  # type: ignore[return-value]


@lru_cache(maxsize=1)
def allowed(scale: Scale, shape: Shape, kind: str) -> tuple[Reference, dict[str, float]]:
    """float64's numbers, and what each may be off."""
    inputs = operands(scale, shape)
    names = ("values", "hidden", "weight")
    exact = Reference(dict(zip(names, in_blocks(kind, *(x.double() for x in inputs), block=BLOCK), strict=True)))
    plain = exact.errors(dict(zip(names, in_blocks(kind, *inputs, block=BLOCK), strict=True)))
    return exact, {name: SLACK * error + 1e-5 for name, error in plain.items()}


def row(scale: Scale, shape: Shape, contender: Contender) -> Row:
    """The contender's errors, and where they are allowed its time over one product of the student's and its memory."""
    if contender.needs or contender.compiles:
        scale.needs_gpu()
    if contender.refusal:
        raise NotTriedError(contender.refusal)
    if contender.compiles:
        torch.compiler.reset()
    hidden, weight, *teacher = operands(scale, shape)
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())

    def both() -> tuple[Tensor | None, ...]:
        mean, values = contender.run(*leaves, *teacher)
        return values, *torch.autograd.grad(mean, leaves)

    reference, limits = allowed(scale, shape, contender.kind)
    numbers = dict(zip(("values", "hidden", "weight"), both(), strict=True))
    found = checked(reference.errors({name: x for name, x in numbers.items() if x is not None}), limits)
    # Gradients of the checked run would take room from the timed ones.
    del numbers
    if "wrong" in found:
        return found
    runs: dict[str, Callable[[], object]] = {"product": partial(torch.mm, hidden, weight.T), "both": both}
    taken = scale.milliseconds(runs, ROUNDS)
    if not taken:
        return found | {"shown": "ran, not timed"}
    found |= {"ms": taken["both"], "over_product": taken["both"] / taken["product"]}
    return found | {"peak_mb": GpuMeter().start(lambda: both, itself).peak_bytes() / 2**20}
