"""The divergences that are compared, each the mean over all tokens: ours and its peers', as they are called.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.harness import contenders as registry
from tvkd_fast import (
    fused_linear_distillation_loss,
    linear_cached_forward_kl,
    linear_divergence,
    linear_expected_rows,
)
from tvkd_fast.ops.tiles import native

KINDS = ("forward_kl", "reverse_kl", "jsd")
LIMITS = {"mean": 1e-3, "values": 1e-3, "hidden": 1e-4, "weight": 1e-4}
SPARSE = {
    14: LIMITS | {"hidden": 3e-2, "weight": 6e-3},
    16: LIMITS | {"hidden": 1.2e-2, "weight": 3e-3},
}
"""By −log₂ ε, of a gradient that is meant to be that sparse: twice what it is to be on real states."""
_BETA_OF_TRL = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Student's states and weight, the teacher's, to the mean () to go backward from, and values (N,) if it has them."""


@dataclass(frozen=True, kw_only=True)
class Contender(registry.Contender[Divergence]):
    kind: str
    limits: Mapping[str, float] = field(default_factory=lambda: LIMITS)
    """The errors at most: of the mean and of values in nats, of gradients relative."""
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda _, *teacher: teacher
    """Student's weight and the teacher's states and weight to what is known of the teacher before, and not timed."""
    frozen: bool = False
    """Whether the student's head has no gradient."""
    compiles: bool = False
    """Whether it compiles for a shape, so that its first call is not timed."""


def known(kind: str, **gradient: Any) -> Divergence:
    def run(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_linear_distillation_loss(hidden, weight, teacher, teacher_weight, mixture={kind: 1.0}, **gradient)
        return out.loss, out.outputs[kind]

    return run


def unknown(kind: str) -> Divergence:
    def run(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        values = linear_divergence(hidden, weight, teacher, teacher_weight, kind=kind)  # type: ignore[arg-type]
        return values.mean(), values.detach()

    return run


def cached(hidden: Tensor, weight: Tensor, rows: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """The forward KL from what `linear_expected_rows` has made."""
    values = linear_cached_forward_kl(hidden, weight, rows, entropy)
    return values.mean(), values.detach()


def expected_rows(weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
    found = linear_expected_rows(teacher, teacher_weight, weight.detach())
    return found.rows, found.entropy


def in_torch(run: Divergence) -> Divergence:
    """Without the numba extra, in a process that runs nothing else."""

    def without(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        native.passes = lambda z: None
        return run(*args)

    return without


def whole(kind: str, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """(N,) of whole logits."""
    return of_logits(kind, hidden @ weight.T, teacher @ teacher_weight.T)


def of_logits(kind: str, z: Tensor, u: Tensor) -> Tensor:
    """(N,) of the student's logits [N, V] and the teacher's."""
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1))


def eager(kind: str) -> Divergence:
    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        values = whole(kind, *args)
        return values.mean(), values.detach()

    return run


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(whole, dynamic=False)


def compiled(kind: str) -> Divergence:
    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        values = _compiled()(kind, *args)
        return values.mean(), values.detach()

    return run


def trl(kind: str) -> Divergence:
    def run(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        beta = _BETA_OF_TRL[kind]
        values, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, beta)
        return values.mean(), values.detach()

    return run


def liger(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, None]:
    """JSD at β = ½, without the hard loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return loss(hidden, weight, teacher, teacher_weight, labels), None


def on_cpu() -> dict[str, Contender]:
    """Forward and backward, by name."""
    found: dict[str, Contender] = {}
    for kind in KINDS:
        of = partial(Contender, kind=kind)
        found |= {
            f"tvkd_fast, {kind}, known coefficients": of(run=known(kind)),
            f"tvkd_fast, {kind}": of(run=unknown(kind)),
            f"tvkd_fast, {kind}, known coefficients, without numba": of(run=in_torch(known(kind)), by_name=True),
            f"eager, {kind}": of(run=eager(kind)),
            f"torch.compile, {kind}": of(run=compiled(kind), needs="g++", compiles=True),
            f"TRL, chunked divergence, {kind}": of(run=trl(kind), needs="trl"),
        }
    for kind, log_eps in product(("forward_kl", "reverse_kl"), (14, 16)):
        run = known(kind, grad_mode="sparse", eps=2.0**-log_eps)
        found[f"tvkd_fast, {kind}, sparse 2^-{log_eps}"] = Contender(run=run, kind=kind, limits=SPARSE[log_eps])
    for kind in KINDS:
        found[f"tvkd_fast, {kind}, frozen head"] = Contender(run=unknown(kind), kind=kind, frozen=True)
    # It is warmed by a whole call, since of its teacher there are no columns.
    found["tvkd_fast, forward_kl, frozen head, cached teacher"] = Contender(
        run=cached, kind="forward_kl", prepare=expected_rows, frozen=True, compiles=True
    )
    found["Liger, fused linear JSD, jsd"] = Contender(run=liger, needs="liger_kernel", kind="jsd", compiles=True)
    return found
