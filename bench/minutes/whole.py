"""Step 6: the whole head beside its peers, each contender and shape a case, the largest shape last.

Five tasks: `exact` gradients by hidden and weight; `known` coefficients, where the loss says them beforehand and the
head makes its gradients in the forward; a `frozen` head; a teacher's `values`, forward alone; and `sparse` gradients,
over states as peaked as a trained model's, with exact ones of the same states beside them. Divergences to a teacher's
head follow, which `divergences.py` has. Each contender is checked before it is timed, by `RoundingChecker`. The unit is
one forward product of the library's. What torch.compile makes comes after all others, whose time its compiling would
take.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu.comparison import whole as itself
from bench.gpu.rounding import SLACK, RoundingChecker
from bench.harness.checker import largest
from bench.harness.inputs import PAIRS, Inputs, both, forward, make_inputs
from bench.harness.meters import GpuMeter
from bench.head import peers
from bench.head.chunked import chunked
from bench.head.contenders import Contender, fused, lse, of, on_gpu, sparse
from bench.minutes import divergences
from bench.minutes.cases import Case, NotTriedError, Row, Scale, judged

SHAPES, TINY = ((4096, 576, 49152), (4096, 4096, 128256), (8192, 4096, 128256)), ((24, 16, 97),)
ENTRIES, TINY_ENTRIES = 300.0, 10.0
"""Above 2⁻¹⁴ per token, of peaked states."""
ROUNDS = 8
LIMIT = 30.0
"""Seconds of a case; torch.compile takes most of them."""
CHUNK = 512
"""Rows of the check of values."""
COMPILED = "torch.compile"
"""In the names of what it makes."""


def contenders(scale: Scale) -> dict[str, dict[str, Contender]]:
    """Return the contenders by task and by name, in the table's order; names that begin with tvkd_fast are ours."""
    every = on_gpu()
    frozen = {name.removesuffix(", frozen head"): x for name, x in every.items() if x.frozen}
    plain = {name: x for name, x in every.items() if not x.frozen and x.task == "logps"}
    values = partial(lse, impl="triton")
    small = sparse(2.0**-14, impl="triton")
    return {
        "exact": plain | {"cuBLAS in chunks": of(chunked)},
        "known": {"tvkd_fast, fused loss": fused(), "Liger, DPO": every["Liger, DPO"]},
        "frozen": frozen | {"cuBLAS in chunks": of(chunked, frozen=True)},
        "values": {
            "tvkd_fast": of(values, "values"),
            "eager": of(peers.eager_values, "values"),
            "torch.compile": of(peers.compiled_values, "values"),
        },
        "sparse": {
            "tvkd_fast, sparse 2^-14": of(small, skips=True),
            "tvkd_fast, exact": every["tvkd_fast"],
            "eager": every["eager"],
            "CCE": every["CCE"],
        },
    }


def cases(scale: Scale) -> list[Case]:
    return sorted(_cases(scale), key=lambda case: COMPILED in case.name)


def _cases(scale: Scale) -> Iterator[Case]:
    for shape in scale.of(SHAPES, TINY):
        for task, of_task in contenders(scale).items():
            for name, contender in of_task.items():
                yield Case(
                    name=f"{'x'.join(map(str, shape))}, {task}: {name}",
                    run=partial(row, scale, shape, task, name, contender),
                    limit=LIMIT,
                    peer=not name.startswith("tvkd_fast"),
                )
        yield from divergences.cases(scale, shape)


@lru_cache(maxsize=1)
def checker(scale: Scale, shape: tuple[int, int, int], is_peaked: bool) -> RoundingChecker:
    """The inputs of a shape and float64's numbers over them, kept while contenders of the same follow each other."""
    inputs = peaked(scale, shape) if is_peaked else make_inputs(shape, scale.dtypes[0], scale.device)
    lengths = torch.full((2 * PAIRS,), shape[0] // (2 * PAIRS), device=scale.device)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return RoundingChecker(replace(inputs, reference=None, cu_seqlens=bounds))


def peaked(scale: Scale, shape: tuple[int, int, int]) -> Inputs:
    """Made states with a stated number of entries above 2⁻¹⁴, made on the device."""
    # Imported here: its module loads models too, for which a machine may lack what the kernels do without.
    from bench.harness import states

    def drawn(n: int) -> Tensor:
        return torch.randn(n)

    # Coefficients are drawn by a generator of the CPU's, which makes no tensor of another device.
    with torch.no_grad(), torch.device(scale.device), patch.object(states, "_coefficients", drawn):
        made = states.made_states(shape, scale.of(ENTRIES, TINY_ENTRIES))
    hidden, weight = (x.to(scale.dtypes[0]).requires_grad_() for x in (made.hidden, made.weight))
    return Inputs(hidden, weight, made.labels, made.coefficients)


def row(scale: Scale, shape: tuple[int, int, int], task: str, name: str, contender: Contender) -> Row:
    """The contender's errors, and where they are allowed its times over the product and its memory."""
    is_compiled = name.startswith(COMPILED)
    if contender.needs or is_compiled:
        scale.needs_gpu()
    if contender.refusal:
        raise NotTriedError(contender.refusal)
    if is_compiled:
        # Each shape is compiled afresh: past eight of them torch.compile falls back to eager.
        torch.compiler.reset()
    known = checker(scale, shape, task == "sparse")
    given = contender.given(known.inputs)
    calls: dict[str, Callable[[], Any]] = {}
    if task != "values":
        calls["both"] = partial(both, contender.run, given)
    if task in ("values", "exact"):
        calls["forward"] = partial(forward, contender.run, known.inputs.detached())
    numbers = {name: call() for name, call in calls.items()}
    if task == "values":
        found = values_errors(known.inputs.detached(), *numbers["forward"])
    else:
        found = known.judged(contender, numbers)
    # Gradients of the checked run would take room from the timed ones.
    del numbers
    if "wrong" in found:
        return found
    detached = known.inputs.detached()
    taken = scale.milliseconds({"product": partial(torch.mm, detached.hidden, detached.weight.T)} | calls, ROUNDS)
    if not taken:
        return found | {"shown": "ran, not timed"}
    first = next(iter(calls))
    found |= {"ms": taken[first], "over_product": taken[first] / taken["product"]}
    if first != "forward" and "forward" in taken:
        found["forward_ms"] = taken["forward"]
    job = GpuMeter().start(lambda: calls[first], itself)
    return found | {"peak_mb": job.peak_bytes() / 2**20}


def values_errors(inputs: Inputs, ours: Tensor) -> Row:
    weight = inputs.weight.double()
    exact = torch.cat([(h.double() @ weight.T).logsumexp(1) for h in inputs.hidden.split(CHUNK)])
    plain = torch.cat([(h @ inputs.weight.T).float().logsumexp(1) for h in inputs.hidden.split(CHUNK)])
    return judged({"lse": largest(ours, exact)}, SLACK * largest(plain, exact) + 1e-5)
