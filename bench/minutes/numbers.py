"""Step 4: the ops' numbers beside float64's, over dtypes, sizes and transforms; and the same bits however they run.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.divergence.contenders import KINDS, of_logits
from bench.divergence.reference import in_blocks
from bench.harness.checker import largest
from bench.minutes.cases import Case, Row, Scale, judged, short
from bench.minutes.exact import SLACK, Call, compared, random_call, rounded
from tvkd_fast.ops import linear_divergence, linear_entropy, linear_logps, linear_lse

SIZES = {"N": (4097, 127, 1), "D": (40, 576, 2304, 5120), "V": (50257, 128256, 262144)}
TINY = {"N": (40, 7, 1), "D": (16, 48), "V": (150, 70)}
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True},
    {"softcap": 30.0},
    {"logit_scale": 0.25},
    {"bias": True, "softcap": 30.0, "logit_scale": -2.0},
)
TEACHER, TINY_TEACHER = (127, 576, 896, 50257), (7, 32, 48, 150)
"""N, the student's D, the teacher's, and V."""
REPEATED, TINY_REPEATED = (1000, 576, 50257), (40, 32, 150)
KAPPA = 0.5
LIMIT = 40.0
"""Seconds of a case: eight kernels compile, and float64 at the largest size takes two."""


def cases(scale: Scale) -> list[Case]:
    sizes = scale.of(SIZES, TINY)
    # Every dtype at every D, and every V at every N; what is not of the grid goes round.
    grid = [
        (dtype, (sizes["N"][i % 3], d, sizes["V"][i % len(sizes["V"])]))
        for i, (dtype, d) in enumerate(product(scale.dtypes, sizes["D"]))
    ]
    dtypes, widths = scale.dtypes, sizes["D"]
    grid += [
        (dtypes[i % len(dtypes)], (n, widths[-1 - i % len(widths)], v))
        for i, (v, n) in enumerate(product(sizes["V"], sizes["N"]))
    ]
    found = [numbers(scale, dtype, shape, TRANSFORMS[i % 5]) for i, (dtype, shape) in enumerate(dict.fromkeys(grid))]
    found += [Case(name=f"sums, {short(x)}", run=partial(sums, scale, x), limit=LIMIT) for x in scale.dtypes]
    found += [
        Case(name=f"{kind}, {short(x)}", run=partial(divergence, scale, x, kind), limit=LIMIT)
        for x, kind in product(scale.dtypes, KINDS)
    ]
    ways: dict[str, Callable[[Scale, Call], dict[str, Tensor]]] = {
        "the same bits twice": again,
        "the same bits on two streams": on_two_streams,
        "the same bits under a CUDA graph": in_a_graph,
        "the same bits under torch.compile": compiled,
    }
    return found + [Case(name=name, run=partial(repeated, scale, way), limit=LIMIT) for name, way in ways.items()]


def numbers(scale: Scale, dtype: torch.dtype, shape: tuple[int, int, int], transforms: dict[str, Any]) -> Case:
    named = ", ".join(name if value is True else f"{name} {value:g}" for name, value in transforms.items())
    name = f"{'x'.join(map(str, shape))}, {short(dtype)}" + (f", {named}" if named else "")

    def run() -> Row:
        call = random_call(shape, dtype, scale.device, **transforms)
        return compared(call, gradients(call) | {"frozen hidden": gradients(call, frozen=True)["hidden"]})

    return Case(name=name, run=run, limit=LIMIT)


def gradients(
    call: Call, *, frozen: bool = False, op: Callable[..., Tensor] = linear_logps
) -> dict[str, Tensor | None]:
    """logps, and the gradients of Σ upstream·logps by hidden and, unless the head is frozen, by weight and bias."""
    given = {"hidden": call.hidden, "weight": call.weight, "bias": call.bias}
    wanted = [name for name, x in given.items() if x is not None and not (frozen and name != "hidden")]
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in given.items() if x is not None}
    logps = op(
        leaves["hidden"],
        leaves["weight"],
        call.labels,
        bias=leaves.get("bias"),
        softcap=call.softcap,
        logit_scale=call.logit_scale,
        impl="triton",
    )
    found = torch.autograd.grad(logps, [leaves[name] for name in wanted], call.upstream)
    return {"logps": logps.detach(), **dict(zip(wanted, found, strict=True))}


def sums(scale: Scale, dtype: torch.dtype) -> Row:
    """LSE(z), LSE(κz) and the entropy of one product, as a teacher's values take them."""
    n, d, v = scale.of((127, 576, 50257), (7, 32, 150))
    call = random_call((n, d, v), dtype, scale.device, softcap=30.0)
    lse, lse_kappa = linear_lse(call.hidden, call.weight, softcap=30.0, kappa=KAPPA, impl="triton")
    entropy = linear_entropy(call.hidden, call.weight, softcap=30.0, impl="triton")
    errors, limits = {}, {}
    found = {}
    for precision in (torch.float64, torch.float32):
        z = 30.0 * torch.tanh(call.hidden.to(precision) @ call.weight.to(precision).T / 30.0)
        found[precision] = {
            "lse": z.logsumexp(1),
            "lse_kappa": (KAPPA * z).logsumexp(1),
            "entropy": torch.special.entr(z.softmax(1)).sum(1),
        }
    for name, ours in {"lse": lse, "lse_kappa": lse_kappa, "entropy": entropy}.items():
        exact, plain = (found[precision][name] for precision in (torch.float64, torch.float32))
        errors[name] = largest(ours, exact)
        limits[name] = 2 * largest(plain, exact) + SLACK * float(exact.abs().max())
    return judged(errors, limits)


def divergence(scale: Scale, dtype: torch.dtype, kind: Any) -> Row:
    """A divergence to a wider teacher, and its gradients by the student's states and head."""
    n, d, teacher_d, v = scale.of(TEACHER, TINY_TEACHER)
    draw = torch.Generator(scale.device).manual_seed(0)
    normal = partial(torch.randn, generator=draw, device=scale.device)
    sides = ((normal(n, width), normal(v, width) * 2 / width**0.5) for width in (d, teacher_d))
    hidden, weight, *teacher = (x.to(dtype) for side in sides for x in side)
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    values = linear_divergence(*leaves, *teacher, kind=kind, impl="triton")
    found = (values.detach(), *torch.autograd.grad(values.mean(), leaves))
    exact = in_blocks(kind, *(x.double() for x in (hidden, weight, *teacher)), block=n)
    plain = in_float32(kind, hidden, weight, *teacher)
    errors, limits = {}, {}
    for name, ours, true, torchs in zip(("values", "hidden", "weight"), found, exact, plain, strict=True):
        errors[name] = largest(ours, true)
        limits[name] = 2 * largest(torchs.to(ours.dtype), true) + SLACK * float(true.abs().max())
    return judged(errors, limits)


def in_float32(
    kind: str, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> tuple[Tensor, ...]:
    """What plain torch makes of the upcast inputs, its gradient by logits of 16 bits rounded as a product takes it."""
    leaves = (hidden.float().requires_grad_(), weight.float().requires_grad_())
    z = leaves[0] @ leaves[1].T
    if hidden.dtype != torch.float32:
        z.register_hook(partial(rounded, dtype=hidden.dtype))
    values = of_logits(kind, z, teacher.float() @ teacher_weight.float().T)
    return values.detach(), *torch.autograd.grad(values.mean(), leaves)


def repeated(scale: Scale, way: Callable[[Scale, Call], dict[str, Tensor]]) -> Row:
    """The same call run plainly and another way: no bit may differ."""
    call = random_call(scale.of(REPEATED, TINY_REPEATED), scale.dtypes[0], scale.device)
    first = _given(gradients(call))
    second = way(scale, call)
    return judged({name: largest(second[name], first[name]) for name in first}, 0.0)


def _given(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: x for name, x in found.items() if x is not None}


def again(scale: Scale, call: Call) -> dict[str, Tensor]:
    return _given(gradients(call))


def on_two_streams(scale: Scale, call: Call) -> dict[str, Tensor]:
    """Two calls at once, each on a stream of its own; what differs between them is NaN."""
    scale.needs_gpu()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(_given(gradients(call)))
    torch.cuda.synchronize()
    one, other = found
    return {name: torch.where(one[name] == other[name], one[name], torch.nan) for name in one}


def in_a_graph(scale: Scale, call: Call) -> dict[str, Tensor]:
    """Captured once and replayed twice; exact gradients wait for nothing, and may be captured."""
    scale.needs_gpu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _given(gradients(call))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return found


def compiled(scale: Scale, call: Call) -> dict[str, Tensor]:
    """Traced whole; dry without a compiler's backend, which is no part of ours."""
    op = torch.compile(linear_logps, fullgraph=True, backend=scale.of("inductor", "aot_eager"))
    return _given(gradients(call, op=op))
