"""The heads that are compared: on a CPU, of a teacher's values, and on a GPU.

Letters: N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import contenders as registry
from bench.harness.inputs import Head, Inputs, Run, Task, Values, fused_pairs, preference, weighted
from bench.head import peers
from tvkd_fast import linear_logps, linear_soft_values
from tvkd_fast.ops import HeadGradient, linear_lse
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.gradient import GradMode
from tvkd_fast.ops.tiles import native

EXACT = 1e-4
"""The relative error of gradients, by float64, that a contender in float32 may have."""
LIMITS = {"2^-14": 5e-2, "2^-16": 2e-2, "2^-18": 1e-2, "unbiased 2^-14": 1e-1}
"""The same of those that leave small entries out, by ε."""
WORKSPACE = 1024
"""MiB in which exact gradients may keep logits; at the packaged shape all 4,096 rows' take 768."""
TASKS: dict[Task, Callable[[Head, Inputs], Values]] = {
    "logps": weighted,
    "values": weighted,
    "preference": preference,
}


@dataclass(frozen=True, kw_only=True)
class Contender(registry.Contender[Run]):
    task: Task = "logps"
    limit: float = EXACT
    """The largest relative error of gradients on a CPU that is not counted as wrong."""
    skips: bool = False
    """Whether it leaves small gradients out by design on a GPU."""
    frozen: bool = False
    """Its weight wants no gradient, and it is asked for none."""
    frozen_backbone: bool = False
    """The states want none."""
    reuse: bool = False
    """Its gradients' memory was touched before."""
    compiles: bool = False
    """Whether it compiles for a shape, so that its first call is not timed."""

    def given(self, inputs: Inputs) -> Inputs:
        if self.task == "values":
            return inputs.detached()
        if self.frozen_backbone:
            return inputs.frozen_backbone()
        return inputs.frozen_head() if self.frozen else inputs

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of what it is checked by, in the order of its results."""
        if self.task == "values":
            return ("lse",)
        wanted = {"hidden": not self.frozen_backbone, "weight": not self.frozen}
        return ("logps", *(name for name, is_wanted in wanted.items() if is_wanted))


def of(head: Head, task: Task = "logps", **options: Any) -> Contender:
    return Contender(run=partial(TASKS[task], head), task=task, **options)


def fused(grad_mode: GradMode = "exact", eps: float | None = None, workspace_mb: int = 0, **options: Any) -> Contender:
    gradient = HeadGradient(grad_mode=grad_mode, eps=eps, workspace_mb=workspace_mb)
    return Contender(run=partial(fused_pairs, gradient=gradient), task="pairs", **options)


def in_torch(head: Head) -> Head:
    """Return the head without the numba extra, for a process that runs nothing else."""

    def without(*args: Tensor) -> Tensor:
        native.passes = lambda z: None
        return head(*args)

    return without


def sparse(eps: float, **options: Any) -> Head:
    return partial(linear_logps, grad_mode="sparse", eps=eps, **options)


def soft_values(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_soft_values(hidden, weight)


def lse(hidden: Tensor, weight: Tensor, labels: Tensor, *, kappa: float | None = None, impl: Impl = "auto") -> Tensor:
    """Return the logsumexp, and with κ both sums of the same product."""
    return linear_lse(hidden, weight, kappa=1.0 if kappa is None else kappa, impl=impl)[0]


def on_cpu() -> dict[str, Contender]:
    """Forward and backward, by name."""
    small = of(sparse(2.0**-14), limit=LIMITS["2^-14"])
    unbiased = sparse(2.0**-14, tail="unbiased", seed=0)
    return {
        "tvkd_fast, sparse 2^-14": small,
        "tvkd_fast, sparse 2^-14, memory touched": replace(small, reuse=True),
        "tvkd_fast, sparse 2^-14, without numba": of(in_torch(sparse(2.0**-14)), limit=LIMITS["2^-14"]),
        "tvkd_fast, sparse 2^-14, whatever the tail": of(sparse(2.0**-14, max_tail=1.0), limit=1.0, by_name=True),
        "tvkd_fast, sparse 2^-16": of(sparse(2.0**-16), limit=LIMITS["2^-16"]),
        "tvkd_fast, sparse 2^-18": of(sparse(2.0**-18), limit=LIMITS["2^-18"]),
        "tvkd_fast, sparse 2^-14, unbiased": of(unbiased, limit=LIMITS["unbiased 2^-14"]),
        "tvkd_fast, sparse 2^-14, frozen head": replace(small, frozen=True),
        "tvkd_fast, exact": of(linear_logps),
        "tvkd_fast, exact, logits kept": of(partial(linear_logps, workspace_mb=WORKSPACE)),
        "tvkd_fast, exact, frozen head": of(linear_logps, frozen=True),
        "tvkd_fast, fused loss, exact": fused(),
        "tvkd_fast, fused loss, exact, 512 MiB": fused(workspace_mb=512),
        "tvkd_fast, fused loss, frozen head": fused(frozen=True),
        "tvkd_fast, fused loss, frozen backbone": fused(frozen_backbone=True),
        "tvkd_fast, fused loss, sparse 2^-14": fused("sparse", 2.0**-14, limit=LIMITS["2^-14"]),
        "tvkd_fast, fused loss, sparse 2^-16": fused("sparse", 2.0**-16, limit=LIMITS["2^-16"]),
        "tvkd_fast, values": of(soft_values, "values"),
        "eager log-softmax": of(peers.eager),
        "eager logsumexp": of(peers.eager_logsumexp),
        "torch.compile": of(peers.compiled, needs="g++", compiles=True),
        "TRL, chunked head": of(peers.trl, needs="trl"),
        "CCE, torch_compile": of(peers.cce_compiled, needs="cut_cross_entropy", compiles=True),
        "Liger, fused DPO": Contender(run=peers.liger_dpo, task="preference", needs="liger_kernel"),
    }


def of_values() -> dict[str, Contender]:
    """A teacher's log-sum-exp, forward alone, by name."""
    return {
        "tvkd_fast": of(lse, "values"),
        "tvkd_fast, without numba": of(in_torch(lse), "values"),
        "tvkd_fast, kappa 1/2": of(partial(lse, kappa=0.5), "values"),
        "eager logsumexp": of(peers.eager_values, "values"),
        "torch.compile": of(peers.compiled_values, "values", needs="g++", compiles=True),
    }


def on_gpu(impl: Impl = "triton") -> dict[str, Contender]:
    """Return the contenders by name, in the table's order. CCE with a frozen head skips nothing."""
    ours = partial(linear_logps, impl=impl)
    liger = partial(peers.liger, accumulate=None)
    of_liger, of_cce = (partial(of, needs=needs) for needs in ("liger_kernel", "cut_cross_entropy"))
    return {
        "tvkd_fast": of(ours),
        "eager": of(peers.eager),
        "torch.compile": of(peers.compiled),
        "Liger": of_liger(liger),
        "Liger, float32 dW": of_liger(partial(peers.liger, accumulate=torch.float32)),
        "CCE": of_cce(partial(peers.cce, skip="high"), skips=True),
        "CCE, nothing skipped": of_cce(partial(peers.cce, skip=None)),
        "TRL": of(peers.trl, needs="trl"),
        "tvkd_fast, DPO": of(ours, "preference"),
        "Liger, DPO": Contender(run=peers.liger_dpo, task="preference", needs="liger_kernel"),
        "tvkd_fast, frozen head": of(ours, frozen=True),
        "eager, frozen head": of(peers.eager, frozen=True),
        "torch.compile, frozen head": of(peers.compiled, frozen=True),
        "Liger, frozen head": of_liger(liger, frozen=True),
        "CCE, frozen head": of_cce(partial(peers.cce, skip=None), frozen=True),
    }
