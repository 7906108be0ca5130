"""Errors of values and gradients against the float64 twins: each implementation, dtype and case. No timing.

    python -m bench.head.numerics --json bench/results/numerics.json

Without a GPU the Triton kernels run in Triton's interpreter, whose bfloat16 products are wrong: there they are measured
in float32 and float16 only. What a product of TF32 operands costs is emulated on the CPU.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it must stand before tvkd_fast.kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from bench.harness.machine import made_by, write_report
from tvkd_fast.ops import linear_entropy, linear_logps, linear_lse, reference

N, D, V = 96, 64, 700
KAPPA = 0.7
GPU = torch.cuda.is_available()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TF32_CASES = ("ordinary", "huge")

Errors = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One call of the head: tensors, the upstream gradient of each token, and the head's transforms."""

    name: str
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    upstream: Tensor
    transforms: dict[str, Any] = field(default_factory=dict)
    hidden_rows: slice = field(default_factory=lambda: slice(None))
    """Rows whose gradient by hidden is compared."""

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=self.bias.to(dtype))

    @property
    def kept(self) -> Tensor:
        return self.labels != -100


def drawn(name: str, shape: tuple[int, int, int] = (N, D, V), spread: float = 3.0, seed: int = 0, **kw: Any) -> Case:
    """Normal logits of standard deviation `spread`, a fifth of the rows ignored (but never the last)."""
    n, d, v = shape
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(v, (n,), generator=draw)
    labels[:-1][torch.rand(n - 1, generator=draw) < 0.2] = -100
    return Case(
        name,
        hidden=torch.randn(n, d, generator=draw),
        weight=torch.randn(v, d, generator=draw) * (spread / d**0.5),
        bias=torch.randn(v, generator=draw),
        labels=labels,
        upstream=torch.randn(n, generator=draw),
        transforms=kw,
    )


def cases() -> Iterator[Case]:
    yield drawn("ordinary: logits of spread 3")

    peaked = drawn("peaked: states along their label's row, 1 − p about 0.003")
    weight = torch.nn.functional.normalize(peaked.weight, dim=1)
    yield replace(peaked, weight=weight, hidden=15.0 * weight[peaked.labels.clamp(min=0)])

    huge = drawn("huge: products up to 10⁴")
    largest = (huge.hidden @ huge.weight.T).abs().max()
    yield replace(huge, weight=huge.weight * (1e4 / largest))

    yield drawn("softcap 30, products of spread 30", spread=30.0, softcap=30.0)
    yield drawn("logit_scale 1/16, products of spread 48", spread=48.0, logit_scale=0.0625)

    flat = drawn("flat softmax, every second coefficient 0.001: dH of those rows")
    yield replace(
        flat,
        hidden=flat.hidden * 3e-3,
        bias=flat.bias * 0.0,
        labels=flat.labels.clamp(min=0),
        upstream=flat.upstream.sign() * torch.where(torch.arange(N) % 2 == 0, 1.0, 1e-3),
        hidden_rows=slice(1, None, 2),
    )


@dataclass(frozen=True)
class Implementation:
    """`measure` gives logps, LSE(z), LSE(κz), entropy, dH, dW and db of a case; of a frozen head no more than dH."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    measure: Callable[[Case], dict[str, Tensor]]
    cases: tuple[str, ...] = ("",)
    """Prefixes of the names of the cases that it is measured in."""


def of_ops(case: Case, impl: str, *, frozen: bool = False) -> dict[str, Tensor]:
    device = "cuda" if GPU and impl == "triton" else "cpu"
    hidden, weight, bias = inputs = [x.detach().to(device) for x in (case.hidden, case.weight, case.bias)]
    leaves = [x.requires_grad_() for x in inputs[: 1 if frozen else 3]]
    options = {"bias": bias, "impl": impl, **case.transforms}
    logps = linear_logps(hidden, weight, case.labels.to(device), **options)
    lse, lse_kappa = linear_lse(hidden, weight, kappa=KAPPA, **options)
    entropy = linear_entropy(hidden, weight, **options)
    grads = torch.autograd.grad(logps, leaves, case.upstream.to(device))
    return _named(logps, lse, lse_kappa, entropy, grads)


Product = Callable[[Tensor, Tensor], Tensor]


def eager(
    case: Case,
    *,
    dtype: torch.dtype | None = None,
    product: Product = torch.matmul,
    headroom: float | None = None,
) -> dict[str, Tensor]:
    """Whole logits and torch's own functions, on inputs cast to `dtype` (None: as they are).

    Where `headroom` is given, dlogits are rounded once to the inputs' dtype, as a kernel rounds them: divided by
    `headroom` times the largest |coefficient| before, multiplied by it after.
    """
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    scale, softcap = case.transforms.get("logit_scale", 1.0), case.transforms.get("softcap")
    a = scale * (_Product.apply(hidden, weight, product) + bias)
    if headroom is not None:
        divisor = case.upstream[case.kept].abs().max() * headroom
        a.register_hook(lambda grad: (grad / divisor).to(case.hidden.dtype).to(grad.dtype) * divisor)
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    logs = z.log_softmax(1)
    logps = logs.gather(1, case.labels.clamp(min=0)[:, None])[:, 0].masked_fill(~case.kept, 0.0)
    entropy = -(logs.exp() * logs).sum(1)
    grads = torch.autograd.grad(logps, leaves, case.upstream.to(logps.dtype))
    return _named(logps, z.logsumexp(1), (KAPPA * z).logsumexp(1), entropy, [g.to(case.hidden.dtype) for g in grads])


def rounded_once(case: Case, headroom: float | None = None) -> dict[str, Tensor]:
    """The yardstick of tests/kernels for gradients: torch on upcast inputs, but for the rounding of dlogits."""
    return eager(
        case, dtype=torch.float32, headroom=headroom or (2.0**-14 if case.hidden.dtype == torch.float16 else 1.0)
    )


def tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32's ten explicit bits of mantissa, half away from zero, as NVIDIA's cvt.rna does."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def one_tf32_product(left: Tensor, right: Tensor) -> Tensor:
    return tf32(left) @ tf32(right)


def three_tf32_products(left: Tensor, right: Tensor) -> Tensor:
    """The halves' products but for small·small."""
    small_left, small_right = tf32(left - tf32(left)), tf32(right - tf32(right))
    return small_left @ tf32(right) + tf32(left) @ small_right + tf32(left) @ tf32(right)


class _Product(torch.autograd.Function):
    """left·rightᵀ whose gradients are taken by the same kind of product."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.product = product
        return product(left, right.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        return ctx.product(grad, right), ctx.product(grad.T, left), None


IMPLEMENTATIONS = (
    Implementation("Triton kernels", FLOATS if GPU else FLOATS[:2], partial(of_ops, impl="triton")),
    Implementation("torch tiles", FLOATS, partial(of_ops, impl="torch")),
    Implementation(
        "Triton kernels, frozen head", FLOATS if GPU else FLOATS[:2], partial(of_ops, impl="triton", frozen=True)
    ),
    Implementation("torch tiles, frozen head", FLOATS, partial(of_ops, impl="torch", frozen=True)),
    Implementation("eager on upcast inputs", FLOATS, partial(eager, dtype=torch.float32)),
    Implementation("the same, dlogits rounded once", FLOATS[1:], rounded_once),
    Implementation("the same, without the factor 2⁻¹⁴", FLOATS[1:2], partial(rounded_once, headroom=1.0), ("flat",)),
    Implementation("eager in the dtype", FLOATS[1:], eager),
    Implementation("eager, three TF32 products", FLOATS[:1], partial(eager, product=three_tf32_products), TF32_CASES),
    Implementation("eager, one TF32 product", FLOATS[:1], partial(eager, product=one_tf32_product), TF32_CASES),
)


def _named(
    logps: Tensor, lse: Tensor, lse_kappa: Tensor, entropy: Tensor, grads: tuple[Tensor, ...] | list[Tensor]
) -> dict[str, Tensor]:
    results = {"logps": logps, "lse": lse, "lse_kappa": lse_kappa, "entropy": entropy}
    results |= zip(("hidden", "weight", "bias"), grads, strict=False)
    return {name: x.detach().cpu().double() for name, x in results.items()}


def exact(case: Case) -> dict[str, Tensor]:
    """The float64 twins of the very inputs, which have their dtype's rounding already."""
    leaves = [x.detach().double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    logps = reference.linear_logps(hidden, weight, case.labels, bias=bias, **case.transforms)
    z = reference.logits(hidden, weight, bias, **case.transforms)
    entropy = reference.linear_entropy(hidden, weight, bias=bias, **case.transforms)
    grads = torch.autograd.grad(logps, leaves, case.upstream.double())
    return _named(logps, z.logsumexp(1), (KAPPA * z).logsumexp(1), entropy, grads)


def errors(got: dict[str, Tensor], twin: dict[str, Tensor], case: Case) -> Errors:
    """Return the largest absolute error of values in nats, and the relative error of gradients in Frobenius' norm."""
    distances = {x: float((got[x] - twin[x]).abs().max()) for x in ("logps", "lse", "lse_kappa", "entropy")}
    for name in [x for x in ("hidden", "weight", "bias") if x in got]:
        rows = case.hidden_rows if name == "hidden" else slice(None)
        distances[name] = float((got[name][rows] - twin[name][rows]).norm() / twin[name][rows].norm())
    return distances


def strict_rule(shape: tuple[int, int, int], seeds: int) -> dict[str, Any]:
    """Count how often float16's dH breaks the rule: twice the error of torch on upcast inputs, plus 1e-5.

    `strict` compares with torch's own gradient, `rounded_once` with that of dlogits rounded once. Errors and what is
    allowed are the largest over dH's entries, over its largest entry.
    """
    measures = {x.name: x.measure for x in IMPLEMENTATIONS}
    triton, plain = measures["Triton kernels"], measures["eager on upcast inputs"]
    rounded = measures["the same, dlogits rounded once"]
    broken = {"strict": 0, "rounded_once": 0}
    worst: Errors = {"error": 0.0, "strict": 1.0, "rounded_once": 1.0}
    for seed in range(seeds):
        case = drawn("", shape, seed=seed).to(torch.float16)
        twin = exact(case)["hidden"]
        error, strict, once = (
            float((measure(case)["hidden"] - twin).abs().max() / twin.abs().max())
            for measure in (triton, plain, rounded)
        )
        found = {"error": error, "strict": 2 * strict + 1e-5, "rounded_once": 2 * once + 1e-5}
        for yardstick in broken:
            broken[yardstick] += error > found[yardstick]
        worst = max(worst, found, key=lambda x: x["error"] / x["strict"])
    return {"shape": "x".join(map(str, shape)), "seeds": seeds, "broken": broken, "worst": worst}


def report() -> dict[str, Any]:
    rows = []
    for case in cases():
        for dtype in FLOATS:
            cast = case.to(dtype)
            twin = exact(cast)
            for implementation in IMPLEMENTATIONS:
                if dtype in implementation.dtypes and case.name.startswith(implementation.cases):
                    distances = errors(implementation.measure(cast), twin, cast)
                    name = str(dtype).removeprefix("torch.")
                    rows.append({"case": case.name, "implementation": implementation.name, "dtype": name, **distances})
    return {
        "shape": f"{N}x{D}x{V}",
        "kappa": KAPPA,
        "kernels_ran_on": torch.cuda.get_device_name() if GPU else "the interpreter",
        "rows": rows,
        "strict_rule": [strict_rule((1, 1, 40), 200), strict_rule((40, 64, 300), 50)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # One order of adding up, whatever the machine's cores.
    torch.set_num_threads(1)
    made = report() | {"made_by": made_by()}
    for row in made["rows"]:
        numbers = "  ".join(
            f"{name} {row[name]:.1e}" for name in ("logps", "lse", "entropy", "hidden", "weight", "bias") if name in row
        )
        print(f"{row['case'][:8]:<9}{row['dtype']:<9} {row['implementation']:<38} {numbers}")
    for rule in made["strict_rule"]:
        print(rule)
    write_report(made, arguments.json)


if __name__ == "__main__":
    main()
