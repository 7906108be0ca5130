"""A head in float64 over the very inputs, a slice of the vocabulary at a time, beside what float32 makes of them.

The rule is the tests' own: an error is at most twice that of plain torch in float32, whose gradient by the logits is
rounded once to the inputs' dtype as the kernels' is, plus 1e-5.

Letters: N tokens, D hidden, V vocabulary, C columns of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.checker import largest
from bench.minutes.cases import Row, judged

COLUMNS = 8192
"""Of a slice: at 4,097 tokens its float64 logits take a quarter of a GiB."""
SLACK = 1e-5
_FLOAT16_SCALE = 2.0**-14


@dataclass(frozen=True, kw_only=True)
class Call:
    """hidden [N, D], weight [V, D], bias (V,), labels (N,) of which −100 is ignored, upstream (N,) float32."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def kept(self) -> Tensor:
        return self.labels != -100

    @property
    def coefficients(self) -> Tensor:
        """(N,) upstream, 0 where a label is ignored."""
        return self.upstream.masked_fill(~self.kept, 0.0)


def random_call(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Call:
    """Normal logits of standard deviation 3; every fifth label is ignored, the last is the vocabulary's last."""
    n, d, v = shape
    draw = torch.Generator(device).manual_seed(n + d + v)
    labels = torch.randint(v, (n,), generator=draw, device=device)
    labels[1::5] = -100
    labels[-1] = v - 1
    return Call(
        hidden=torch.randn(n, d, generator=draw, device=device).to(dtype),
        weight=(torch.randn(v, d, generator=draw, device=device) * 3 / d**0.5).to(dtype),
        labels=labels,
        upstream=torch.randn(n, generator=draw, device=device),
        bias=torch.randn(v, generator=draw, device=device).to(dtype) if bias else None,
        softcap=softcap,
        logit_scale=logit_scale,
    )


class InSlices:
    """The head of a call in one precision: its log-sum-exp, log-probabilities and, slice by slice, gradients."""

    def __init__(self, call: Call, precision: torch.dtype) -> None:
        self.call, self.precision = call, precision
        self.hidden = call.hidden.to(precision)
        parts, self.target = [], torch.zeros_like(self.hidden[:, 0])
        for columns in self.slices():
            z, _ = self.logits(columns)
            here = (call.labels >= columns.start) & (call.labels < columns.stop)
            own = z.gather(1, (call.labels - columns.start).where(here, 0)[:, None])[:, 0]
            self.target = torch.where(here, own, self.target)
            parts.append(z.logsumexp(1))
        self.lse = torch.stack(parts).logsumexp(0)

    def slices(self) -> Iterator[slice]:
        v = self.call.weight.shape[0]
        return (slice(first, min(first + COLUMNS, v)) for first in range(0, v, COLUMNS))

    def logits(self, columns: slice) -> tuple[Tensor, Tensor | float]:
        """z [N, C] and J = dz/da."""
        call = self.call
        a = self.hidden @ call.weight[columns].to(self.precision).T
        if call.bias is not None:
            a += call.bias[columns].to(self.precision)
        a *= call.logit_scale
        if call.softcap is None:
            return a, 1.0
        z = call.softcap * torch.tanh(a / call.softcap)
        return z, 1.0 - (z / call.softcap) ** 2

    @property
    def logps(self) -> Tensor:
        return (self.target - self.lse).masked_fill(~self.call.kept, 0.0)

    def dlogits(self, columns: slice) -> Tensor:
        """[N, C] c·(δ − p)·J; in float32 rounded to the inputs' dtype and back, as a 16-bit product takes it."""
        call, c = self.call, self.call.coefficients.to(self.precision)[:, None]
        z, chain = self.logits(columns)
        g = -(z - self.lse[:, None]).exp_()
        here = (call.labels >= columns.start) & (call.labels < columns.stop)
        rows = here.nonzero()[:, 0]
        g[rows, call.labels[rows] - columns.start] += 1.0
        g = g * chain * c
        if self.precision == torch.float64 or call.hidden.dtype == torch.float32:
            return g
        return rounded(g, call.hidden.dtype, largest=c.abs().max())


def rounded(grad: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> Tensor:
    """A float32 gradient by logits as a product of 16 bits takes it: float16 relative to the largest of all."""
    if dtype != torch.float16:
        return grad.to(dtype).float()
    scale = (grad.abs().max() if largest is None else largest) * _FLOAT16_SCALE
    return (grad / scale).to(dtype).float() * scale


def compared(call: Call, ours: Mapping[str, Tensor | None]) -> Row:
    """Errors of our numbers beside float64's and what plain float32 allows them; a number that is None is not compared.

    `ours` are `logps` (N,), `hidden`, `weight` and `bias`, gradients of Σ upstream·logps, and `frozen hidden`.
    """
    exact, plain = InSlices(call, torch.float64), InSlices(call, torch.float32)
    given = {name: x for name, x in ours.items() if x is not None}
    errors = {"logps": largest(given["logps"], exact.logps)}
    limits = {"logps": 2 * largest(plain.logps, exact.logps) + SLACK}
    hidden = {x.precision: torch.zeros_like(x.hidden) for x in (exact, plain)}
    worst: dict[str, _Worst] = {name: _Worst() for name in ("weight", "bias") if name in given}
    for columns in exact.slices():
        by_precision = {x.precision: call.logit_scale * x.dlogits(columns) for x in (exact, plain)}
        for x in (exact, plain):
            hidden[x.precision] += by_precision[x.precision] @ call.weight[columns].to(x.precision)
        g, rounded = by_precision[torch.float64], by_precision[torch.float32]
        if "weight" in worst:
            worst["weight"].add(given["weight"][columns], g.T @ exact.hidden, rounded.T @ plain.hidden)
        if "bias" in worst:
            worst["bias"].add(given["bias"][columns], g.sum(0), rounded.sum(0))
    for name in ("hidden", "frozen hidden"):
        if name in given:
            worst[name] = _Worst().add(given[name], hidden[torch.float64], hidden[torch.float32])
    errors |= {name: x.error for name, x in worst.items()}
    limits |= {name: 2 * x.plain + SLACK * x.largest for name, x in worst.items()}
    return judged(errors, limits)


class _Worst:
    """The largest error of ours and of plain torch's, rounded to our dtype, and the largest number, over slices."""

    def __init__(self) -> None:
        self.error = self.plain = self.largest = 0.0

    def add(self, ours: Tensor, exact: Tensor, plain: Tensor) -> _Worst:
        # Not the larger of two floats, which NaN would not be.
        self.error = float(torch.tensor([self.error, largest(ours, exact)]).max())
        self.plain = max(self.plain, largest(plain.to(ours.dtype), exact))
        self.largest = max(self.largest, float(exact.abs().max()))
        return self
